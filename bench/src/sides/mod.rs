//! The engines that can be measured, behind [`Side`](crate::side::Side).
//!
//! Each file owns one engine's clock: what its times enclose stands there.

pub mod bandwidth;
pub mod cpu;
mod executor;
pub mod gpu;
pub mod per_op;
pub mod reference;

use mirage_runtime::sampler::SamplingParams;

use crate::side::Sampling;

/// Contexts are compiled in powers of two, so that runs with other prompts find their kernel in the cache.
fn compiled_context(needed: usize, of_model: usize) -> usize {
    needed.next_power_of_two().max(64).min(of_model.max(needed))
}

fn sampling(of: Sampling) -> SamplingParams {
    SamplingParams {
        temperature: of.temperature,
        top_k: 0,
        top_p: of.top_p,
        seed: of.seed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_rounded_up_within_the_model() {
        assert_eq!(compiled_context(650, 40960), 1024);
        assert_eq!(compiled_context(1500, 2000), 2000);
        assert_eq!(compiled_context(3, 2048), 64);
    }
}
