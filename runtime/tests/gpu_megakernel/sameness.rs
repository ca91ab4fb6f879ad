//! What must be equal to the bit: repeated runs, a sequence alone and in company, in one slot and in another; and tokens
//! against the CPU's sampler on the kernel's own logits.

use std::collections::BTreeSet;

use mirage_compiler::arch::Arch;
use mirage_compiler::mesh::{Placement, Split};
use mirage_compiler::plan::StreamForm;
use mirage_runtime::generate::{Executor, GenerateRequest};
use mirage_runtime::megakernel::{Form, Megakernel};
use mirage_runtime::sampler::SamplingParams;
use mirage_testing::{Choice, SIZES, Sizes, prompts, qwen3, tiny};

use crate::device::{Kernel, turn};

const LENGTHS: [usize; 16] = [7, 1, 70, 2, 33, 16, 5, 1, 40, 3, 9, 12, 64, 65, 17, 80];

fn lengths(batch: usize) -> Vec<usize> {
    LENGTHS.into_iter().cycle().take(batch).collect()
}

/// Every way to sample.
fn samplings() -> impl Iterator<Item = SamplingParams> + Clone {
    let sampled = |(temperature, top_k, top_p)| SamplingParams {
        temperature,
        top_k,
        top_p,
        seed: 5,
    };
    [
        (0.0, 0, 1.0),
        (1.0, 0, 1.0),
        (0.7, 10, 1.0),
        (2.0, 0, 0.9),
        (1.0, 20, 0.5),
        (0.3, 1, 1.0),
        (1e4, 0, 1.0),
        (1e-4, 0, 0.01),
        (0.8, 0, 0.95),
        (0.8, 40, 1.0),
    ]
    .map(sampled)
    .into_iter()
}

/// Requests that differ in everything.
fn mixed(batch: usize, vocab: usize) -> Vec<GenerateRequest> {
    (0u32..)
        .zip(prompts(&lengths(batch), vocab))
        .zip(samplings().cycle())
        .map(|((stream, prompt), sampling)| GenerateRequest {
            max_new_tokens: 3 + stream as usize,
            sampling,
            stream,
            stop_tokens: BTreeSet::from([3]),
            prompt,
        })
        .collect()
}

/// Nothing but its own request changes a sequence.
fn check_company(gpu: &mut Megakernel) {
    let (batch, vocab) = (gpu.limits().batch, gpu.limits().vocab);
    let requests = mixed(batch, vocab);
    let together = gpu.generate_all(&requests).unwrap();
    for _ in 0..20 {
        assert_eq!(gpu.generate_all(&requests).unwrap(), together);
    }
    let reversed: Vec<_> = requests.iter().rev().cloned().collect();
    let mut from_reversed = gpu.generate_all(&reversed).unwrap();
    from_reversed.reverse();
    assert_eq!(from_reversed, together);
    for (slot, (request, want)) in requests.iter().zip(&together).enumerate() {
        let alone = gpu.generate_all(std::slice::from_ref(request)).unwrap();
        assert_eq!(&alone[0], want, "sequence {slot} alone");
        // In the second slot, behind one that ends early.
        let early = GenerateRequest::greedy(vec![1], 1);
        let second = gpu.generate_all(&[early, request.clone()]).unwrap();
        assert_eq!(&second[1], want, "sequence {slot} in the second slot");
    }
    let sequences = prompts(&lengths(batch), vocab);
    let all = gpu.score(&sequences).unwrap();
    assert!(gpu.score(&sequences).unwrap() == all, "logits repeat");
    for (slot, want) in all.iter().enumerate() {
        let alone = gpu.score(&sequences[slot..=slot]).unwrap();
        assert!(alone[0] == *want, "logits of sequence {slot} alone");
    }
}

