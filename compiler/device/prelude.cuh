// What NVRTC does not bring along: fixed-width integers, bf16, the tensor-core instruction and small helpers.
// Owns no state and knows nothing of meshes, models or exchanges.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define MIRAGE_DEVICE __device__ __forceinline__

namespace mirage {

constexpr int kWarp = 32;
// A CTA has eight consumer warps, which compute, and one producer warp, which streams weights.
constexpr int kConsumerWarps = 8;
constexpr int kConsumers = kConsumerWarps * kWarp;
constexpr int kThreads = kConsumers + kWarp;

// bf16 is carried as its 16 bits; a pair as one 32-bit register with the lower index in the lower half.
typedef uint16_t bf16;

MIRAGE_DEVICE float to_float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
MIRAGE_DEVICE float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
MIRAGE_DEVICE float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Rounds to nearest even.
MIRAGE_DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
MIRAGE_DEVICE bf16 to_bf16(float v) { return static_cast<bf16>(pack(v, 0.f)); }

MIRAGE_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }

// A contiguous share of `total` things split over `parts`: the first `total % parts` shares hold one more.
// The same function stands in the compiler (program::share) and decides where every weight lies.
struct Share {
  int begin, count;
};
__host__ __device__ constexpr Share share_of(int total, int parts, int index) {
  const int each = total / parts, more = total % parts;
  // Said apart because the compiler does not know that an index is not negative.
  if (more == 0) return Share{index * each, each};
  return Share{index * each + min_of(index, more), each + (index < more ? 1 : 0)};
}

// Consumer warps only; the producer warp never takes part.
MIRAGE_DEVICE void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

MIRAGE_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

MIRAGE_DEVICE float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// silu(x) = x / (1 + e^-x)
MIRAGE_DEVICE float silu(float x) { return x / (1.f + __expf(-x)); }

// Orders this thread's earlier memory operations before its later ones, for the whole GPU.
MIRAGE_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// c += a * b with a 16x16 (row major), b 16x8 (column major), both bf16, c 16x8 in f32.
// Lane l holds of c: rows l/4 and l/4 + 8, columns 2*(l%4) and the next: {c[r][n], c[r][n+1], c[r+8][n], c[r+8][n+1]}.
MIRAGE_DEVICE void mma(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// The same with half the depth: a 16x8, b 8x8.
MIRAGE_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// Four 8x8 matrices of bf16 in shared memory, of which lane l has the address of row l % 8 of matrix l / 8: of each,
// the lane gets two elements of row l / 4, as an mma's B operand has them.
MIRAGE_DEVICE uint4 load_matrices(uint32_t row) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(row)
               : "memory");
  return v;
}

// Reads through L2 only: for data other SMs write while the kernel runs.
MIRAGE_DEVICE uint4 load_l2(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
MIRAGE_DEVICE float load_l2(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}

// A wait that outlasts every sane one is a fault of the program or of the machine: stop the kernel rather than hang.
constexpr uint32_t kSpinLimit = 1u << 23;
struct Spin {
  uint32_t left = kSpinLimit;
  MIRAGE_DEVICE void turn() {
    if (--left == 0) __trap();
  }
};

}  // namespace mirage
