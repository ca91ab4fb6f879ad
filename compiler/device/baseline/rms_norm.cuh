// RMSNorm: x * gamma / sqrt(mean(x²) + eps), rounded once. Two shapes of it: wide groups, one block each, for the
// layer's norms; narrow ones, some lanes of a warp each, for the heads of q and k.
#pragma once

#include "common.cuh"

namespace mirage {

struct RmsNormParams {
  const bf16_t* input;
  const bf16_t* gamma;
  bf16_t* out;
  uint32_t groups;   // normed apart from each other
  uint32_t vectors;  // of a group
  float eps;
};

MIRAGE_DEVICE float sum_of_squares(const uint4& vector) {
  float x[kVector], sum = 0.f;
  unpack(vector, x);
#pragma unroll
  for (uint32_t i = 0; i < kVector; ++i) sum += x[i] * x[i];
  return sum;
}

MIRAGE_DEVICE uint4 scaled(const uint4& vector, const uint4& gamma, float scale) {
  float x[kVector], g[kVector];
  unpack(vector, x);
  unpack(gamma, g);
#pragma unroll
  for (uint32_t i = 0; i < kVector; ++i) x[i] = x[i] * scale * g[i];
  return pack(x);
}

MIRAGE_DEVICE float inverse_root(float sum, const RmsNormParams& p) {
  return 1.f / sqrtf(sum / static_cast<float>(p.vectors * kVector) + p.eps);
}

// One block of whole warps for each group.
extern "C" __global__ void rms_norm_wide(const RmsNormParams p) {
  __shared__ float scratch[kWarp];
  const uint64_t start = static_cast<uint64_t>(blockIdx.x) * p.vectors;
  float sum = 0.f;
  for (uint32_t i = threadIdx.x; i < p.vectors; i += blockDim.x) sum += sum_of_squares(load(p.input, start + i));
  const float scale = inverse_root(block_sum(sum, scratch), p);
  // Most groups have one vector for each thread, which is still in L1.
  for (uint32_t i = threadIdx.x; i < p.vectors; i += blockDim.x) {
    store(p.out, start + i, scaled(load(p.input, start + i), load(p.gamma, i), scale));
  }
}

// `vectors` lanes for each group: a power of two up to a warp.
extern "C" __global__ void rms_norm_narrow(const RmsNormParams p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t group = thread / p.vectors, lane = thread % p.vectors;
  const bool inside = group < p.groups;  // all lanes of a warp take part in the sums
  const uint64_t at = static_cast<uint64_t>(group) * p.vectors + lane;
  const uint4 vector = inside ? load(p.input, at) : make_uint4(0, 0, 0, 0);
  const float scale = inverse_root(lanes_sum(sum_of_squares(vector), p.vectors), p);
  if (inside) store(p.out, at, scaled(vector, load(p.gamma, lane), scale));
}

}  // namespace mirage
