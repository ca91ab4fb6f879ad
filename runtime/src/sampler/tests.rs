//! The arithmetic against f64 and against values from the device twin; the kept sets against sorting; the draws against
//! softmax by chi-square. Seeds are fixed, so a test that passes once passes always.

mod ahead;

use std::cmp::Ordering;

use super::random::{gumbel, random_bits, stream_key, weight};
use super::*;

fn sampler(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> Sampler {
    SamplingParams {
        temperature,
        top_k,
        top_p,
        seed,
    }
    .sampler()
    .unwrap()
}

/// A stream of numbers for inputs, independent of what is tested only in its seed.
fn noise(seed: u64, count: u32) -> impl Iterator<Item = f32> {
    (0..count).map(move |i| (random_bits(seed, i) >> 8) as f32 / 16_777_216.0)
}

#[test]
fn generator_is_splitmix64() {
    // The published outputs of SplitMix64 from state 1234567, upper halves.
    let expect = [
        6457827717110365317u64,
        3203168211198807973,
        9817491932198370423,
    ];
    for (token, output) in (0..).zip(expect) {
        assert_eq!(u64::from(random_bits(1234567, token)), output >> 32);
    }
    assert_eq!(stream_key(1, 2, 3), 0x6440_369f_b028_3683);
}

/// Sums over 65536 inputs, as computed by random.cuh compiled as C++ for the host.
#[test]
fn equals_the_device_twin_bit_for_bit() {
    let inputs = 0..65536u32;
    let noise: u64 = inputs
        .clone()
        .map(|i| u64::from(gumbel(i.wrapping_mul(65537)).to_bits()))
        .sum();
    let weights: u64 = inputs.clone().map(|i| weight(i as f32 / -2048.0)).sum();
    let bits: u64 = inputs
        .map(|i| u64::from(random_bits(stream_key(i.into(), i * 3, i * 7), i * 11)))
        .sum();
    assert_eq!(
        (noise, weights, bits),
        (121176490425880, 8798240663255, 140650182077937)
    );
    assert_eq!(gumbel(0).to_bits(), 0x41b6_fda9, "the largest noise");
    assert_eq!(gumbel(u32::MAX).to_bits(), 0xc033_f049, "the smallest");
}

#[test]
fn gumbel_is_accurate_where_it_can_win() {
    for bits in (0..=u32::MAX).step_by(65_521) {
        let v = (f64::from(bits) + 0.5) / 2f64.powi(32);
        let exact = -(-(-v).ln_1p()).ln();
        let tolerance = if exact > -2.0 { 1e-5 } else { 1e-2 };
        assert!(
            (f64::from(gumbel(bits)) - exact).abs() < tolerance,
            "{bits:#x}: {} {exact}",
            gumbel(bits)
        );
    }
}

#[test]
fn the_largest_noises_are_all_different() {
    // Among 2^17 tokens these win, and a tie would favour the lower id.
    assert!((0..1 << 16).map(gumbel).is_sorted_by(|a, b| a > b));
}

#[test]
fn weight_is_the_exponential_in_units_of_2_to_minus_32() {
    for step in 0..=23 * 1024 {
        let d = step as f32 / -1024.0;
        let exact = f64::from(d).exp() * 2f64.powi(32);
        assert!(
            (weight(d) as f64 - exact).abs() <= 1.0 + exact * 1e-6,
            "{d}: {} {exact}",
            weight(d)
        );
    }
    let limits = [0.0, -0.0, -23.01, f32::NEG_INFINITY, f32::NAN].map(weight);
    assert_eq!(limits, [1 << 32, 1 << 32, 0, 0, 0]);
}

#[test]
fn order_key_orders_as_numbers_do() {
    let ascending = [
        f32::NEG_INFINITY,
        f32::MIN,
        -1.0,
        -1e-45,
        0.0,
        1e-45,
        1.0,
        f32::MAX,
        f32::INFINITY,
    ];
    assert!(ascending.map(order_key).is_sorted_by(|a, b| a < b));
    assert_eq!(order_key(-0.0), order_key(0.0));
    for nan in [f32::NAN, -f32::NAN] {
        assert_eq!(order_key(nan), order_key(f32::NEG_INFINITY));
    }
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_id_of_equals() {
    let greedy = SamplingParams::default().sampler().unwrap();
    let check =
        |logits: &[f32], expect| assert_eq!(greedy.sample(logits, 0, 0), expect, "{logits:?}");
    check(&[1.0, 3.0, 2.0], 1);
    check(&[-2.0, -1.0, -1.0], 1);
    check(&[-0.0, 0.0], 0);
    check(&[f32::NAN, -5.0], 1);
    check(&[f32::NEG_INFINITY, f32::NEG_INFINITY], 0);
    check(&[0.0, f32::INFINITY, f32::INFINITY], 1);
    check(&[], 0);
}

/// The tokens that may be drawn.
fn kept(sampler: &Sampler, logits: &[f32]) -> Vec<usize> {
    let cutoff = sampler.cutoff(logits);
    (0..logits.len())
        .filter(|i| order_key(logits[*i]) >= cutoff)
        .collect()
}

/// The definition by sorting; logits must not be NaN.
fn kept_by_sorting(params: &SamplingParams, logits: &[f32]) -> Vec<usize> {
    let mut sorted: Vec<usize> = (0..logits.len()).collect();
    sorted.sort_by(|a, b| {
        logits[*b]
            .partial_cmp(&logits[*a])
            .unwrap_or(Ordering::Equal)
    });
    let extend_over_ties = |kept: &mut usize| {
        while *kept < sorted.len() && logits[sorted[*kept]] == logits[sorted[*kept - 1]] {
            *kept += 1;
        }
    };
    let mut kept = logits.len();
    if params.top_k > 0 {
        kept = kept.min(params.top_k as usize);
        extend_over_ties(&mut kept);
    }
    if params.top_p < 1.0 {
        let inverse = 1.0 / params.temperature;
        let weights: Vec<u64> = sorted[..kept]
            .iter()
            .map(|i| weight(logits[*i] * inverse - logits[sorted[0]] * inverse))
            .collect();
        let target = (f64::from(params.top_p) * weights.iter().sum::<u64>() as f64).ceil() as u64;
        let mut mass = 0;
        kept = 0;
        while mass < target {
            mass += weights[kept];
            kept += 1;
        }
        extend_over_ties(&mut kept);
    }
    let mut tokens = sorted[..kept].to_vec();
    tokens.sort_unstable();
    tokens
}

#[test]
fn kept_sets_equal_sorting() {
    for case in 0..200u64 {
        let count = 1 + (case * 7 % 60) as u32;
        // Every second case has few distinct logits, so that ties stand at the cutoff; among them -0 and +0.
        let logits: Vec<f32> = noise(case, count)
            .map(|u| {
                if case % 2 == 0 {
                    u * 12.0 - 6.0
                } else {
                    (u * 5.0 - 2.5).trunc() * 2.0
                }
            })
            .collect();
        for top_k in [0, 1, 3, 10, 1000] {
            for top_p in [1e-6, 0.3, 0.9, 0.999, 1.0] {
                for temperature in [0.2, 1.0, 3.0] {
                    let sampler = sampler(temperature, top_k, top_p, 0);
                    assert_eq!(
                        kept(&sampler, &logits),
                        kept_by_sorting(sampler.params(), &logits),
                        "{:?} {logits:?}",
                        sampler.params()
                    );
                }
            }
        }
    }
}

#[test]
fn kept_sets_of_odd_logits() {
    let check = |top_k, top_p, logits: &[f32], expect: &[usize]| {
        assert_eq!(
            kept(&sampler(1.0, top_k, top_p, 0), logits),
            expect,
            "{top_k} {top_p} {logits:?}"
        );
    };
    // Exactly half of the mass is reached by the first of two equals, but both are as likely.
    check(0, 0.5, &[1.0, 1.0], &[0, 1]);
    check(0, 0.5, &[1.0, f32::NAN, 0.0], &[0]);
    check(0, 0.9, &[f32::INFINITY, 0.0, f32::INFINITY], &[0, 2]);
    check(2, 1.0, &[5.0, f32::NEG_INFINITY, f32::NAN], &[0, 1, 2]);
    check(0, 0.9, &[f32::NEG_INFINITY; 2], &[0, 1]);
}

#[test]
fn draws_only_from_the_kept_set() {
    let logits = [0.0, 2.0, 1.9, -1.0, 1.8, f32::NEG_INFINITY, f32::NAN];
    for (sampler, allowed) in [
        (sampler(1.0, 3, 1.0, 5), &[1, 2, 4][..]),
        (sampler(1.0, 1, 1.0, 5), &[1]),
        (sampler(0.05, 0, 0.5, 5), &[1]),
    ] {
        let mut seen: Vec<u32> = (0..500)
            .map(|position| sampler.sample(&logits, 0, position))
            .collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, allowed, "{:?}", sampler.params());
    }
    let masked = sampler(10.0, 0, 1.0, 5);
    assert!(
        (0..2000).all(|position| masked.sample(&logits, 0, position) < 5),
        "a token of logit -inf is never drawn"
    );
}

/// Chi-square statistic of `counts` against the probabilities `expect`.
fn chi_square(counts: &[u32], expect: &[f64]) -> f64 {
    let total: u32 = counts.iter().sum();
    counts
        .iter()
        .zip(expect)
        .map(|(count, p)| {
            let mean = p * f64::from(total);
            (f64::from(*count) - mean).powi(2) / mean
        })
        .sum()
}

fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let powers: Vec<f64> = logits
        .iter()
        .map(|l| (f64::from(*l) / temperature).exp())
        .collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|p| p / sum).collect()
}

