//! What the megakernel's way of sampling rests on (`compiler/device/sampling.cuh`): the draw may come before the question
//! which tokens are kept, that question needs no threshold, and sums of floats answer it but for a known doubt.

use super::*;

fn cases() -> impl Iterator<Item = (Sampler, Vec<f32>)> {
    (0..300u64).map(|case| {
        let spread = [1.0, 6.0, 40.0][case as usize % 3];
        let logits = noise(case, 1 + (case * 7 % 200) as u32).map(|u| match case % 5 {
            // Few distinct logits, and some that can never win.
            0 => (u * 7.0 - 3.5).trunc() * 2.0,
            1 if u < 0.2 => f32::NEG_INFINITY,
            1 if u < 0.3 => f32::NAN,
            _ => (u - 0.5) * spread,
        });
        let (top_k, top_p) =
            [(0, 0.95), (5, 1.0), (20, 0.5), (0, 0.3), (0, 1.0)][case as usize / 5 % 5];
        let temperature = [0.3, 0.8, 1.0, 2.5, 1e4][case as usize % 5];
        (sampler(temperature, top_k, top_p, case), logits.collect())
    })
}

#[test]
fn the_draw_is_the_first_kept_token_in_the_order_of_all_scores() {
    for (sampler, logits) in cases() {
        let kept = kept(&sampler, &logits);
        for position in 0..20 {
            let stream = stream_key(sampler.params().seed, 3, position);
            let score = |token: usize| {
                let noise = gumbel(random_bits(stream, token as u32));
                order_key(sampler.scaled(logits[token]) + noise)
            };
            let mut tokens: Vec<usize> = (0..logits.len()).collect();
            // Stable: of equal scores the lowest token is first.
            tokens.sort_by_key(|token| std::cmp::Reverse(score(*token)));
            let first = tokens.into_iter().find(|token| kept.contains(token));
            assert_eq!(
                sampler.sample(&logits, 3, position) as usize,
                first.unwrap(),
                "{sampler:?} {logits:?}"
            );
        }
    }
}

/// Count and mass of the tokens with a larger logit, and the mass of all.
fn above(sampler: &Sampler, logits: &[f32], token: usize) -> (u64, u64, u64) {
    let max = logits
        .iter()
        .map(|logit| sampler.scaled(*logit))
        .fold(f32::NEG_INFINITY, f32::max);
    let (mut count, mut mass, mut total) = (0, 0, 0);
    for logit in logits {
        let weight = scaled_weight(sampler.scaled(*logit), max);
        total += weight;
        if *logit > logits[token] {
            count += 1;
            mass += weight;
        }
    }
    (count, mass, total)
}

#[test]
fn what_is_above_a_token_tells_whether_it_is_kept() {
    for (sampler, logits) in cases() {
        let params = *sampler.params();
        if params.top_k > 0 && params.top_p < 1.0 {
            continue; // the mass is of what top-k keeps
        }
        let kept = kept(&sampler, &logits);
        for token in 0..logits.len() {
            let (count, mass, total) = above(&sampler, &logits, token);
            let expect = if params.top_p < 1.0 {
                (mass as f64) < f64::from(params.top_p) * total as f64
            } else {
                params.top_k == 0 || count < u64::from(params.top_k)
            };
            // Of a token that can never win nobody asks, and -inf is above NaN here but not in the definition.
            if logits[token] > f32::NEG_INFINITY {
                assert_eq!(
                    kept.contains(&token),
                    expect,
                    "{sampler:?} {token} {logits:?}"
                );
            }
        }
    }
}

/// The sums of `kept.cuh`: CTAs add up their rows by lanes and warps in f32, and round to 16 digits.
fn sums(sampler: &Sampler, logits: &[f32], drawn: f32, ctas: usize, lanes: usize) -> [f32; 2] {
    let highest = logits
        .iter()
        .map(|logit| logit * sampler.inverse_temperature())
        .fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0f32; 2];
    for rows in logits.chunks(logits.len().div_ceil(ctas)) {
        let mut of_lanes = vec![[0f32; 2]; lanes];
        for (row, logit) in rows.iter().enumerate() {
            let below = (logit * sampler.inverse_temperature() - highest).max(-1024.0);
            let weight = (below * std::f32::consts::LOG2_E).exp2();
            let of_lane = &mut of_lanes[row % lanes];
            of_lane[0] += weight;
            of_lane[1] += if *logit > drawn { weight } else { 0.0 };
        }
        for i in 0..2 {
            let sum: f32 = of_lanes.iter().map(|of_lane| of_lane[i]).sum();
            sums[i] += f32::from_bits((sum.to_bits() + 0x80) >> 8 << 8);
        }
    }
    sums
}

#[test]
fn sums_of_floats_are_as_near_as_the_kernel_takes_them_for() {
    const VOCAB: usize = 151_936;
    const UNIT: f32 = 1.0 / (1 << 24) as f32;
    // SumError for a batch of one on 132 CTAs.
    let additions = 5 + 5 + 8 + 5 + 5;
    let error = VOCAB as f32 * UNIT / 256.0 + 4e-6 + (additions + 256) as f32 * UNIT;
    for (case, temperature, spread) in [
        (1, 1.0, 2.0),
        (2, 0.8, 30.0),
        (3, 0.05, 10.0),
        (4, 100.0, 1.0),
        // All but one of them weigh less than one unit of the definition's.
        (5, 0.05, 1.15),
    ] {
        let sampler = sampler(temperature, 0, 0.95, 0);
        let mut logits: Vec<f32> = noise(case, VOCAB as u32).map(|u| u * spread).collect();
        if case == 5 {
            logits.iter_mut().for_each(|logit| *logit = 0.0);
            logits[77] = spread;
        }
        for token in (0..VOCAB).step_by(19_001) {
            let (_, mass, total) = above(&sampler, &logits, token);
            let [ours_total, ours] = sums(&sampler, &logits, logits[token], 132, 256);
            let exact = |units: u64| units as f64 / 2f64.powi(32);
            let allowed = f64::from(error) * exact(total);
            for (ours, exact) in [(ours, exact(mass)), (ours_total, exact(total))] {
                assert!(
                    (f64::from(ours) - exact).abs() <= allowed,
                    "{case} {token}: {ours} {exact}"
                );
            }
        }
    }
}
