// Rotary position embedding, rotate-half form: element i of a head's first half turns with element i of its second.
// Sines and cosines come from a table made in f64. A thread turns eight pairs.
#pragma once

#include "common.cuh"

namespace mirage {

struct RopeParams {
  const bf16_t* input;
  bf16_t* out;
  const float2* turns;       // {cos, sin} of [position][pair]
  const uint32_t* position;  // of each row
  uint32_t rows;
  uint32_t heads;
  uint32_t half_vectors;  // of half a head
};

extern "C" __global__ void rope(const RopeParams p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t vector = thread % p.half_vectors, head = thread / p.half_vectors;  // head of all rows
  const uint32_t row = head / p.heads;
  if (row >= p.rows) return;
  const uint64_t first = static_cast<uint64_t>(head) * 2 * p.half_vectors + vector, second = first + p.half_vectors;
  float a[kVector], b[kVector], out_a[kVector], out_b[kVector];
  unpack(load(p.input, first), a);
  unpack(load(p.input, second), b);
  const uint64_t turn = (static_cast<uint64_t>(p.position[row]) * p.half_vectors + vector) * kVector;
  const float4* turns = reinterpret_cast<const float4*>(p.turns + turn);
#pragma unroll
  for (uint32_t i = 0; i < kVector; i += 2) {
    const float4 two = turns[i / 2];  // cos, sin, cos, sin
    out_a[i] = a[i] * two.x - b[i] * two.y;
    out_b[i] = b[i] * two.x + a[i] * two.y;
    out_a[i + 1] = a[i + 1] * two.z - b[i + 1] * two.w;
    out_b[i + 1] = b[i + 1] * two.z + a[i + 1] * two.w;
  }
  store(p.out, first, pack(out_a));
  store(p.out, second, pack(out_b));
}

}  // namespace mirage