/// The 99.9 % points of the chi-square distribution with 7, 15 and 63 degrees of freedom.
const CHI_SQUARE_7: f64 = 24.3;
const CHI_SQUARE_15: f64 = 37.7;
const CHI_SQUARE_63: f64 = 103.4;

const LOGITS: [f32; 8] = [0.0, 1.0, -1.0, 2.5, 0.5, 2.4, -3.0, 1.7];

#[test]
fn draws_follow_softmax_along_every_coordinate() {
    for temperature in [0.7, 1.0, 2.0] {
        let expect = softmax(&LOGITS, f64::from(temperature));
        let draw = |seed, sequence, position| {
            sampler(temperature, 0, 1.0, seed).sample(&LOGITS, sequence, position)
        };
        let along: [(&str, &dyn Fn(u32) -> u32); 3] = [
            ("seed", &|i| draw(u64::from(i), 0, 0)),
            ("sequence", &|i| draw(7, i, 3)),
            ("position", &|i| draw(7, 3, i)),
        ];
        for (coordinate, draw) in along {
            let mut counts = [0; 8];
            (0..20_000).for_each(|i| counts[draw(i) as usize] += 1);
            let statistic = chi_square(&counts, &expect);
            assert!(
                statistic < CHI_SQUARE_7,
                "{coordinate} at {temperature}: {statistic} {counts:?}"
            );
        }
    }
}

