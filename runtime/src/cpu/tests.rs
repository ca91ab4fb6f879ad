//! The executor against the plain per-operator reference in f32, on programs of many plans; what it must not depend on; and
//! wrong programs, which must be found out.

use std::collections::BTreeSet;

use mirage_compiler::arch::GpuModel;
use mirage_compiler::mesh::{Placement, Split};
use mirage_compiler::plan::{StreamForm, Target};
use mirage_compiler::reference::Reference;
use mirage_testing::{
    BOUND, Choice, MEAN_BOUND, Model, SIZES, Sizes, behind, error, llama3, planned, qwen3, target,
};

use super::*;
use crate::generate::{FinishReason, Generated, Widths, prefill_steps};
use crate::sampler::SamplingParams;

fn cpu(model: &Model, program: &Program) -> CpuModel {
    CpuModel::load(program.clone(), &Checkpoint::open(model).unwrap()).unwrap()
}

fn reference(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let checkpoint = Checkpoint::open(model).unwrap();
    Reference::new(&model.typed, &checkpoint)
        .unwrap()
        .logits(tokens)
        .unwrap()
}

/// Logits after each prompt, by way of prefill steps.
fn after_prompts(cpu: &mut CpuModel, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let steps = prefill_steps(&prompts, Widths::of(&cpu.shared.program));
    let columns = cpu.prefill(&steps, || false).unwrap().unwrap();
    columns.iter().map(|&column| cpu.logits(column)).collect()
}

/// Scored logits at every position, and those after prefill, against the reference's.
fn check_logits(model: &Model, program: &Program, sequences: &[Vec<u32>], want: &[Vec<Vec<f32>>]) {
    let mut cpu = cpu(model, program);
    let scored = cpu.score(sequences).unwrap();
    let after = after_prompts(&mut cpu, sequences);
    let mut errors = Vec::new();
    for (sequence, want) in want.iter().enumerate().take(sequences.len()) {
        assert_eq!(scored[sequence].positions(), want.len());
        errors.extend((0..want.len()).map(|p| error(scored[sequence].row(p), &want[p])));
        errors.extend(want.last().map(|want| error(&after[sequence], want)));
    }
    let largest = errors.iter().copied().fold(0.0, f32::max);
    let mean = errors.iter().sum::<f32>() / errors.len() as f32;
    assert!(
        largest < BOUND && mean < MEAN_BOUND,
        "{program}\nerrors up to {largest}, {mean} in the mean"
    );
}

fn prompts() -> Vec<Vec<u32>> {
    // The longest goes beyond two rounds of positions, so that three splits have some each.
    mirage_testing::prompts(&[7, 1, 70, 2, 33, 16, 5, 1], SIZES.vocab)
}

#[test]
fn planned_programs_match_the_reference() {
    let prompts = prompts();
    for model in [
        qwen3(SIZES),
        llama3(Sizes {
            tied: false,
            ..SIZES
        }),
    ] {
        let want: Vec<_> = prompts
            .iter()
            .map(|tokens| reference(&model, tokens))
            .collect();
        for (sms, batch) in [(1, 1), (5, 3), (8, 8), (8, 24), (132, 3)] {
            let program = planned(&model, &target(sms, batch, 72));
            let batch = batch.min(prompts.len());
            check_logits(&model, &program, &prompts[..batch], &want);
        }
    }
}

#[test]
fn every_placement_matches_the_reference() {
    let (model, prompts) = (qwen3(SIZES), &prompts()[..3]);
    let want: Vec<_> = prompts
        .iter()
        .map(|tokens| reference(&model, tokens))
        .collect();
    for choice in Choice::all() {
        check_logits(&model, &choice.program(&model, 3, 72), prompts, &want);
    }
}

fn cpu_target(batch: usize, max_seq: usize) -> Target {
    Target {
        gpu: GpuModel::cpu(),
        batch,
        max_seq,
    }
}

