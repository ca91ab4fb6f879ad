//! What several tests of whole models share: models with random weights, and the tiny model with what transformers
//! makes of it.

#![allow(dead_code, reason = "each test includes all of this, and needs some")]

pub(crate) mod damaged;
pub(crate) mod expected;
#[path = "../../src/testing.rs"]
pub(crate) mod testing;

use testing::{Model, Random};

/// Largest error of a logit at any position against the f32 reference or another executor, in units of the logits' root
/// mean square there; the bound of the CPU executor's own tests.
pub(crate) const BOUND: f32 = 0.12;

pub(crate) fn rms(values: &[f32]) -> f32 {
    (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
}

/// The largest difference in units of the root mean square.
pub(crate) fn error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let finite = got.iter().all(|value| value.is_finite());
    assert!(finite, "a logit is not finite");
    let errors = got.iter().zip(want).map(|(g, w)| (g - w).abs());
    errors.fold(0.0, f32::max) / rms(want)
}

/// How far the logit of `token` is behind the best one, in units of the root mean square.
pub(crate) fn behind(logits: &[f32], token: u32) -> f32 {
    let best = logits.iter().copied().fold(f32::MIN, f32::max);
    (best - logits[token as usize]) / rms(logits)
}

/// Prompts of these lengths, the same every time.
pub(crate) fn prompts(lengths: &[usize], vocab: usize) -> Vec<Vec<u32>> {
    let mut random = Random(1);
    lengths
        .iter()
        .map(|&length| random.tokens(length, vocab))
        .collect()
}

/// The tiny model of this repository.
pub(crate) fn tiny() -> Model {
    testing::open(testing::QWEN3, &expected::dir())
}