#[test]
fn neighbours_change_nothing() {
    let model = qwen3(SIZES);
    let scattered = Choice {
        groups: 2,
        members: 2,
        helpers: 1,
        writers: Placement {
            groups: Split::Columns,
            members: Split::Rows,
        },
        stream: StreamForm::Scattered,
        kv_splits: 2,
        replicate_below: 20,
        heads_per_task: 1,
        prefill_columns: 8,
    };
    let replicated = Choice {
        stream: StreamForm::Replicated,
        prefill_columns: 16,
        ..scattered
    };
    for kernel in [
        Kernel::planned(&model, 8, 104),
        Kernel::planned(&model, 16, 104),
        Kernel::planned(&model, 40, 104),
        Kernel::chosen(&model, &scattered, 8, 104),
        Kernel::chosen(&model, &replicated, 5, 104),
    ] {
        let turn = turn();
        check_company(&mut kernel.load(&turn, &model));
    }
}

#[test]
fn neighbours_change_nothing_in_the_tiny_model() {
    let model = tiny();
    let kernel = Kernel::planned(&model, 8, 128);
    let turn = turn();
    check_company(&mut kernel.load(&turn, &model));
}

/// The chain of kernels computes the same, to the bit, sums and noise included.
#[test]
fn a_chain_of_kernels_makes_the_same_tokens() {
    let model = qwen3(SIZES);
    let tiny = tiny();
    let replicated = Choice {
        groups: 2,
        members: 2,
        helpers: 3,
        writers: Placement {
            groups: Split::Columns,
            members: Split::Rows,
        },
        stream: StreamForm::Replicated,
        kv_splits: 2,
        replicate_below: 20,
        heads_per_task: 1,
        prefill_columns: 16,
    };
    let scattered = Choice {
        stream: StreamForm::Scattered,
        ..replicated
    };
    for (model, kernel) in [
        (&model, Kernel::planned(&model, 1, 104)),
        (&model, Kernel::chosen(&model, &replicated, 8, 104)),
        (&model, Kernel::chosen(&model, &scattered, 16, 104)),
        (&model, Kernel::planned(&model, 40, 104)),
        (&tiny, Kernel::planned(&tiny, 4, 128)),
    ] {
        let (source, cubin) = kernel.phased();
        let turn = turn();
        let mut gpu = kernel.load(&turn, model);
        gpu.add_phased(&source, &cubin).unwrap();
        let (batch, vocab) = (gpu.limits().batch, gpu.limits().vocab);
        let requests = mixed(batch, vocab);
        let sequences = prompts(&lengths(batch), vocab);
        let tokens = gpu.generate_all(&requests).unwrap();
        let logits = gpu.score(&sequences).unwrap();
        gpu.set_form(Form::Phased);
        for _ in 0..3 {
            assert_eq!(gpu.generate_all(&requests).unwrap(), tokens);
        }
        assert!(gpu.score(&sequences).unwrap() == logits, "logits");
        let few = gpu.generate_all(&requests[..1]).unwrap();
        assert_eq!(few[..], tokens[..1]);
        gpu.set_form(Form::Persistent);
        assert_eq!(gpu.generate_all(&requests).unwrap(), tokens);
    }
}

/// Tokens from number `first` on are the CPU's draws from the scored logits.
fn check_sampler(gpu: &mut Megakernel, new_tokens: usize, first: usize) {
    let (batch, vocab) = (gpu.limits().batch, gpu.limits().vocab);
    for round in 0..4u32 {
        let requests: Vec<_> = (0u32..)
            .zip(samplings().cycle().skip(round as usize))
            .take(batch)
            .map(|(slot, sampling)| GenerateRequest {
                sampling: SamplingParams {
                    seed: sampling.seed << 40 | u64::from(round),
                    ..sampling
                },
                stream: round * 100 + slot,
                ..GenerateRequest::greedy(vec![(slot * 7 + round) % vocab as u32], new_tokens)
            })
            .collect();
        let generated = gpu.generate_all(&requests).unwrap();
        let whole: Vec<Vec<u32>> = requests
            .iter()
            .zip(&generated)
            .map(|(request, generated)| [&request.prompt[..], &generated.tokens].concat())
            .collect();
        let scored = gpu.score(&whole).unwrap();
        for ((request, generated), logits) in requests.iter().zip(&generated).zip(&scored) {
            let sampler = request.sampling.sampler().unwrap();
            assert_eq!(generated.tokens.len(), new_tokens);
            for (position, &token) in (0u32..).zip(&generated.tokens).skip(first) {
                // The row of a position predicts the next one.
                let row = logits.row(position as usize);
                let want = sampler.sample(row, request.stream, position + 1);
                assert_eq!(token, want, "{:?}, position {position}", request.sampling);
            }
        }
    }
}

