// Reads an array from end to end, as fast as the GPU streams: the ceiling of every decode step.
//
// Every thread has several 16-byte loads in flight that bypass L1. What was read is folded into one word that is
// written only where it is never equal, so that the loads cannot be left out.

struct Params {
  const uint4* data;
  unsigned long long vectors;
  unsigned* sink;
};

constexpr int kInFlight = 8;

__device__ __forceinline__ uint4 load(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

extern "C" __global__ void __launch_bounds__(512) stream_read(const Params params) {
  const unsigned long long threads = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
  unsigned long long at = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  unsigned folded = 0;
  for (; at + (kInFlight - 1) * threads < params.vectors; at += kInFlight * threads) {
    uint4 values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      values[i] = load(params.data + at + i * threads);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      folded |= values[i].x | values[i].y | values[i].z | values[i].w;
    }
  }
  for (; at < params.vectors; at += threads) {
    const uint4 value = load(params.data + at);
    folded |= value.x | value.y | value.z | value.w;
  }
  // The array is all zeros.
  if (folded != 0) {
    *params.sink = folded;
  }
}
