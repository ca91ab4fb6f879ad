// The LM head: logits of the step's columns, rows split over all CTAs, and the highest logit of each column.
//
// H, a head: a linear with whole rows to a warp (kWarpRows = 8), split over all of the grid; kVocab.
#pragma once
#include "candidates.cuh"
#include "draws.cuh"
#include "linear.cuh"

namespace mirage {

template <class H, class Mesh>
MIRAGE_DEVICE Slice head_slice(int cta) {
  return Slice{share_of(H::kRowUnits, Mesh::kCtas, cta), Share{0, H::kKTiles}};
}

// Publishes this CTA's candidates.
template <class H, int C, class Mesh, class R>
MIRAGE_DEVICE void lm_head(Context<R>& x, uint4* words, bool cancelled, uint32_t epoch) {
  static_assert(H::kWarpK == 1, "a warp of the head holds whole rows");
  constexpr int kColumnTiles = Product<H, C>::kColumnTiles;
  const Slice slice = head_slice<H, Mesh>(x.at.cta);
  Choices<C>& choices = choices_of<C>(x);
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
            const float logit = product.v[m][n][i] *= scale[n][i % 2];
            best[n][i % 2].offer(logit, token);
            if (x.columns.logits[column]) x.columns.logits[column][token] = logit;
          }
        }
      draw_from<C, H::kVocab>(x, choices.queues[x.at.warp], product.v[m], row);
    }
  }
  // Lanes with the same lane % 4 hold the same columns.
#pragma unroll
  for (int n = 0; n < kColumnTiles; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
      for (int o = 4; o < kWarp; o *= 2)
        best[n][j].offer(__shfl_xor_sync(~0u, best[n][j].logit, o), __shfl_xor_sync(~0u, best[n][j].token, o));
      const int column = n * 8 + x.at.lane % 4 * 2 + j;
      if (x.at.lane < 4 && column < C) choices.of_warps[column][x.at.warp] = best[n][j];
    }
  // The logits and this step's KV rows must be visible to whoever sees the candidates.
  fence_gpu();
  sync_consumers();
  if (x.at.thread < C) {
    Candidate highest{kLowest, 0};
#pragma unroll
    for (int w = 0; w < kConsumerWarps; w++) {
      const Candidate of_warp = choices.of_warps[x.at.thread][w];
      highest.offer(of_warp.logit, of_warp.token);
    }
    fence_gpu();
    publish_candidate<C, Mesh>(x, words, x.at.thread, highest, cancelled, epoch, [&](uint32_t token) {
      const int tile = static_cast<int>(token / 16) - slice.rows.begin;
      return tile % H::kPassTiles / H::kTilesPerWarp;
    });
  }
}

}  // namespace mirage