#[test]
fn tokens_are_the_cpu_sampler_s() {
    // Logits are scored by decode steps, whose plan may be another than that of prefill steps, which make first tokens.
    // The wide one has what a small one has not: several passes of the head, and more tokens than a lane asks for at once.
    let vocab = 60_001;
    let wide = qwen3(Sizes { vocab, ..SIZES });
    for (model, batch, new_tokens) in [
        (&qwen3(SIZES), 16, 60),
        (&qwen3(SIZES), 40, 60),
        (&tiny(), 1, 60),
        (&tiny(), 8, 60),
        (&wide, 1, 60),
        (&wide, 16, 20),
    ] {
        let kernel = Kernel::planned(model, batch, 64);
        let turn = turn();
        check_sampler(&mut kernel.load(&turn, model), new_tokens, 1);
    }
    let alike = Choice {
        groups: 2,
        members: 2,
        helpers: 1,
        writers: Placement {
            groups: Split::Columns,
            members: Split::Rows,
        },
        stream: StreamForm::Scattered,
        kv_splits: 2,
        replicate_below: 0,
        heads_per_task: 1,
        prefill_columns: 8,
    };
    let model = qwen3(SIZES);
    let kernel = Kernel::chosen(&model, &alike, 8, 64);
    let turn = turn();
    check_sampler(&mut kernel.load(&turn, &model), 60, 0);
}

#[test]
fn pages_of_an_older_architecture_bring_the_same_bits() {
    let model = tiny();
    let kernel = Kernel::planned(&model, 8, 256);
    let older = kernel.with_pages_of(Arch::Sm80);
    assert_ne!(kernel.cubin, older.cubin);
    let sequences = prompts(&LENGTHS[..8], kernel.program.vocab);
    let turn = turn();
    let want = kernel.load(&turn, &model).score(&sequences).unwrap();
    let got = older.load(&turn, &model).score(&sequences).unwrap();
    assert!(got == want);
}

#[test]
fn a_timeline_changes_nothing_and_records_every_step() {
    let model = tiny();
    let kernel = Kernel::planned(&model, 1, 256);
    let traced = kernel.traced();
    let request = [GenerateRequest::greedy(vec![5; 40], 12)];
    let turn = turn();
    let want = kernel.load(&turn, &model).generate_all(&request).unwrap();
    let mut gpu = traced.load(&turn, &model);
    gpu.record_timeline().unwrap();
    assert_eq!(gpu.generate_all(&request).unwrap(), want);
    let timeline = gpu.timeline().unwrap();
    let made = want[0].tokens.len();
    let prefills = 40usize.div_ceil(kernel.program.prefill.columns);
    assert_eq!(timeline.steps, [prefills, made - 1]);
    assert_eq!(timeline.workers, kernel.program.mesh.workers());
    let layer = &kernel.program.decode.layer;
    let times = timeline.workers * kernel.program.layers * (made - 1);
    for phase in layer {
        let name = kernel.program.describe(phase);
        let ends = timeline.parts[1]
            .iter()
            .filter(|part| part.phase == name && part.until.is_empty());
        assert_eq!(
            ends.map(|part| part.clocks.len()).sum::<usize>(),
            times,
            "{name}"
        );
    }
}
