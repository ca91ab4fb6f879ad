// Sampling by temperature, top-k and top-p without leaving the kernel.
//
// The definition (its CPU twin is runtime::sampler): keep the tokens whose logit is at least the k-th largest; of
// those, the smallest set of largest logits whose mass reaches top_p of the kept mass; the token is the kept one with
// the highest logit / temperature + Gumbel noise, which is an exact draw from the softmax over the kept tokens. Ties
// are kept.
//
// That is the first kept one of all tokens in the order of their scores. So the draw comes first: the head takes the
// best scores along (draws.cuh), the exchange of candidates tells the best of all CTAs (candidates.cuh), and one more
// exchange whether they are kept (kept.cuh). Only if that does not tell, the thresholds are found (radix.cuh) and the
// kept tokens drawn from. Both ways lead to the same token.
#pragma once
#include "kept.cuh"
#include "radix.cuh"

namespace mirage {

// Draws from the tokens that `floor` leaves to the open columns. `words`: {key of the score, token} of each column and
// CTA.
template <class H, int C, class Mesh, class R>
MIRAGE_DEVICE void draw_from_kept(Context<R>& x, const SamplingScratch<C>& s, uint4* words, uint32_t epoch) {
  typedef WarpsOfColumns<C> W;
  Choices<C>& choices = choices_of<C>(x);
  Draws& d = x.draws;
  const bool open = x.at.thread < C && choices.choice[x.at.thread] == kOpen;
  if (open) d.best[x.at.thread] = 0;
  sync_consumers();
#pragma unroll 1
  for (int i = 0; i < W::kColumns; i++) {
    uint64_t best = 0;
    each_logit_of<H, C, Mesh>(x, W::column(x.at, i), [&](int c, int token, float logit) {
      if (order_key(logit) < s.floor[c]) return;
      const float score = score_of(logit, d.inverse_temperature[c], random_bits(d.random[c], token));
      best = max(best, ranked(order_key(score), token));
    });
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) best = max(best, __shfl_xor_sync(~0u, best, o));
    if (x.at.lane == 0 && best != 0) atomicMax(&d.best[W::column(x.at, i)], best);
  }
  sync_consumers();
  if (open) {
    const uint64_t best = d.best[x.at.thread];
    store_pair(words + x.at.thread * Mesh::kCtas + x.at.cta, key_of(best), token_of(best), epoch);
  }
#pragma unroll 1
  for (int column = x.at.warp; column < C; column += kConsumerWarps) {
    if (choices.choice[column] != kOpen) continue;
    Ranking<Mesh> ranking;
    int from[Ranking<Mesh>::kCount];
    uint4 got[Ranking<Mesh>::kCount];
#pragma unroll
    for (int i = 0; i < Ranking<Mesh>::kCount; i++) {
      const int cta = i * kWarp + x.at.lane;
      from[i] = cta < Mesh::kCtas ? column * Mesh::kCtas + cta : -1;
    }
    await_words(got, words, from, epoch);
#pragma unroll
    for (int i = 0; i < Ranking<Mesh>::kCount; i++) {
      const uint2 pair = pair_of(got[i]);
      ranking.key[i] = pair.x;
      ranking.token[i] = pair.y;
    }
    const uint2 best = ranking.take_best([](int) {});
    if (x.at.lane == 0) choices.winners[column].token = best.y;
  }
  fence_gpu();
  sync_consumers();
}

// Chooses the tokens of the columns that candidates alone do not choose. Of each column and CTA there are two
// words at `sums` and one at `words`. Epochs of the barriers: `epoch` + 1 up to + 2 * kRadixLevels; Model::kStepEpochs
// leaves room for them.
template <class H, int C, class Mesh, class R>
MIRAGE_DEVICE void sample(Context<R>& x, uint4* sums, uint64_t* histograms, uint4* words, uint4* barrier,
                          uint32_t epoch) {
  if (any_is<C>(x, kDrawn)) ask_about_draws<H, C, Mesh>(x, sums, epoch);
  if (!any_is<C>(x, kOpen)) return;
  SamplingScratch<C>& s = *reinterpret_cast<SamplingScratch<C>*>(x.activation);
  bool counts = false, masses = false;
#pragma unroll 1
  for (int c = 0; c < C; c++) {
    if (choices_of<C>(x).choice[c] != kOpen) continue;
    counts |= by_count<H::kVocab>(x, c);
    masses |= by_mass(x, c);
  }
  if (x.at.thread < C) s.floor[x.at.thread] = 0;
  sync_consumers();
  if (counts) select<H, C, false, Mesh>(x, s, histograms, barrier, epoch);
  if (masses) select<H, C, true, Mesh>(x, s, histograms, barrier, epoch + kRadixLevels);
  draw_from_kept<H, C, Mesh>(x, s, words, epoch);
  // Everybody has read the counts: the words that were waited for tell.
#pragma unroll 1
  for (int i = x.at.cta * kConsumers + x.at.thread; i < Histograms<C>::kAll; i += Mesh::kCtas * kConsumers)
    histograms[i] = 0;
}

}  // namespace mirage
