// Ampere and Ada: pages of weights arrive by cp.async of the whole producer warp.
// The interface every file in this folder has: kPageArrivals, publish_barriers, fence_pages, test_barrier, fetch_page,
// allow_next_kernel, await_previous_kernel.
#pragma once
#include "prelude.cuh"

namespace mirage {

// Arrivals that complete a page's `full` barrier: one of every producer lane.
constexpr int kPageArrivals = kWarp;

// Makes freshly initialised barriers visible to whoever completes them.
MIRAGE_DEVICE void publish_barriers() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

// Orders this thread's reads and writes of memory before the pages that arrive in it later.
MIRAGE_DEVICE void fence_pages() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }

// True once the phase of parity `parity` is complete.
MIRAGE_DEVICE bool test_barrier(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

// Called by all lanes of the producer warp. `bytes` is a multiple of 512.
MIRAGE_DEVICE void fetch_page(void* page, const uint8_t* source, uint32_t bytes, uint64_t* full, int lane) {
  const uint32_t to = shared_address(page);
  for (uint32_t at = lane * 16; at < bytes; at += kWarp * 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(source + at) : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(full)) : "memory");
}

// Here a kernel of a chain starts only once the one before it has ended: there is nothing to allow or to wait for.
MIRAGE_DEVICE void allow_next_kernel() {}
MIRAGE_DEVICE void await_previous_kernel() {}

}  // namespace mirage
