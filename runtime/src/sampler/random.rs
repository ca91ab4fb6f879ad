//! Random numbers and the exact arithmetic of sampling.
//!
//! Owns the functions whose results must not differ between CPU and GPU by even a bit, because one bit decides between
//! two tokens. They use only operations that IEEE 754 rounds correctly (add, subtract, multiply, divide, conversions),
//! in the order written, never a fused multiply-add and never a library's `exp` or `ln`, whose last bits differ between
//! platforms. `compiler/device/random.cuh` repeats them line by line with the `__f*_rn` intrinsics; the tests here hold
//! both to the same values.
//!
//! The generator is counter-based: the bits for a token follow from (seed, sequence, position, token) alone, so the SMs
//! of a GPU need no shared state and any subset of tokens can be drawn in any order. It is SplitMix64 (Steele, Lea &
//! Flood, "Fast splittable pseudorandom number generators", 2014): `stream_key` derives a starting state for each place
//! in the text, and token `i` takes the upper half of that state's output `i`. A token costs three 64-bit multiplies.

/// SplitMix64's increment: 2^64 / golden ratio, made odd.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// ln 2 in two parts. The first has 9 significant bits, so its product with a small integer is exact.
const LN2_HIGH: f32 = 355.0 / 512.0;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// SplitMix64's finalizer: a bijection in which every input bit moves every output bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The generator's state for one position of one sequence.
pub fn stream_key(seed: u64, sequence: u32, position: u32) -> u64 {
    let place = u64::from(sequence) << 32 | u64::from(position);
    mix(mix(seed.wrapping_add(GAMMA)) ^ place)
}

/// 32 random bits for `token`: the upper half of SplitMix64's output number `token` from state `stream`.
pub fn random_bits(stream: u64, token: u32) -> u32 {
    let step = (u64::from(token) + 1).wrapping_mul(GAMMA);
    (mix(stream.wrapping_add(step)) >> 32) as u32
}

/// Random bits as standard Gumbel noise, `-ln(-ln u)`; from -2.81 to 22.88, always finite.
///
/// `u` is `1 - v` with `v = (bits + 1/2) / 2^32`, uniform in (0, 1). The likeliest winners have `u` close to 1, where
/// f32 has only 2^-24 to tell neighbours apart, far too few for a vocabulary of 2^17. So `v` is kept, which f32 resolves
/// finely near 0, and `-ln(1 - v)` taken by Kahan's formula for log1p, good to some units in the last place.
/// What rounding `v` costs shows only near `v = 1`, in noise below -2 that hardly ever wins.
pub fn gumbel(bits: u32) -> f32 {
    const TWO_TO_MINUS_32: f32 = 1.0 / 4_294_967_296.0;
    const BELOW_ONE: f32 = 1.0 - f32::EPSILON / 2.0;
    let rounded = (bits as f32 + 0.5) * TWO_TO_MINUS_32;
    let v = if rounded < BELOW_ONE {
        rounded
    } else {
        BELOW_ONE
    };
    let u = 1.0 - v;
    let exponential = if u == 1.0 { v } else { (v * ln(u)) / (u - 1.0) };
    -ln(exponential)
}

/// Natural logarithm of a positive normal number, good to some units in the last place.
///
/// `x = 2^e m` with m in [2/3, 4/3); with `z = (m - 1) / (m + 1)`, `ln m = 2 artanh z = 2 (z + z^3/3 + z^5/5 + ...)`,
/// where |z| is at most 1/5 and the first term left out is 2 z^11/11.
fn ln(x: f32) -> f32 {
    const TWO_THIRDS: u32 = 0x3f2a_aaab;
    let exponent = (x.to_bits().wrapping_sub(TWO_THIRDS) as i32) >> 23;
    let f = f32::from_bits(x.to_bits().wrapping_sub((exponent << 23) as u32)) - 1.0;
    let e = exponent as f32;
    let z = f / (2.0 + f);
    let q = z * z;
    let series = q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0))));
    let two_z = 2.0 * z;
    e * LN2_HIGH + ((two_z + two_z * series) + e * LN2_LOW)
}

/// `floor(2^32 e^d)` for `d` of at most 0, e^d computed in f32: 2^32 for 0, and 0 below -23 and for NaN.
///
/// `e^d = 2^n e^r` with n the integer nearest to `d / ln 2` (ties to even) and |r| at most ln(2)/2; e^r by its Taylor
/// series, whose first term left out is r^8/8!.
pub fn weight(d: f32) -> u64 {
    // 2^32 e^-23 is less than 1. Written so that NaN fails the test too.
    let positive = d >= -23.0;
    if !positive {
        return 0;
    }
    let n = (d * std::f32::consts::LOG2_E).round_ties_even();
    let r = (d - n * LN2_HIGH) - n * LN2_LOW;
    let mut power = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        1.0 / 2.0,
        1.0,
        1.0,
    ] {
        power = coefficient + r * power;
    }
    // 2^(32 + n) by its exponent bits; n is from -33 to 0.
    let scale = f32::from_bits(((n as i32 + 32 + 127) << 23) as u32);
    (power * scale) as u64
}
