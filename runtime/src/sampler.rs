//! How a token is chosen from logits: the definition, and its CPU reference.
//!
//! Owns the meaning of [`SamplingParams`]. Every executor must choose the same token from the same logits, so everything
//! below is exact: where floating point is used, the operations and their order are given ([`random`]), and sums are of
//! integers, so that their order does not matter. The device twin is `compiler/device/random.cuh`;
//! `sampling.cuh` beside it comes to the same token by a shorter way. It must not know
//! stop tokens, batches or where logits come from.
//!
//! # Definition
//!
//! `l[i]` is the f32 logit of token `i`. NaN counts as −∞; −0 equals +0.
//!
//! **Greedy**, where the temperature is 0: the token of the largest logit.
//!
//! **Sampling** otherwise. With `r = 1 / temperature`, rounded to f32, the scaled logits are `s[i] = l[i] * r` in f32.
//! 1. *Top-k* (0 is off) keeps the tokens whose logit is at least the k-th largest one, duplicates counted.
//! 2. *Top-p* (1 is off) keeps, of those left, the tokens whose logit is at least `v`: the largest logit such that the
//!    tokens of logit `v` and above have weights that sum to at least `ceil(p * total)`. A token's weight is the integer
//!    [`random::weight`]`(s[i] - max s)`, which is `floor(2^32 e^(s[i] - max s))`; 2^32 for the largest itself. `total`
//!    is the sum over the tokens that top-k left. The product and its ceiling are in f64: `total` is below 2^53.
//! 3. Of the tokens left, the one with the largest `s[i] + g[i]` in f32, where `g[i]` is [`random::gumbel`] of the random
//!    bits for seed, sequence, position and `i`. With Gumbel noise `g` that is a draw from softmax(s) over the tokens
//!    left (Gumbel 1954; Maddison et al., "A* Sampling", 2014), and needs no normalization.
//!
//! Ties go to the lowest token id in both, and tokens as likely as the last one kept are all kept. Where no logit is
//! above −∞ the token is 0.
//!
//! A token thus depends on its logits, the parameters, and three numbers: the caller's seed, the sequence's index among
//! those of the same seed, and the position that the token will take in its sequence. Nothing depends on the batch.

pub mod random;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

/// The lowest temperature other than 0. Below it, `1 / temperature` would make ordinary logits overflow.
pub const MIN_TEMPERATURE: f32 = 1e-4;
/// The highest temperature; the distribution is uniform long before.
pub const MAX_TEMPERATURE: f32 = 1e4;

/// How tokens are chosen. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 for greedy, else [`MIN_TEMPERATURE`] to [`MAX_TEMPERATURE`].
    pub temperature: f32,
    /// How many of the likeliest tokens to choose from; 0 for all.
    pub top_k: u32,
    /// Probability, above 0 and up to 1, that the likeliest tokens chosen from must have together; 1 for all.
    pub top_p: f32,
    /// Where the random numbers come from: equal seeds give equal tokens.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
        }
    }
}

/// Which parameter is out of range.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// The temperature is negative, not finite, or out of range.
    #[error(
        "temperature is {0}, but must be 0 (greedy) or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}; 0.7 is a common choice"
    )]
    Temperature(f32),
    /// `top_p` is no probability, or 0.
    #[error("top_p is {0}, but must be above 0 and at most 1; use 1 to choose from all tokens")]
    TopP(f32),
}

impl SamplingParams {
    /// Checks every parameter against its range.
    ///
    /// # Errors
    /// [`SamplingError`] names the first parameter out of range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let sampled = (MIN_TEMPERATURE..=MAX_TEMPERATURE).contains(&self.temperature);
        if !sampled && self.temperature != 0.0 {
            return Err(SamplingError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplingError::TopP(self.top_p));
        }
        Ok(())
    }

    /// Whether the likeliest token is taken, without randomness.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Checks the parameters and makes them ready for use.
    ///
    /// # Errors
    /// Those of [`SamplingParams::validate`].
    pub fn sampler(self) -> Result<Sampler, SamplingError> {
        self.validate()?;
        Ok(Sampler {
            params: self,
            inverse_temperature: if self.is_greedy() {
                0.0
            } else {
                1.0 / self.temperature
            },
        })
    }
}

