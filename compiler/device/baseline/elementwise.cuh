// SiLU, product and sum, element by element. `vectors` 16-byte vectors, one for each thread.
#pragma once

#include "common.cuh"

namespace mirage {

struct ElementwiseParams {
  const bf16_t* a;
  const bf16_t* b;  // unused by SiLU
  bf16_t* out;
  uint64_t vectors;
};

template <typename Function>
MIRAGE_DEVICE void elementwise(const ElementwiseParams& p, bool binary, Function function) {
  const uint64_t index = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.vectors) return;
  float a[kVector], b[kVector] = {}, out[kVector];
  unpack(load(p.a, index), a);
  if (binary) unpack(load(p.b, index), b);
#pragma unroll
  for (uint32_t i = 0; i < kVector; ++i) out[i] = function(a[i], b[i]);
  store(p.out, index, pack(out));
}

extern "C" __global__ void silu(const ElementwiseParams p) {
  elementwise(p, false, [](float a, float) { return a / (1.f + __expf(-a)); });
}

extern "C" __global__ void mul(const ElementwiseParams p) {
  elementwise(p, true, [](float a, float b) { return a * b; });
}

extern "C" __global__ void add(const ElementwiseParams p) {
  elementwise(p, true, [](float a, float b) { return a + b; });
}

}  // namespace mirage
