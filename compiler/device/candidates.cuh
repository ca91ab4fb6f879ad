// The exchange of candidates after the head: of each column the best token that every CTA's rows have, by logit or by
// noisy score. Owns their words, and what is then known of the columns in every CTA.
#pragma once
#include "draws.cuh"
#include "words.cuh"

namespace mirage {

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

// Draws of a column that are asked about at once: with top-p 0.95 each is kept in 95 of 100 cases.
constexpr int kDraws = 3;

// How far a column is.
enum Choice : uint32_t {
  kChosen,  // its token is known
  kDrawn,   // the best draws are known, but not whether top-k or top-p keep them
  kOpen,    // the draws do not tell
};

// In scratch from the head to the end of the step.
template <int C>
struct Choices {
  DrawQueue queues[kConsumerWarps];
  Candidate of_warps[C][kConsumerWarps];
  Candidate winners[C];  // the highest logit, and the chosen token
  Choice choice[C];
  uint32_t draws[C];                // those certain to be the best of all tokens' scores
  uint32_t drawn_token[C][kDraws];  // best first
  float drawn_logit[C][kDraws];
  float masses[C][kConsumerWarps][1 + kDraws];
  uint32_t counts[C][kConsumerWarps][kDraws];
  uint32_t cancelled;
};

// Bytes of a column, and of the queues, for which program/layout.rs makes room.
constexpr int kChoiceBytes = 40 + 36 * kConsumerWarps;
constexpr int kQueueBytes = 768 * kConsumerWarps;

template <int C, class R>
MIRAGE_DEVICE Choices<C>& choices_of(Context<R>& x) {
  static_assert(sizeof(Choices<C>) == C * kChoiceBytes + kQueueBytes + 4, "as large as the compiler takes them for");
  return *reinterpret_cast<Choices<C>*>(x.scratch);
}

// Words of one step: {logit, token, cancelled} of every column and CTA; of columns that sample {highest logit, logit of
// the draw, cancelled}, and behind all these {key of the draw's score, its token, key of the second-highest score}.
template <int C, class Mesh>
struct CandidateWords {
  static constexpr int kOfKind = C * Mesh::kCtas;
  static constexpr int kOfStep = 2 * kOfKind;
};

// This CTA's candidate of a column. `highest`: of its logits; `warp_of`: the warp that has computed a token's logit.
template <int C, class Mesh, class R, class WarpOf>
MIRAGE_DEVICE void publish_candidate(Context<R>& x, uint4* words, int column, Candidate highest, bool cancelled,
                                     uint32_t epoch, WarpOf warp_of) {
  uint4* word = words + column * Mesh::kCtas + x.at.cta;
  uint32_t second_value = highest.token;
  if (samples(x, column)) {
    const Draws& d = x.draws;
    const uint64_t best = d.best[column];
    const uint32_t token = best == 0 ? 0 : token_of(best);
    second_value = best == 0 ? 0 : __float_as_uint(d.logit[column][warp_of(token)]);
    store_word(word + CandidateWords<C, Mesh>::kOfKind, key_of(best), token, d.second[column], epoch);
  }
  store_word(word, __float_as_uint(highest.logit), second_value, cancelled, epoch);
}

// What a lane holds of a column's candidates, one of every kWarp-th CTA.
template <class Mesh>
struct Ranking {
  static constexpr int kCount = ceil_div(Mesh::kCtas, kWarp);
  uint32_t key[kCount], token[kCount];

