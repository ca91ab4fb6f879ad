// The LM head: logits of the step's columns, rows split over all CTAs, and the highest logit of each column.
//
// H, a head: a linear with whole rows to a warp (kWarpRows = 8), split over all of the grid; kVocab.
#pragma once
#include "linear.cuh"

namespace mirage {

template <class H, class Mesh>
MIRAGE_DEVICE Slice head_slice(int cta) {
  return Slice{share_of(H::kRowUnits, Mesh::kCtas, cta), Share{0, H::kKTiles}};
}

struct Candidate {
  float logit;
  uint32_t token;
  // Ties go to the lowest token. A NaN never wins.
  MIRAGE_DEVICE void offer(float other, uint32_t other_token) {
    if (other > logit || (other == logit && other_token < token)) {
      logit = other;
      token = other_token;
    }
  }
};
constexpr float kLowest = -3.402823466e38f;

// Candidates of this CTA: one word {logit, token, cancelled} a column at words[column * Mesh::kCtas + cta].
template <class H, int C, class Mesh, class R>
MIRAGE_DEVICE void lm_head(Context<R>& x, uint4* words, bool cancelled, uint32_t epoch) {
  static_assert(H::kWarpK == 1, "a warp of the head holds whole rows");
  constexpr int kColumnTiles = Product<H, C>::kColumnTiles;
  const Slice slice = head_slice<H, Mesh>(x.at.cta);
  float scale[kColumnTiles][2];
  Candidate best[kColumnTiles][2];
#pragma unroll
  for (int n = 0; n < kColumnTiles; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int column = n * 8 + x.at.lane % 4 * 2 + j;
      scale[n][j] = column < C ? norm_scale<H, C>(x.sum_squares, column) : 0.f;
      best[n][j] = Candidate{kLowest, 0};
    }
#pragma unroll 1
  for (int pass = 0; pass < H::kPasses; pass++) {
    const int rows = pass_rows<H>(slice.rows.count, pass);
    if (rows <= 0) break;
    Product<H, C> product;
    multiply<H, C>(product, x.ring, x.activation, padded(H::kWidth), rows, slice.k.count, x.at);
#pragma unroll
    for (int m = 0; m < H::kTilesPerWarp; m++) {
      const int tile = x.at.warp * H::kTilesPerWarp + m;
      if (tile >= rows) continue;
      const uint32_t row = (slice.rows.begin + pass * H::kPassTiles + tile) * 16 + x.at.lane / 4;
#pragma unroll
      for (int n = 0; n < kColumnTiles; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = n * 8 + x.at.lane % 4 * 2 + i % 2;
          const uint32_t token = row + i / 2 * 8;
          if (column < C && token < H::kVocab) {
            const float logit = product.v[m][n][i] * scale[n][i % 2];
            best[n][i % 2].offer(logit, token);
            if (x.columns.logits[column]) x.columns.logits[column][token] = logit;
          }
        }
    }
  }
  // Lanes with the same lane % 4 hold the same columns.
  Candidate* of_warps = reinterpret_cast<Candidate*>(x.scratch);
#pragma unroll
  for (int n = 0; n < kColumnTiles; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
      for (int o = 4; o < kWarp; o *= 2)
        best[n][j].offer(__shfl_xor_sync(~0u, best[n][j].logit, o), __shfl_xor_sync(~0u, best[n][j].token, o));
      const int column = n * 8 + x.at.lane % 4 * 2 + j;
      if (x.at.lane < 4 && column < C) of_warps[column * kConsumerWarps + x.at.warp] = best[n][j];
    }
  // The logits and this step's KV rows must be visible to whoever sees the candidates.
  fence_gpu();
  sync_consumers();
  if (x.at.thread < C) {
    Candidate winner{kLowest, 0};
    for (int w = 0; w < kConsumerWarps; w++) {
      const Candidate c = of_warps[x.at.thread * kConsumerWarps + w];
      winner.offer(c.logit, c.token);
    }
    fence_gpu();
    store_word(words + x.at.thread * Mesh::kCtas + x.at.cta, __float_as_uint(winner.logit), winner.token, cancelled,
               epoch);
  }
}

// The winners of all CTAs, in every CTA: scratch holds a Candidate a column. True when the host has cancelled.
template <int C, class Mesh, class R>
MIRAGE_DEVICE bool collect_candidates(Context<R>& x, const uint4* words, uint32_t epoch) {
  constexpr int kSteps = ceil_div(Mesh::kCtas, kWarp);
  Candidate* winners = reinterpret_cast<Candidate*>(x.scratch) + C * kConsumerWarps;
  uint32_t* cancelled = reinterpret_cast<uint32_t*>(winners + C);
#pragma unroll 1
  for (int column = x.at.warp; column < C; column += kConsumerWarps) {
    int from[kSteps];
    uint4 got[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const int cta = s * kWarp + x.at.lane;
      from[s] = cta < Mesh::kCtas ? column * Mesh::kCtas + cta : -1;
    }
    await_words(got, words, from, epoch);
    Candidate winner{kLowest, 0};
    uint32_t stop = 0;
#pragma unroll
    for (int s = 0; s < kSteps; s++)
      if (from[s] >= 0) {
        winner.offer(__uint_as_float(got[s].x), got[s].y);
        stop |= got[s].z;
      }
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) {
      winner.offer(__shfl_xor_sync(~0u, winner.logit, o), __shfl_xor_sync(~0u, winner.token, o));
      stop |= __shfl_xor_sync(~0u, stop, o);
    }
    if (x.at.lane == 0) {
      winners[column] = winner;
      if (column == 0) *cancelled = stop;
    }
  }
  fence_gpu();
  sync_consumers();
  return *cancelled != 0;
}

template <int C, class R>
MIRAGE_DEVICE Candidate* winners_of(Context<R>& x) {
  return reinterpret_cast<Candidate*>(x.scratch) + C * kConsumerWarps;
}

}  // namespace mirage