#[test]
fn greedy_tokens_match_the_reference() {
    let model = qwen3(SIZES);
    let mut cpu = cpu(&model, &planned(&model, &cpu_target(3, 96)));
    let prompts = &prompts()[..3];
    let batch: Vec<_> = prompts
        .iter()
        .map(|p| GenerateRequest::greedy(p.clone(), 20))
        .collect();
    let mut margins = 0;
    for (prompt, generated) in prompts.iter().zip(cpu.generate_all(&batch).unwrap()) {
        assert_eq!(generated.tokens.len(), 20);
        let whole: Vec<u32> = prompt.iter().chain(&generated.tokens).copied().collect();
        let want = reference(&model, &whole);
        for (logits, token) in want[prompt.len() - 1..].iter().zip(generated.tokens) {
            let behind = behind(logits, token);
            assert!(
                behind <= 2.0 * BOUND,
                "token {token} is {behind} behind the best"
            );
            margins += usize::from(behind == 0.0);
        }
    }
    // Almost all are the very best.
    assert!(margins >= 55, "{margins} of 60");
}

/// Requests that differ in everything.
fn mixed() -> Vec<GenerateRequest> {
    let sampled = |temperature, top_k, top_p| SamplingParams {
        temperature,
        top_k,
        top_p,
        seed: 5,
    };
    let sampling = [
        sampled(0.0, 0, 1.0),
        sampled(1.0, 0, 1.0),
        sampled(0.7, 10, 1.0),
        sampled(2.0, 0, 0.9),
        sampled(1.0, 20, 0.5),
    ];
    (0u32..)
        .zip(prompts().into_iter().zip(sampling.into_iter().cycle()))
        .map(|(stream, (prompt, sampling))| GenerateRequest {
            max_new_tokens: 3 + stream as usize,
            sampling,
            stream,
            stop_tokens: BTreeSet::from([3]),
            prompt,
        })
        .collect()
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
        replicate_below: 7,
        heads_per_task: 1,
        prefill_columns: 8,
    };
    for program in [
        planned(&model, &cpu_target(8, 80)),
        scattered.program(&model, 8, 80),
    ] {
        let mut cpu = cpu(&model, &program);
        let batch = mixed();
        let together = cpu.generate_all(&batch).unwrap();
        let reversed: Vec<_> = batch.iter().rev().cloned().collect();
        let mut from_reversed = cpu.generate_all(&reversed).unwrap();
        from_reversed.reverse();
        assert_eq!(together, from_reversed);
        for (request, want) in batch.iter().zip(&together) {
            let alone = cpu.generate_all(std::slice::from_ref(request)).unwrap();
            assert_eq!(&alone[0], want);
        }
        // Logits too, to the bit, and on a single thread as on many.
        let all = cpu.score(&prompts()).unwrap();
        let one = rayon::ThreadPoolBuilder::new()
            .num_threads(1)
            .build()
            .unwrap();
        let alone = one.install(|| cpu.score(&prompts()[4..5])).unwrap();
        assert_eq!(all[4], alone[0]);
    }
}

#[test]
fn sequences_end_for_the_right_reason() {
    let model = qwen3(SIZES);
    let mut cpu = cpu(&model, &planned(&model, &cpu_target(2, 16)));
    let prompt = prompts()[0].clone();
    let all = cpu
        .generate_all(&[GenerateRequest::greedy(prompt.clone(), 100)])
        .unwrap();
    // Positions 7 to 15 hold new tokens, and the one after the last position is never put in.
    assert_eq!(
        (all[0].tokens.len(), all[0].reason),
        (10, FinishReason::Context)
    );
    let tokens = all[0].tokens.clone();
    let mut check = |max_new_tokens, stop: &[u32], count: usize, reason| {
        let request = GenerateRequest {
            stop_tokens: stop.iter().copied().collect(),
            ..GenerateRequest::greedy(prompt.clone(), max_new_tokens)
        };
        let want = Generated {
            tokens: tokens[..count].to_vec(),
            reason,
        };
        assert_eq!(cpu.generate_all(&[request]).unwrap(), [want]);
    };
    check(4, &[], 4, FinishReason::Length);
    check(10, &[], 10, FinishReason::Length);
    let stop = tokens.iter().position(|t| *t == tokens[2]).unwrap();
    check(100, &[tokens[2]], stop + 1, FinishReason::Stop);
}

