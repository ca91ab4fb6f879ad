// Random numbers and the exact arithmetic of sampling. The definition, with its reasons, is runtime/src/sampler.rs and
// runtime/src/sampler/random.rs; this is the same, operation by operation. Every result must equal the CPU's to the
// last bit, so nothing here may be contracted into a fused multiply-add or replaced by an approximate function: hence
// the intrinsics, which the compiler leaves alone. No intermediate result is subnormal.
#pragma once

namespace mirage {

// SplitMix64's increment: 2^64 / golden ratio, made odd.
constexpr uint64_t kSplitMixGamma = 0x9e3779b97f4a7c15ull;

// ln 2 in two parts. The first has 9 significant bits, so its product with a small integer is exact.
constexpr float kLn2High = 355.f / 512.f;
constexpr float kLn2Low = -2.1219444e-4f;

// SplitMix64's finalizer.
MIRAGE_DEVICE uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The generator's state for one position of one sequence: once per chosen token, not per logit.
MIRAGE_DEVICE uint64_t stream_key(uint64_t seed, uint32_t sequence, uint32_t position) {
  const uint64_t place = static_cast<uint64_t>(sequence) << 32 | position;
  return mix(mix(seed + kSplitMixGamma) ^ place);
}

// 32 random bits for `token`.
MIRAGE_DEVICE uint32_t random_bits(uint64_t stream, uint32_t token) {
  return static_cast<uint32_t>(mix(stream + (static_cast<uint64_t>(token) + 1) * kSplitMixGamma) >> 32);
}

// Natural logarithm of a positive normal number.
MIRAGE_DEVICE float exact_ln(float x) {
  constexpr uint32_t kTwoThirds = 0x3f2aaaabu;
  const int exponent = static_cast<int>(__float_as_uint(x) - kTwoThirds) >> 23;
  const float f = __fsub_rn(__uint_as_float(__float_as_uint(x) - (static_cast<uint32_t>(exponent) << 23)), 1.f);
  const float e = __int2float_rn(exponent);
  const float z = __fdiv_rn(f, __fadd_rn(2.f, f));
  const float q = __fmul_rn(z, z);
  float series = __fmul_rn(q, 1.f / 9.f);
  series = __fmul_rn(q, __fadd_rn(1.f / 7.f, series));
  series = __fmul_rn(q, __fadd_rn(1.f / 5.f, series));
  series = __fmul_rn(q, __fadd_rn(1.f / 3.f, series));
  const float two_z = __fmul_rn(2.f, z);
  const float ln_m = __fadd_rn(two_z, __fmul_rn(two_z, series));
  return __fadd_rn(__fmul_rn(e, kLn2High), __fadd_rn(ln_m, __fmul_rn(e, kLn2Low)));
}

// Random bits as standard Gumbel noise, -ln(-ln(1 - v)) with v uniform in (0, 1); always finite.
MIRAGE_DEVICE float gumbel(uint32_t bits) {
  constexpr float kTwoToMinus32 = 1.f / 4294967296.f;
  constexpr float kBelowOne = 1.f - 1.f / 16777216.f;
  const float rounded = __fmul_rn(__fadd_rn(__uint2float_rn(bits), 0.5f), kTwoToMinus32);
  const float v = rounded < kBelowOne ? rounded : kBelowOne;
  const float u = __fsub_rn(1.f, v);
  const float exponential = u == 1.f ? v : __fdiv_rn(__fmul_rn(v, exact_ln(u)), __fsub_rn(u, 1.f));
  return -exact_ln(exponential);
}

// floor(2^32 e^d) for d <= 0; 0 below -23 and for NaN. Pass 0 for the largest scaled logit itself, also an infinite
// one.
MIRAGE_DEVICE uint64_t sample_weight(float d) {
  if (!(d >= -23.f)) return 0;
  const int n = __float2int_rn(__fmul_rn(d, 1.44269504f));
  const float e = __int2float_rn(n);
  const float r = __fsub_rn(__fsub_rn(d, __fmul_rn(e, kLn2High)), __fmul_rn(e, kLn2Low));
  float power = 1.f / 5040.f;
  power = __fadd_rn(1.f / 720.f, __fmul_rn(r, power));
  power = __fadd_rn(1.f / 120.f, __fmul_rn(r, power));
  power = __fadd_rn(1.f / 24.f, __fmul_rn(r, power));
  power = __fadd_rn(1.f / 6.f, __fmul_rn(r, power));
  power = __fadd_rn(1.f / 2.f, __fmul_rn(r, power));
  power = __fadd_rn(1.f, __fmul_rn(r, power));
  power = __fadd_rn(1.f, __fmul_rn(r, power));
  const float scale = __uint_as_float(static_cast<uint32_t>(n + 32 + 127) << 23);
  return __float2ull_rz(__fmul_rn(power, scale));
}

// An integer that orders as the number does: -inf and NaN lowest (0x007fffff), -0 and +0 equal.
MIRAGE_DEVICE uint32_t order_key(float value) {
  const float number = value != value ? -__uint_as_float(0x7f800000u) : value;
  const uint32_t bits = __float_as_uint(__fadd_rn(number, 0.f));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The number of a key; NaN for 0, which is no number's.
MIRAGE_DEVICE float number_of_key(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

}  // namespace mirage