  // The best of all lanes; it is taken out, and f(s) is called by the lane that had it as its s-th.
  template <class F>
  MIRAGE_DEVICE uint2 take_best(F f) {
    uint32_t highest = 0, lowest = ~0u;
#pragma unroll
    for (int s = 0; s < kCount; s++) highest = max(highest, key[s]);
    highest = __reduce_max_sync(~0u, highest);
#pragma unroll
    for (int s = 0; s < kCount; s++) lowest = key[s] == highest ? min(lowest, token[s]) : lowest;
    lowest = __reduce_min_sync(~0u, lowest);
#pragma unroll
    for (int s = 0; s < kCount; s++)
      if (key[s] == highest && token[s] == lowest) {
        if (highest != 0) f(s);
        key[s] = 0;
      }
    return make_uint2(highest, lowest);
  }
};

// What all CTAs have found, in every CTA: columns without thresholds get their token. True when the host has cancelled.
template <class H, int C, class Mesh, class R>
MIRAGE_DEVICE bool collect_candidates(Context<R>& x, const uint4* words, uint32_t epoch) {
  constexpr int kCount = Ranking<Mesh>::kCount;
  Choices<C>& choices = choices_of<C>(x);
#pragma unroll 1
  for (int column = x.at.warp; column < C; column += kConsumerWarps) {
    const Draws& d = x.draws;
    const bool sampled = samples(x, column);
    int from[2 * kCount];
    uint4 got[2 * kCount];
#pragma unroll
    for (int s = 0; s < kCount; s++) {
      const int cta = s * kWarp + x.at.lane;
      from[s] = cta < Mesh::kCtas ? column * Mesh::kCtas + cta : -1;
      from[kCount + s] = sampled && from[s] >= 0 ? CandidateWords<C, Mesh>::kOfKind + from[s] : -1;
    }
    await_words(got, words, from, epoch);
    Ranking<Mesh> ranking;
    uint32_t highest = 0, limit = 0, stop = 0;
    float logits[kCount];
#pragma unroll
    for (int s = 0; s < kCount; s++) {
      const uint4 &a = got[s], &b = got[kCount + s];
      const uint32_t key = from[s] >= 0 ? order_key(__uint_as_float(a.x)) : 0;
      highest = max(highest, key);
      ranking.key[s] = sampled ? b.x : key;
      ranking.token[s] = sampled ? b.y : a.y;
      limit = max(limit, b.z);
      logits[s] = __uint_as_float(a.y);
      stop |= a.z;
    }
    highest = __reduce_max_sync(~0u, highest);
    limit = __reduce_max_sync(~0u, limit);
    stop = __reduce_or_sync(~0u, stop);
    const bool mass = by_mass(x, column);
    const int wanted = mass || by_count<H::kVocab>(x, column) ? kDraws : 1;
    uint32_t certain = 0, token = 0;
#pragma unroll 1
    for (int j = 0; j < wanted; j++) {
      const uint2 best = ranking.take_best([&](int s) { choices.drawn_logit[column][j] = logits[s]; });
      if (j == 0) token = best.y;
      // The CTAs' second-best are not here. What is above them all stands where it would among all scores.
      if (j == 0 || best.x > limit) certain++;
      if (x.at.lane == 0) choices.drawn_token[column][j] = best.y;
    }
    if (x.at.lane == 0) {
      const float logit = number_of_key(highest), scaled = __fmul_rn(logit, d.inverse_temperature[column]);
      // Differences of infinite logits are no numbers.
      const bool unclear = mass && !(fabsf(scaled) < __uint_as_float(0x7f800000u));
      choices.winners[column] = Candidate{logit, token};
      choices.draws[column] = certain;
      choices.choice[column] = wanted == 1 ? kChosen : unclear ? kOpen : kDrawn;
      if (column == 0) choices.cancelled = stop;
    }
  }
  fence_gpu();
  sync_consumers();
  return choices.cancelled != 0;
}

// Whether any column is so far, the same in all CTAs.
template <int C, class R>
MIRAGE_DEVICE bool any_is(Context<R>& x, Choice choice) {
  bool any = false;
#pragma unroll
  for (int c = 0; c < C; c++) any |= choices_of<C>(x).choice[c] == choice;
  return any;
}

template <int C, class R>
MIRAGE_DEVICE Candidate* winners_of(Context<R>& x) {
  return choices_of<C>(x).winners;
}

}  // namespace mirage