#[test]
fn neighbouring_draws_are_independent() {
    let flat = [0.0; 8];
    let sampler = sampler(1.0, 0, 1.0, 11);
    for (what, sequence_step, position_step) in [("positions", 0, 1), ("sequences", 1, 0)] {
        let mut counts = [0; 64];
        for i in 0..20_000 {
            let first = sampler.sample(&flat, 1, i);
            let second = sampler.sample(&flat, 1 + sequence_step, i + position_step);
            counts[(first * 8 + second) as usize] += 1;
        }
        let statistic = chi_square(&counts, &[1.0 / 64.0; 64]);
        assert!(statistic < CHI_SQUARE_63, "{what}: {statistic}");
    }
}

#[test]
fn a_wide_flat_vocabulary_is_drawn_evenly() {
    let logits = vec![0.0; 32_768];
    let sampler = sampler(1.0, 0, 1.0, 3);
    let mut counts = [0; 16];
    (0..2_000)
        .for_each(|position| counts[sampler.sample(&logits, 0, position) as usize / 2048] += 1);
    let statistic = chi_square(&counts, &[1.0 / 16.0; 16]);
    assert!(statistic < CHI_SQUARE_15, "{statistic} {counts:?}");
}

#[test]
fn equal_inputs_give_equal_tokens_and_others_do_not() {
    let logits: Vec<f32> = noise(1, 100).collect();
    let tokens = |seed, sequence| -> Vec<u32> {
        let sampler = sampler(1.0, 50, 0.95, seed);
        (0..32)
            .map(|position| sampler.sample(&logits, sequence, position))
            .collect()
    };
    assert_eq!(tokens(1, 0), tokens(1, 0));
    assert_ne!(tokens(1, 0), tokens(2, 0));
    assert_ne!(tokens(1, 0), tokens(1, 1));
}

#[test]
fn parameters_out_of_range() {
    let check = |temperature, top_p, expect: &str| {
        let error = SamplingParams {
            temperature,
            top_p,
            ..SamplingParams::default()
        }
        .validate()
        .unwrap_err();
        assert_eq!(error.to_string(), expect);
    };
    for temperature in [-1.0, f32::NAN, f32::INFINITY, 1e-5, 1e5] {
        check(
            temperature,
            1.0,
            &format!(
                "temperature is {temperature}, but must be 0 (greedy) or from 0.0001 to 10000; 0.7 is a common choice"
            ),
        );
    }
    for top_p in [0.0, -0.5, 1.5, f32::NAN] {
        check(
            1.0,
            top_p,
            &format!(
                "top_p is {top_p}, but must be above 0 and at most 1; use 1 to choose from all tokens"
            ),
        );
    }
    for temperature in [0.0, MIN_TEMPERATURE, 0.7, MAX_TEMPERATURE] {
        SamplingParams {
            temperature,
            ..SamplingParams::default()
        }
        .validate()
        .unwrap();
    }
}
