//! The GPU against the CPU executor of the same program. Both round the same values to bf16 at the same places; sums run in
//! another order, so some values round to the other side.

use mirage_runtime::generate::{Executor, GenerateRequest};
use mirage_testing::{
    BOUND, Choice, MEAN_BOUND, Model, SIZES, Sizes, behind, error, llama3, prompts, qwen3,
};
use rayon::prelude::*;

use crate::device::{Kernel, turn};

const MAX_SEQ: usize = 104;
const NEW: usize = 24;

/// The longest go through several prefill steps, and beyond two rounds of positions in attention.
const LENGTHS: [usize; 16] = [7, 1, 70, 2, 33, 16, 5, 1, 40, 3, 9, 12, 64, 65, 17, 80];

/// Scored logits at every position are near the CPU's; and greedy tokens, whose prompts went through prefill, are the
/// CPU's choice wherever its margin exceeds the noise.
fn check(model: &Model, kernel: &Kernel, sequences: &[Vec<u32>]) {
    let program = &kernel.program;
    let mut cpu = kernel.load_cpu(model);
    let want = cpu.score(sequences).unwrap();
    let batch: Vec<_> = sequences
        .iter()
        .map(|prompt| GenerateRequest::greedy(prompt.clone(), NEW))
        .collect();
    let (got, generated) = {
        let turn = turn();
        let mut gpu = kernel.load(&turn, model);
        let got = gpu.score(sequences).unwrap();
        (got, gpu.generate_all(&batch).unwrap())
    };
    let mut errors = Vec::new();
    for (got, want) in got.iter().zip(&want) {
        assert_eq!(got.positions(), want.positions());
        errors.extend((0..want.positions()).map(|p| error(got.row(p), want.row(p))));
    }
    let largest = errors.iter().copied().fold(0.0, f32::max);
    let mean = errors.iter().sum::<f32>() / errors.len() as f32;
    assert!(
        largest < BOUND && mean < MEAN_BOUND,
        "{program}\nerrors up to {largest}, {mean} in the mean"
    );
    let whole: Vec<Vec<u32>> = sequences
        .iter()
        .zip(&generated)
        .map(|(prompt, generated)| [&prompt[..], &generated.tokens].concat())
        .collect();
    let (mut best, mut all) = (0, 0);
    for ((prompt, logits), generated) in sequences
        .iter()
        .zip(cpu.score(&whole).unwrap())
        .zip(generated)
    {
        assert_eq!(generated.tokens.len(), NEW);
        for (index, &token) in generated.tokens.iter().enumerate() {
            let behind = behind(logits.row(prompt.len() - 1 + index), token);
            assert!(
                behind <= 2.0 * BOUND,
                "{program}\ntoken {index} after {} tokens, {token}, is {behind} behind the best",
                prompt.len()
            );
            best += usize::from(behind == 0.0);
            all += 1;
        }
    }
    // Almost all are the very best.
    assert!(best * 10 >= all * 9, "{program}\n{best} of {all}");
}

/// Planned kernels for batches of several sizes.
fn check_batches(model: &Model, vocab: usize) {
    let prompts = prompts(&LENGTHS.repeat(3), vocab);
    let batches = [1, 3, 8, 16, 20, 40];
    let kernels: Vec<Kernel> = batches
        .par_iter()
        .map(|&batch| Kernel::planned(model, batch, MAX_SEQ))
        .collect();
    for (kernel, batch) in kernels.iter().zip(batches) {
        // The longest ones last, so that a batch of one has a long one too.
        check(model, kernel, &prompts[prompts.len() - batch..]);
    }
}

#[test]
fn a_qwen3_is_the_cpu_s() {
    check_batches(&qwen3(SIZES), SIZES.vocab);
}

#[test]
fn a_llama3_is_the_cpu_s() {
    let tied = false;
    check_batches(&llama3(Sizes { tied, ..SIZES }), SIZES.vocab);
}

/// Wide enough that every SM has work in every phase, and a vocabulary of several tiles to an SM.
#[test]
fn a_wider_model_is_the_cpu_s() {
    let model = qwen3(Sizes {
        layers: 3,
        hidden: 512,
        ffn: 1536,
        heads: 16,
        kv_heads: 8,
        vocab: 3001,
        tied: false,
    });
    let kernel = Kernel::planned(&model, 4, MAX_SEQ);
    check(&model, &kernel, &prompts(&[19, 1, 50, 4], 3001));
}

/// Every placement of the writers with both forms of the stream, on small meshes.
#[test]
fn every_placement_is_the_cpu_s() {
    let model = qwen3(SIZES);
    let prompts = prompts(&LENGTHS.repeat(3), SIZES.vocab);
    let build = |batch: usize, choices: Vec<Choice>| -> Vec<Kernel> {
        let chosen = |choice| Kernel::chosen(&model, choice, batch, MAX_SEQ);
        choices.par_iter().map(chosen).collect()
    };
    for (batch, choices) in [
        (3, Choice::all()),
        (16, Choice::all()),
        (33, Choice::of_rows()),
    ] {
        for kernel in build(batch, choices) {
            check(&model, &kernel, &prompts[..batch]);
        }
    }
}
