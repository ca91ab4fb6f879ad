// The rate of the weights' stream: every CTA takes its pages and does nothing with them. The host keeps the time; the
// first CTA tells how many clocks and nanoseconds it took, which gives the SM's clock.
#pragma once
#include "calibrate/common.cuh"

namespace mirage {

template <class R>
MIRAGE_DEVICE void measure_stream(const Calibration& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % kWarp;
  const uint64_t pages = p.rounds * (p.bytes_per_cta / R::kPageBytes);
  const uint64_t clock = clock_of_sm(), time = nanoseconds();
  if (begin_calibration<R>(shared)) return produce<R>(p, shared, pages, lane);
  RingReader<R> ring = reader_of<R>(shared);
#pragma unroll 1
  for (uint64_t i = 0; i < pages; i++) {
    ring.take();
    ring.release(lane);
  }
  if (threadIdx.x == 0) {
    p.clocks[blockIdx.x * kClocks] = clock_of_sm() - clock;
    p.clocks[blockIdx.x * kClocks + 1] = nanoseconds() - time;
  }
}

}  // namespace mirage
