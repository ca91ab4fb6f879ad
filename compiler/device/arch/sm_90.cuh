// Hopper and later: pages of weights arrive by one bulk copy each, issued by one lane of the producer warp.
// The same interface as every other file in this folder.
#pragma once
#include "prelude.cuh"

namespace mirage {

// Arrivals that complete a page's `full` barrier: the issuing lane's; the copy's bytes are counted by hardware.
constexpr int kPageArrivals = 1;

// Makes freshly initialised barriers visible to whoever completes them, the copy engine included.
MIRAGE_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Orders this thread's reads and writes of memory before the pages that arrive in it later.
MIRAGE_DEVICE void fence_pages() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// True once the phase of parity `parity` is complete; may suspend the thread for a while before it says no.
MIRAGE_DEVICE bool test_barrier(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

// Called by all lanes of the producer warp. `bytes` is a multiple of 512. Weights are read once a step, so they are
// the first to leave L2, which then keeps the KV cache and the exchanges.
MIRAGE_DEVICE void fetch_page(void* page, const uint8_t* source, uint32_t bytes, uint64_t* full, int lane) {
  if (lane != 0) return;
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(full)), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(page)),
      "l"(source), "r"(bytes), "r"(shared_address(full)), "l"(policy)
      : "memory");
}

// Lets the next kernel of a chain start while this one runs; it waits in await_previous_kernel.
MIRAGE_DEVICE void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;"); }

// Waits until the kernels before this one have ended and their writes are visible.
MIRAGE_DEVICE void await_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace mirage
