// The ring of pages through which a CTA's weights stream: one producer warp fills it, eight consumer warps empty it.
// The order of pages is fixed at compile time on both sides; nothing here knows what a page holds.
#pragma once
#include "arch.cuh"
#include "prelude.cuh"
#include "trace.cuh"

namespace mirage {

// R: kPages, kPageBytes, kInFlight and kHeadInFlight (pages asked for and not yet arrived, at most, in the layers and
// in the head).
template <class R>
struct RingStorage {
  uint64_t full[R::kPages];
  uint64_t empty[R::kPages];
  // Completes when the consumers leave the memory of the pages to the ring, where something else lies there at first.
  uint64_t handed_over;
  // Set by the consumers when no further step follows; the producer then takes back what it asked for too much.
  volatile uint32_t stop;
};

template <class R>
MIRAGE_DEVICE void init_ring(RingStorage<R>& storage) {
  for (int i = 0; i < R::kPages; i++) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&storage.full[i])), "r"(kPageArrivals));
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&storage.empty[i])), "r"(kConsumerWarps));
  }
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&storage.handed_over)), "r"(kConsumerWarps));
  storage.stop = 0;
  publish_barriers();
}

// Of all consumers: nobody looks any more at what lies where the ring's pages will be.
template <class R>
MIRAGE_DEVICE void hand_over(RingStorage<R>& storage, int lane) {
  fence_pages();
  __syncwarp();
  if (lane == 0)
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&storage.handed_over)) : "memory");
}

// Position in the ring: a page and the parity of its current phase.
template <class R>
struct RingCursor {
  int page = 0;
  uint32_t parity = 0;
  MIRAGE_DEVICE void advance() {
    if (++page == R::kPages) {
      page = 0;
      parity ^= 1;
    }
  }
};

// One of the eight consumer warps' view. Every warp must take and release every page.
template <class R>
struct RingReader {
  RingStorage<R>& storage;
  const uint8_t* pages;
  RingCursor<R> at;
  Stopwatch waited;

  // Waits for the next page and returns its bytes.
  MIRAGE_DEVICE const uint8_t* take() {
    Spin spin;
    waited.start();
    while (!test_barrier(&storage.full[at.page], at.parity)) spin.turn();
    waited.stop();
    return pages + at.page * R::kPageBytes;
  }
  MIRAGE_DEVICE void release(int lane) {
    __syncwarp();
    if (lane == 0)
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&storage.empty[at.page])) : "memory");
    at.advance();
  }
};

// The producer warp's view; all its lanes call push together.
template <class R>
struct RingWriter {
  RingStorage<R>& storage;
  uint8_t* pages;
  int lane;
  RingCursor<R> at;
  // The oldest page that is asked for and was not seen to arrive, and how many there are.
  RingCursor<R> oldest;
  int in_flight = 0;
  bool first_round = true;

  MIRAGE_DEVICE void await_oldest() {
    Spin spin;
    while (!test_barrier(&storage.full[oldest.page], oldest.parity)) spin.turn();
    oldest.advance();
    in_flight--;
  }

  // Asks for the next page once fewer than `most` are in flight. False when the consumers have stopped instead of
  // making room.
  MIRAGE_DEVICE bool push(const uint8_t* source, uint32_t bytes, int most) {
    // No limit to the turns: a CTA without a part of the layers waits here for the whole prefill. What waits elsewhere
    // has one. All lanes decide alike.
    if (!first_round)
      while (!__all_sync(~0u, test_barrier(&storage.empty[at.page], at.parity ^ 1)))
        if (__any_sync(~0u, storage.stop)) return false;
    // Too many requests in flight make every exchange wait behind the stream.
    while (in_flight >= most) await_oldest();
    fetch_page(pages + at.page * R::kPageBytes, source, bytes, &storage.full[at.page], lane);
    in_flight++;
    at.advance();
    if (at.page == 0) first_round = false;
    return true;
  }

  // Waits until the consumers have handed the pages over. False when they have stopped instead.
  MIRAGE_DEVICE bool await_hand_over() {
    while (!__all_sync(~0u, test_barrier(&storage.handed_over, 0)))
      if (__any_sync(~0u, storage.stop)) return false;
    return true;
  }

  // No copy may land in the shared memory of a CTA that has gone.
  MIRAGE_DEVICE void drain() {
    while (in_flight > 0) await_oldest();
  }
};

}  // namespace mirage