/// Chooses tokens by parameters that are known to be valid; made by [`SamplingParams::sampler`].
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    params: SamplingParams,
    inverse_temperature: f32,
}

impl Sampler {
    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// `r` of the definition; 0 for greedy.
    pub fn inverse_temperature(&self) -> f32 {
        self.inverse_temperature
    }

    /// Chooses a token from `logits` (one per token id, f32) for `position` of `sequence`; 0 where `logits` is empty.
    pub fn sample(&self, logits: &[f32], sequence: u32, position: u32) -> u32 {
        if self.params.is_greedy() {
            return argmax(logits.iter().map(|logit| order_key(*logit)));
        }
        let cutoff = self.cutoff(logits);
        let stream = random::stream_key(self.params.seed, sequence, position);
        argmax((0u32..).zip(logits).map(|(token, logit)| {
            if order_key(*logit) < cutoff {
                // Below every kept score: those are at least the key of −∞.
                return 0;
            }
            order_key(self.scaled(*logit) + random::gumbel(random::random_bits(stream, token)))
        }))
    }

    /// The key of the smallest logit that top-k and top-p keep; 0 where they keep all.
    fn cutoff(&self, logits: &[f32]) -> u32 {
        let mut cutoff = 0;
        if self.params.top_k > 0 {
            let counts: Vec<(u32, u64)> =
                logits.iter().map(|logit| (order_key(*logit), 1)).collect();
            cutoff = largest_key(&counts, u64::from(self.params.top_k));
        }
        if self.params.top_p < 1.0 {
            let max = logits
                .iter()
                .map(|logit| self.scaled(*logit))
                .fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<(u32, u64)> = logits
                .iter()
                .map(|logit| (order_key(*logit), scaled_weight(self.scaled(*logit), max)))
                .filter(|(key, _)| *key >= cutoff)
                .collect();
            let total: u64 = weights.iter().map(|(_, weight)| weight).sum();
            // Exact conversions: a vocabulary of 2^20 tokens of weight 2^32 is below 2^53.
            let target = (f64::from(self.params.top_p) * total as f64).ceil() as u64;
            cutoff = cutoff.max(largest_key(&weights, target));
        }
        cutoff
    }

    /// `s` of the definition, NaN already −∞.
    fn scaled(&self, logit: f32) -> f32 {
        if logit.is_nan() {
            f32::NEG_INFINITY
        } else {
            logit * self.inverse_temperature
        }
    }
}

/// Weight of a scaled logit; two infinities of one sign are equal, though their difference is NaN.
fn scaled_weight(scaled: f32, max: f32) -> u64 {
    random::weight(if scaled == max { 0.0 } else { scaled - max })
}

/// The largest `v` such that the entries of key `v` and above have values that sum to at least `target`; 0 where all
/// together do not. By bisection over the bits, as a GPU does it: nothing is sorted.
fn largest_key(entries: &[(u32, u64)], target: u64) -> u32 {
    let mut found = 0;
    for bit in (0..u32::BITS).rev() {
        let candidate = found | 1 << bit;
        let sum: u64 = entries
            .iter()
            .filter(|(key, _)| *key >= candidate)
            .map(|(_, value)| value)
            .sum();
        if sum >= target {
            found = candidate;
        }
    }
    found
}

/// An integer that orders as the number does: −∞ and NaN lowest (0x007fffff), −0 and +0 equal.
pub fn order_key(value: f32) -> u32 {
    let value = if value.is_nan() {
        f32::NEG_INFINITY
    } else {
        value
    };
    // −0 + 0 is +0.
    let bits = (value + 0.0).to_bits();
    if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    }
}

/// Index of the largest key, the lowest where several are; 0 where there are none.
fn argmax(keys: impl Iterator<Item = u32>) -> u32 {
    let mut best = (0, 0);
    for (index, key) in (0u32..).zip(keys) {
        if key > best.1 {
            best = (index, key);
        }
    }
    best.0
}
