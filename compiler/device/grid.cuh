// A barrier over the whole grid that also makes every CTA's earlier writes visible to every other.
#pragma once
#include "context.cuh"
#include "words.cuh"

namespace mirage {

// One word a CTA at `words`. All consumer threads of all CTAs call it with the same, new epoch.
template <class Mesh, class R>
MIRAGE_DEVICE void grid_barrier(Context<R>& x, uint4* words, uint32_t epoch) {
  fence_gpu();
  sync_consumers();
  if (x.at.thread == 0) {
    fence_gpu();
    store_word(words + x.at.cta, 0, 0, 0, epoch);
  }
  for (int cta = x.at.thread; cta < Mesh::kCtas; cta += kConsumers) {
    const int from[1] = {cta};
    uint4 got[1];
    await_words(got, words, from, epoch);
  }
  fence_gpu();
  sync_consumers();
}

}  // namespace mirage