#[test]
fn cancelling_ends_all_sequences() {
    let model = qwen3(SIZES);
    let mut cpu = cpu(&model, &planned(&model, &cpu_target(2, 72)));
    let batch = [
        GenerateRequest::greedy(prompts()[0].clone(), 1),
        GenerateRequest::greedy(prompts()[1].clone(), 50),
    ];
    let cancel = CancelHandle::new();
    let mut events = Vec::new();
    cpu.generate(&batch, &cancel, &mut |event| {
        events.push(event);
        if matches!(
            event,
            Event::Token {
                sequence: 1,
                index: 2,
                ..
            }
        ) {
            cancel.cancel();
        }
    })
    .unwrap();
    let finished = |sequence, reason| Event::Finished { sequence, reason };
    assert_eq!(events[1], finished(0, FinishReason::Length));
    assert_eq!(events[5..], [finished(1, FinishReason::Cancelled)]);
}

#[test]
fn wrong_programs_are_found_out() {
    let model = qwen3(SIZES);
    let right = planned(&model, &cpu_target(1, 32));
    let checkpoint = Checkpoint::open(&model).unwrap();
    let check = |wrong: &dyn Fn(&mut Program), expect: &str| {
        let mut program = right.clone();
        wrong(&mut program);
        let weights = HostWeights::pack(&right, &checkpoint).unwrap();
        let mut cpu = CpuModel::new(program, weights).unwrap();
        let error = cpu.score(&[vec![1]]).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
        assert!(error.contains("decode step"), "{error}");
    };
    check(
        &|p| p.decode.layer.swap(0, 1),
        "attention on qkv (own group, all members), layer 0, CTA 0: word 0 is read in epoch 1 but was last written in epoch 0",
    );
    check(
        &|p| p.linears[1].words_at = p.linears[0].words_at,
        "is written twice in epoch 1",
    );
    check(
        &|p| {
            p.decode.replicate_below = 0;
            p.attention.words_at = p.exchange.words;
        },
        "lies outside of the",
    );
    let scattered = StreamForm::Scattered;
    check(&|p| p.decode.stream = scattered, "does not fit the form");
    check(&|p| p.decode.layer.clear(), "does not fit the form");
    let mut cpu = cpu(&model, &right);
    cpu.shared.weights.stream_offsets[1] -= 512;
    let error = cpu.score(&[vec![1]]).unwrap_err().to_string();
    let expect = "in the decode step, head, layer 2, CTA 0: its weight stream ends at byte";
    assert!(error.contains(expect), "{error}");
}

#[test]
fn weights_of_another_program_are_refused() {
    let model = qwen3(SIZES);
    let checkpoint = Checkpoint::open(&model).unwrap();
    let weights = HostWeights::pack(&planned(&model, &cpu_target(1, 32)), &checkpoint).unwrap();
    let Err(error) = CpuModel::new(planned(&model, &cpu_target(1, 64)), weights) else {
        panic!("accepted");
    };
    let expect = "the table of rotary angles has 1024 elements, but the program qwen3 takes 2048";
    assert!(error.to_string().starts_with(expect), "{error}");
}

#[test]
fn epochs_start_over() {
    let model = qwen3(SIZES);
    let mut cpu = cpu(&model, &planned(&model, &cpu_target(1, 32)));
    let want = cpu.score(&[vec![1, 2, 3]]).unwrap();
    cpu.epoch = u32::MAX - 20;
    assert_eq!(cpu.score(&[vec![1, 2, 3]]).unwrap(), want);
}
