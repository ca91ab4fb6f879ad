// What the baseline's kernels share: words, bf16 vectors, reductions. No CUDA headers: NVRTC bundles none.
//
// The kernels here are the per-op baseline, one launch for each operator of the unfused graph. Values are bf16 in
// memory, row after row, and f32 in registers. A row is one token of one sequence.
#pragma once

using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;

#define MIRAGE_DEVICE __device__ __forceinline__

namespace mirage {

using bf16_t = uint16_t;

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr uint32_t kWarp = 32;

// Elements of a 16-byte access, the unit of every load and store of values.
constexpr uint32_t kVector = 8;

MIRAGE_DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
MIRAGE_DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two numbers rounded to nearest even, the first in the lower half.
MIRAGE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

MIRAGE_DEVICE void unpack(const uint4& vector, float (&out)[kVector]) {
  const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    out[2 * i] = low_bf16(pairs[i]);
    out[2 * i + 1] = high_bf16(pairs[i]);
  }
}

MIRAGE_DEVICE uint4 pack(const float (&in)[kVector]) {
  return make_uint4(pack_bf16(in[0], in[1]), pack_bf16(in[2], in[3]), pack_bf16(in[4], in[5]), pack_bf16(in[6], in[7]));
}

// Vector `index` of values that start at a multiple of 16 bytes.
MIRAGE_DEVICE uint4 load(const bf16_t* values, uint64_t index) { return reinterpret_cast<const uint4*>(values)[index]; }
MIRAGE_DEVICE void store(bf16_t* values, uint64_t index, const uint4& vector) {
  reinterpret_cast<uint4*>(values)[index] = vector;
}

// Sum over `lanes` neighbouring lanes (a power of two, aligned), the same bits in each of them.
MIRAGE_DEVICE float lanes_sum(float value, uint32_t lanes) {
  for (uint32_t offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// Sum over a block of whole warps, the same bits in every thread. `scratch` may be used again after the next barrier.
MIRAGE_DEVICE float block_sum(float value, float (&scratch)[kWarp]) {
  const uint32_t warps = blockDim.x / kWarp;
  value = lanes_sum(value, kWarp);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  const uint32_t lane = threadIdx.x % kWarp;
  return lanes_sum(lane < warps ? scratch[lane] : 0.f, kWarp);
}

// Counts this block's arrival among `count`, after its writes to global memory; true in every thread of the last one,
// which then sees the writes of all, and resets the counter for the next launch.
MIRAGE_DEVICE bool is_last_block(uint32_t* arrived, uint32_t count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1u) == count - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace mirage
