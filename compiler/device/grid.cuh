// A barrier over the whole grid that also makes every CTA's earlier writes visible to every other.
#pragma once
#include "context.cuh"
#include "words.cuh"

namespace mirage {

// One word a CTA at `words`. All consumer threads of all CTAs call it with the same, new epoch, and all get CTA 0's
// note.
template <class Mesh, class R>
MIRAGE_DEVICE uint32_t grid_barrier(Context<R>& x, uint4* words, uint32_t epoch, uint32_t note = 0) {
  fence_gpu();
  sync_consumers();
  if (x.at.thread == 0) {
    fence_gpu();
    store_scalar(words + x.at.cta, note, epoch);
  }
  // Whoever came through early may have arrived at the next barrier by now: a later epoch is as good. CTA 0's note is
  // then lost, which is no loss: with a note it does not come back.
  for (int cta = x.at.thread; cta < Mesh::kCtas; cta += kConsumers) {
    Spin spin;
    uint4 word = load_word(words + cta);
    while (static_cast<int32_t>(word.w - epoch) < 0) {
      spin.turn();
      word = load_word(words + cta);
    }
    if (cta == 0) x.columns.note = word.w == epoch ? scalar_of(word) : 0;
  }
  fence_gpu();
  sync_consumers();
  return x.columns.note;
}

}  // namespace mirage
