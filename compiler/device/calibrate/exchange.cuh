// What an exchange takes, by the words a CTA reads: from the moment it has published its own until all of its threads
// have what they wait for. Between two exchanges a CTA uses up some pages of the stream, or none where nothing streams.
#pragma once
#include "calibrate/common.cuh"
#include "exchange.cuh"

namespace mirage {

// R: the ring that streams beside it. kWords: words of the producers together, and of each an equal share.
template <class Mesh, class R, int kWords>
MIRAGE_DEVICE void measure_exchange(const Calibration& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  if (begin_calibration<R>(shared)) {
    if (p.pages > 0) produce<R>(p, shared, ~0ull, threadIdx.x % kWarp);
    return;
  }
  RingReader<R> ring = reader_of<R>(shared);
  const Place at = place_of_this_thread<Mesh>();
  const int each = ceil_div(kWords, static_cast<int>(p.producers));
  const int first = at.cta / static_cast<int>(p.producers) * static_cast<int>(p.producers);
  uint64_t publishing = 0, waiting = 0;
  uint32_t seen = 0;
#pragma unroll 1
  for (uint32_t round = 0; round < p.rounds; round++) {
    const uint32_t epoch = p.epoch + round + 1;
#pragma unroll 1
    for (uint32_t page = 0; page < p.pages; page++) {
      const uint4* tiles = reinterpret_cast<const uint4*>(ring.take());
#pragma unroll
      for (int i = 0; i < R::kPageBytes / 16 / kConsumers; i++) seen ^= tiles[i * kConsumers + at.thread].x;
      ring.release(at.lane);
    }
    sync_consumers();
    // Two areas in turns: who has heard from all in this round knows that all have read the round before the last.
    uint4* words = p.exchange + round % 2 * kWords * 2 * Mesh::kCtas;
    const uint64_t begin = clock_of_sm();
#pragma unroll 1
    for (int i = at.thread; i < each; i += kConsumers)
      store_word(words + at.cta * each + i, round, round, round, epoch);
    const uint64_t published = clock_of_sm();
    constexpr int kOfThread = ceil_div(kWords, kConsumers), kBatch = batch_of(kOfThread, kWordsInFlight);
#pragma unroll 1
    for (int b = 0; b < kOfThread; b += kBatch) {
      int from[kBatch];
      uint4 got[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int word = (b + i) * kConsumers + at.thread;
        from[i] = word < kWords ? first * each + word : -1;
      }
      await_words(got, words, from, epoch);
#pragma unroll
      for (int i = 0; i < kBatch; i++) seen ^= got[i].x ^ got[i].y ^ got[i].z;
    }
    sync_consumers();
    publishing += published - begin;
    waiting += clock_of_sm() - published;
  }
  if (at.thread == 0) {
    storage_of<R>(shared).stop = 1;
    // What was read counts for nothing, but must have been read.
    p.clocks[at.cta * kClocks] = publishing + (seen == 0x12345678u ? 1 : 0);
    p.clocks[at.cta * kClocks + 1] = waiting;
  }
}

// A barrier over the grid.
template <class Mesh>
MIRAGE_DEVICE void measure_barrier(const Calibration& p) {
  typedef UsualRing R;
  extern __shared__ __align__(128) uint8_t shared[];
  if (begin_calibration<R>(shared)) return;
  const Params params = {};
  Context<R> x = calibration_context<R>(params, place_of_this_thread<Mesh>(), shared);
  const uint64_t begin = clock_of_sm();
#pragma unroll 1
  for (uint32_t round = 0; round < p.rounds; round++) grid_barrier<Mesh>(x, p.exchange, p.epoch + round + 1);
  if (x.at.thread == 0) p.clocks[x.at.cta * kClocks] = clock_of_sm() - begin;
}

}  // namespace mirage
