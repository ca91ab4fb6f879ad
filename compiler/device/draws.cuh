// The draws of the columns that sample, taken ahead: while the head's logits are in registers, the two highest scores
// logit / temperature + Gumbel noise of the CTA's rows, over all tokens, kept or not. Noise costs two logarithms, so a
// logit whose score cannot be among the two is turned away by a bound first. What is done with the draws is
// sampling.cuh's concern.
#pragma once
#include "context.cuh"
#include "random.cuh"

namespace mirage {

// A candidate as one number: a higher score is larger, and of equal scores the lower token. 0: none.
MIRAGE_DEVICE uint64_t ranked(uint32_t key, uint32_t token) { return static_cast<uint64_t>(key) << 32 | ~token; }
MIRAGE_DEVICE uint32_t key_of(uint64_t rank) { return static_cast<uint32_t>(rank >> 32); }
MIRAGE_DEVICE uint32_t token_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

template <class R>
MIRAGE_DEVICE bool samples(const Context<R>& x, int column) {
  return x.draws.inverse_temperature[column] > 0.f;
}

// Whether top-k and top-p may leave out any token of a column that samples.
template <int kVocab, class R>
MIRAGE_DEVICE bool by_count(const Context<R>& x, int column) {
  return samples(x, column) && x.draws.top_k[column] > 0 && x.draws.top_k[column] < kVocab;
}
template <class R>
MIRAGE_DEVICE bool by_mass(const Context<R>& x, int column) {
  return samples(x, column) && x.draws.top_p[column] < 1.f;
}

// What a column samples with at its new position. Called by one thread; the next barrier makes it known.
template <class R>
MIRAGE_DEVICE void begin_draws(Context<R>& x, int c) {
  Draws& d = x.draws;
  const int slot = x.columns.slot[c];
  const float inverse = slot < 0 ? 0.f : x.params.sequences[slot].inverse_temperature;
  d.inverse_temperature[c] = inverse;
  d.best[c] = 0;
  d.second[c] = 0;
  if (inverse <= 0.f) return;
  const Sequence& q = x.params.sequences[slot];
  d.top_k[c] = q.top_k;
  d.top_p[c] = q.top_p;
  d.random[c] = stream_key(q.seed, q.stream, x.columns.position[c] + 1);
}

// As random.cuh's definition has it, to the bit.
MIRAGE_DEVICE float score_of(float logit, float inverse_temperature, uint32_t bits) {
  return __fadd_rn(__fmul_rn(logit, inverse_temperature), gumbel(bits));
}

// No less than score_of the same. With v in (0, 1), -ln(-ln(1 - v)) <= -ln v; where the two are close, gumbel is within
// 1e-5 of the left one; lg2.approx is within 2^-22 of up to 32; and rounded sums keep the order of their terms.
MIRAGE_DEVICE float score_bound(float logit, float inverse_temperature, uint32_t bits) {
  constexpr float kLn2 = 0.69314718f, kMargin = 1e-4f;
  float log2;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(__uint2float_rn(bits) + 0.5f));
  return __fadd_rn(__fmul_rn(logit, inverse_temperature), (32.f - log2) * kLn2 + kMargin);
}

// A warp's logits whose scores are asked for.
struct DrawQueue {
  float logit[2 * kWarp];
  uint32_t token[2 * kWarp];
  uint32_t column[2 * kWarp];
};

// Makes a token one of the CTA's two best of its column, if it is. In whatever order tokens come, the two are the same.
MIRAGE_DEVICE uint64_t offer_draw(Draws& d, int column, uint32_t token, float logit) {
  const float score = score_of(logit, d.inverse_temperature[column], random_bits(d.random[column], token));
  const uint64_t rank = ranked(order_key(score), token);
  if (key_of(rank) >= d.second[column]) {
    // Of two that meet, the lower is second at best.
    const uint64_t old = atomicMax(&d.best[column], rank);
    atomicMax(&d.second[column], key_of(min(old, rank)));
  }
  return rank;
}

// Offers a tile of the head's logits, as the tensor core leaves them: value i of a lane is of column column_of(i) and
// of token `row` or `row` + 8. All lanes of a warp call it together.
template <int C, int kVocab, class R>
MIRAGE_DEVICE void draw_from(Context<R>& x, DrawQueue& queue, const float (&logits)[ceil_div(C, 8)][4], uint32_t row) {
  constexpr int kValues = ceil_div(C, 8) * 4;
  auto column_of = [&](int i) { return i / 4 * 8 + x.at.lane % 4 * 2 + i % 2; };
  auto token_at = [&](int i) { return row + i / 2 % 2 * 8; };
  bool any = false;
#pragma unroll
  for (int i = 0; i < kValues; i++) any |= column_of(i) < C && samples(x, column_of(i));
  if (!__any_sync(~0u, any)) return;
  Draws& d = x.draws;
  uint32_t near = 0;
#pragma unroll
  for (int i = 0; i < kValues; i++) {
    const int c = column_of(i);
    const uint32_t token = token_at(i);
    if (i % 2 >= C || c >= C) continue;
    const float inverse = d.inverse_temperature[c];
    const float bound = score_bound(logits[i / 4][i % 4], inverse, random_bits(d.random[c], token));
    // Written so that NaN passes: its score counts as -inf.
    const bool out = bound < number_of_key(d.second[c]);
    if (inverse > 0.f && token < kVocab && !out) near |= 1u << i;
  }
  // A score takes long and few are asked for: the lanes share them out.
  int waiting = 0;
#pragma unroll 1
  for (uint32_t left = __reduce_or_sync(~0u, near); left != 0 || waiting > 0;) {
    if (left != 0) {
      const int i = __ffs(left) - 1;
      left &= left - 1;
      const bool mine = near >> i & 1;
      const uint32_t lanes = __ballot_sync(~0u, mine);
      if (mine) {
        float logit = 0.f;
#pragma unroll
        for (int j = 0; j < kValues; j++) logit = i == j ? logits[j / 4][j % 4] : logit;
        const int at = waiting + __popc(lanes & ((1u << x.at.lane) - 1));
        queue.logit[at] = logit;
        queue.token[at] = token_at(i);
        queue.column[at] = column_of(i);
      }
      waiting += __popc(lanes);
      __syncwarp();
    }
    if (left == 0 || waiting >= kWarp) {
      const int count = min_of(waiting, kWarp);
      waiting -= count;
      const int at = waiting + x.at.lane;
      const bool mine = x.at.lane < count;
      const uint64_t rank = mine ? offer_draw(d, queue.column[at], queue.token[at], queue.logit[at]) : 0;
      // Once all are in, one of them at most finds itself the best, and better than the warp's last that did.
      __syncwarp();
      if (mine && d.best[queue.column[at]] == rank) d.logit[queue.column[at]][x.at.warp] = queue.logit[at];
      __syncwarp();
    }
  }
}

}  // namespace mirage
