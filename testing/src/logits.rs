//! How far logits are apart, in units of their root mean square over the vocabulary.

/// Largest error of a logit at any position, against the f32 reference or another executor. Activations and exchanged
/// values carry 8 bits (2^-9 each rounding), more of them where partial sums are exchanged; measured: up to 0.086.
pub const BOUND: f32 = 0.12;

/// The mean over positions of that error; measured: 0.018 to 0.026.
pub const MEAN_BOUND: f32 = 0.035;

fn rms(values: &[f32]) -> f32 {
    (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
}

/// The largest difference.
pub fn error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let finite = got.iter().all(|value| value.is_finite());
    assert!(finite, "a logit is not finite");
    let errors = got.iter().zip(want).map(|(g, w)| (g - w).abs());
    errors.fold(0.0, f32::max) / rms(want)
}

/// How far the logit of `token` is behind the best one.
pub fn behind(logits: &[f32], token: u32) -> f32 {
    let best = logits.iter().copied().fold(f32::MIN, f32::max);
    (best - logits[token as usize]) / rms(logits)
}
