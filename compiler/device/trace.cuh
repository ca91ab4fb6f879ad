// The timeline: when a CTA passed which mark. It is there only in kernels compiled with MIRAGE_TRACE; in all others its
// types are empty and its calls vanish.
// Owns the record of a mark; what marks mean in a step is told by their order (runtime::megakernel::timeline).
#pragma once
#include "prelude.cuh"

namespace mirage {

// The Rust twin is runtime::megakernel::timeline::NAMES.
enum class Mark : uint32_t {
  kNone,
  kPrefillStep,  // a step begins
  kDecodeStep,
  kPhase,       // a phase of a layer begins
  kCollected,   // attention: q, k and v are there
  kPrepared,    // attention: normed and turned
  kAttended,    // attention: a task's scores and sums are done
  kMultiplied,  // a pass of a linear is done, but for its epilogue
  kHead,        // the layers are done
  kLogits,      // this CTA's logits are done
  kCandidates,  // every CTA's are
  kChosen,      // the step's tokens are known
};

#ifdef MIRAGE_TRACE
MIRAGE_DEVICE uint32_t clock_now() {
  uint32_t now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

// Adds up what a thread has waited for pages.
struct Stopwatch {
  uint32_t begin = 0, sum = 0;
  MIRAGE_DEVICE void start() { begin = clock_now(); }
  MIRAGE_DEVICE void stop() { sum += clock_now() - begin; }
};

// One CTA's events, {clock, mark + 16 * clocks waited for pages since the last mark}; written by its first thread.
struct Trace {
  uint2* next = nullptr;
  uint2* end = nullptr;
  MIRAGE_DEVICE void mark(Mark mark, Stopwatch& waited) {
    if (next == end) return;
    *next++ = make_uint2(clock_now(), static_cast<uint32_t>(mark) + 16 * waited.sum);
    waited.sum = 0;
  }
};
#else
struct Stopwatch {
  MIRAGE_DEVICE void start() {}
  MIRAGE_DEVICE void stop() {}
};
struct Trace {
  MIRAGE_DEVICE void mark(Mark, Stopwatch&) {}
};
#endif

}  // namespace mirage
