// What the calibration's kernels share: their parameter, their ring, and how a CTA keeps time.
// They are built from the headers of the megakernel, so that what is measured is what runs.
#pragma once
#include "context.cuh"
#include "grid.cuh"
#include "linear.cuh"

namespace mirage {

// The one parameter of every kernel here. The Rust twin is mirage_calibrate::bench::Params.
struct Calibration {
  const uint8_t* stream;   // what the producer warps read, bytes_per_cta for each CTA
  uint64_t bytes_per_cta;  // a multiple of every page's bytes
  uint4* exchange;
  uint64_t* clocks;    // [ctas, kClocks], added up over the rounds
  uint32_t epoch;      // every epoch of this launch is above this one
  uint32_t rounds;     // repetitions of what is measured
  uint32_t producers;  // CTAs whose words an exchange reads: those of a reader's group, or all
  uint32_t pages;      // pages a CTA uses up between two exchanges; 0: no weights stream
};

// A ring at the beginning of shared memory. kRingBytes, as the GPU has room for, kSharedBytes, and kClocks,
// which a CTA may tell, come from the compiler (calibration.rs).
template <int kBytes, int kMost>
struct CalibrationRing {
  static constexpr int kPageBytes = kBytes, kPages = kRingBytes / kBytes, kInFlight = kMost, kHeadInFlight = kMost;
};
typedef CalibrationRing<16 * 1024, 2> UsualRing;

template <class R>
MIRAGE_DEVICE uint8_t* pages_of(uint8_t* shared) {
  return shared;
}
template <class R>
MIRAGE_DEVICE RingStorage<R>& storage_of(uint8_t* shared) {
  return *reinterpret_cast<RingStorage<R>*>(shared + kRingBytes);
}
template <class R>
MIRAGE_DEVICE RingReader<R> reader_of(uint8_t* shared) {
  return RingReader<R>{storage_of<R>(shared), pages_of<R>(shared)};
}

// Behind the ring and its barriers: what a linear multiplies and adds up in.
constexpr int kBarrierBytes = 1024, kColumnsBytes = 2048, kScratchBytes = 20 * 1024, kActivationBytes = 26 * 1024;
template <class R>
struct CalibrationShared {
  static constexpr int kColumns = kRingBytes + kBarrierBytes, kSumSquares = kColumns + kColumnsBytes,
                       kScratch = kSumSquares + 1024, kActivation = kScratch + kScratchBytes;
  static_assert(kActivation + kActivationBytes == kSharedBytes, "as the compiler says");
  static_assert(sizeof(RingStorage<R>) <= kBarrierBytes && sizeof(Columns) <= kColumnsBytes, "they overlap nothing");
};

MIRAGE_DEVICE uint64_t clock_of_sm() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}
MIRAGE_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// The producer warp: `count` pages of this CTA's part of the stream, from its beginning again where it ends; until the
// consumers stop.
template <class R>
MIRAGE_DEVICE void produce(const Calibration& p, uint8_t* shared, uint64_t count, int lane) {
  RingWriter<R> ring{storage_of<R>(shared), pages_of<R>(shared), lane};
  const uint8_t* begin = p.stream + blockIdx.x * p.bytes_per_cta;
  uint64_t at = 0;
#pragma unroll 1
  for (uint64_t i = 0; i < count; i++) {
    if (!ring.push(begin + at, R::kPageBytes, R::kInFlight)) break;
    at += R::kPageBytes;
    if (at == p.bytes_per_cta) at = 0;
  }
  ring.drain();
}

// Makes the ring of a CTA ready. True in the producer warp.
template <class R>
MIRAGE_DEVICE bool begin_calibration(uint8_t* shared) {
  if (threadIdx.x == 0) init_ring(storage_of<R>(shared));
  __syncthreads();
  return threadIdx.x / kWarp == kConsumerWarps;
}

// Nothing here draws tokens, turns heads or keeps the residual stream.
template <class R>
MIRAGE_DEVICE Context<R> calibration_context(const Params& params, const Place& at, uint8_t* shared) {
  typedef CalibrationShared<R> S;
  return Context<R>{params,
                    at,
                    reader_of<R>(shared),
                    *reinterpret_cast<Columns*>(shared + S::kColumns),
                    *reinterpret_cast<Draws*>(shared + S::kActivation),
                    reinterpret_cast<bf16*>(shared + S::kActivation),
                    reinterpret_cast<float*>(shared + S::kScratch),
                    reinterpret_cast<float*>(shared + S::kSumSquares),
                    nullptr,
                    nullptr};
}

}  // namespace mirage
