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
  // Whoever came through early may have arrived at the next barrier by now: a later epoch is as good.
  for (int cta = x.at.thread; cta < Mesh::kCtas; cta += kConsumers) {
    Spin spin;
    while (static_cast<int32_t>(load_word(words + cta).w - epoch) < 0) spin.turn();
  }
  fence_gpu();
  sync_consumers();
}

}  // namespace mirage
