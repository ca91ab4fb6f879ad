// Whether top-k and top-p keep a drawn token, without finding their thresholds: top-k keeps it if fewer than k tokens
// have a larger logit, top-p if the mass of these is below top_p of the mass of all that top-k keeps. Every CTA adds up
// its rows, one exchange adds up the CTAs. Masses are floats here and their errors are bounded: a draw so near the
// threshold that they might decide wrongly is left open, and then sampling.cuh finds the threshold exactly.
#pragma once
#include "candidates.cuh"
#include "head.cuh"

namespace mirage {

// Sums over the rows of a lane, a warp, a CTA or the grid, for one column. The highest logit's mass is 1.
struct Sums {
  float masses[1 + kDraws];  // of all tokens, and of those with a larger logit than each of the draws
  uint32_t counts[kDraws];   // of the latter
};

// A mass as a word carries it: rounded to the upper 24 bits of the float, of which 16 are its digits.
MIRAGE_DEVICE uint32_t to_24_bits(float mass) { return (__float_as_uint(mass) + 0x80u) >> 8; }
MIRAGE_DEVICE float from_24_bits(uint32_t bits) { return __uint_as_float(bits << 8); }

MIRAGE_DEVICE void store_masses(uint4* p, const float (&masses)[1 + kDraws], uint32_t epoch) {
  static_assert(kDraws == 3, "four masses of 24 bits fill a word");
  const uint32_t last = to_24_bits(masses[3]);
  store_word(p, to_24_bits(masses[0]) | last << 24, to_24_bits(masses[1]) | last >> 8 << 24,
             to_24_bits(masses[2]) | last >> 16 << 24, epoch);
}
MIRAGE_DEVICE void add_masses(float (&masses)[1 + kDraws], const uint4& word) {
  masses[0] += from_24_bits(word.x);
  masses[1] += from_24_bits(word.y);
  masses[2] += from_24_bits(word.z);
  masses[3] += from_24_bits(word.x >> 24 | word.y >> 24 << 8 | word.z >> 24 << 16);
}

// What a mass may be off, as a part of the mass of all. The definition's integers are 2^32 masses, rounded down and
// within 1e-6; a mass here is within 3e-6, for its exponent is at most 34, of 24 bits, and ex2.approx within 2^-22, and
// below 2^-33 the integer is 0; sums go over a lane's kLogits, then lanes, warps and CTAs; a word rounds to 16 digits.
template <class H, int kLogits, class Mesh>
struct MassError {
  static constexpr float kUnit = 1.f / (1 << 24);
  static constexpr int kAdditions = kLogits + 5 + kConsumerWarps + ceil_div(Mesh::kCtas, kWarp) + 5;
  static constexpr float kRelative = H::kVocab * (kUnit / 256.f) + 4e-6f + (kAdditions + 256) * kUnit;
};

// exp((logit - highest) / temperature); no mass for NaN. `highest` is scaled.
MIRAGE_DEVICE float mass_of(float logit, float inverse_temperature, float highest) {
  constexpr float kLog2E = 1.44269504f;
  return exp2_fast(fmaxf(__fsub_rn(__fmul_rn(logit, inverse_temperature), highest), -1024.f) * kLog2E);
}

template <class H, int C, class Mesh>
struct Asking {
  typedef WarpsOfColumns<C> W;
  static constexpr int kLogits =
      ceil_div(ceil_div(H::kRowUnits, Mesh::kCtas) * 16, W::kStride);  // of a lane and column
  static constexpr int kAtOnce = batch_of(kLogits, 36);
  static constexpr float kError = MassError<H, kLogits, Mesh>::kRelative;

  template <class R>
  MIRAGE_DEVICE static float highest_of(Context<R>& x, int column) {
    return __fmul_rn(choices_of<C>(x).winners[column].logit, x.draws.inverse_temperature[column]);
  }

  // Of this lane's rows of a column.
  template <class R>
  MIRAGE_DEVICE static Sums add_logits(Context<R>& x, int column) {
    const Share rows = head_slice<H, Mesh>(x.at.cta).rows;
    const int begin = rows.begin * 16, end = min_of((rows.begin + rows.count) * 16, H::kVocab);
    const float* logits = x.columns.logits[column];
    const float inverse = x.draws.inverse_temperature[column], highest = highest_of(x, column);
    const bool mass = by_mass(x, column), count = by_count<H::kVocab>(x, column);
    float drawn[kDraws];
#pragma unroll
    for (int j = 0; j < kDraws; j++) drawn[j] = choices_of<C>(x).drawn_logit[column][j];
    Sums sums = {};
#pragma unroll 1
    for (int first = begin + W::lane(x.at); first < end; first += kAtOnce * W::kStride) {
      float logit[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int token = first + i * W::kStride;
        logit[i] = token < end ? logits[token] : __uint_as_float(0xff800000u);
      }
      if (mass)
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          const float one = mass_of(logit[i], inverse, highest);
          sums.masses[0] += one;
#pragma unroll
          for (int j = 0; j < kDraws; j++) sums.masses[1 + j] += logit[i] > drawn[j] ? one : 0.f;
        }
      if (count)
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
#pragma unroll
          for (int j = 0; j < kDraws; j++) sums.counts[j] += logit[i] > drawn[j];
    }
    return sums;
  }

  // The first draw that is kept, or kDraws where that is not known. `draws`: those that there are.
  template <class R>
  MIRAGE_DEVICE static int decide(Context<R>& x, int column, int draws, const Sums& sums) {
    const bool mass = by_mass(x, column), count = by_count<H::kVocab>(x, column);
    const float inverse = x.draws.inverse_temperature[column], top_p = x.draws.top_p[column];
    const float all = sums.masses[0], doubt = 2.f * kError * all;
    int kept = kDraws;
    bool known = true;
#pragma unroll
    for (int j = 0; j < kDraws; j++) {
      const float above = sums.masses[1 + j];
      // What top-k keeps is no more than all, and no less than this draw, if it is kept, and those above it.
      const float at_least =
          count ? above + mass_of(choices_of<C>(x).drawn_logit[column][j], inverse, highest_of(x, column)) : all;
      const bool in_count = !count || sums.counts[j] < x.draws.top_k[column];
      const bool in_mass = !mass || above + doubt < top_p * at_least,
                 not_in_mass = mass && above - doubt >= top_p * all;
      known &= j < draws && (in_mass || not_in_mass || !in_count);
      if (kept == kDraws && known && in_count && in_mass) kept = j;
    }
    return kept;
  }
};

// Asks L2 for the logits that ask_about_draws will read: since the first of them were written, the head's weights have
// gone through it. To be called while candidates are on their way.
template <class H, int C, class Mesh, class R>
MIRAGE_DEVICE void prefetch_logits(const Context<R>& x) {
  typedef WarpsOfColumns<C> W;
  constexpr int kOfLine = 128 / sizeof(float);
  const Share rows = head_slice<H, Mesh>(x.at.cta).rows;
  const int begin = rows.begin * 16, end = min_of((rows.begin + rows.count) * 16, H::kVocab);
#pragma unroll 1
  for (int i = 0; i < W::kColumns; i++) {
    const int column = W::column(x.at, i);
    if (!by_mass(x, column) && !by_count<H::kVocab>(x, column)) continue;
#pragma unroll 1
    for (int token = begin + W::lane(x.at) * kOfLine; token < end; token += W::kStride * kOfLine)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(x.columns.logits[column] + token));
  }
}

// Chooses the tokens of the columns that are drawn, or leaves them open. `words`: of masses, one of each column and
// CTA, and behind these of counts.
template <class H, int C, class Mesh, class R>
MIRAGE_DEVICE void ask_about_draws(Context<R>& x, uint4* words, uint32_t epoch) {
  typedef Asking<H, C, Mesh> A;
  typedef typename A::W W;
  constexpr int kOfKind = C * Mesh::kCtas;
  Choices<C>& choices = choices_of<C>(x);
#pragma unroll 1
  for (int i = 0; i < W::kColumns; i++) {
    const int column = W::column(x.at, i), part = W::part(x.at);
    if (choices.choice[column] != kDrawn) continue;
    const Sums sums = A::add_logits(x, column);
#pragma unroll
    for (int j = 0; j < 1 + kDraws; j++) {
      const float sum = warp_sum(sums.masses[j]);
      if (x.at.lane == 0) choices.masses[column][part][j] = sum;
    }
#pragma unroll
    for (int j = 0; j < kDraws; j++) {
      const uint32_t sum = __reduce_add_sync(~0u, sums.counts[j]);
      if (x.at.lane == 0) choices.counts[column][part][j] = sum;
    }
  }
  sync_consumers();
  if (x.at.thread < C && choices.choice[x.at.thread] == kDrawn) {
    const int column = x.at.thread;
    Sums sums = {};
#pragma unroll
    for (int w = 0; w < W::kWarps; w++) {
#pragma unroll
      for (int j = 0; j < 1 + kDraws; j++) sums.masses[j] += choices.masses[column][w][j];
#pragma unroll
      for (int j = 0; j < kDraws; j++) sums.counts[j] += choices.counts[column][w][j];
    }
    uint4* word = words + column * Mesh::kCtas + x.at.cta;
    if (by_mass(x, column)) store_masses(word, sums.masses, epoch);
    if (by_count<H::kVocab>(x, column))
      store_word(word + kOfKind, sums.counts[0], sums.counts[1], sums.counts[2], epoch);
  }
  constexpr int kCount = ceil_div(Mesh::kCtas, kWarp);
#pragma unroll 1
  for (int column = x.at.warp; column < C; column += kConsumerWarps) {
    if (choices.choice[column] != kDrawn) continue;
    const bool mass = by_mass(x, column), count = by_count<H::kVocab>(x, column);
    int from[2 * kCount];
    uint4 got[2 * kCount];
#pragma unroll
    for (int s = 0; s < kCount; s++) {
      const int cta = s * kWarp + x.at.lane, at = column * Mesh::kCtas + cta;
      from[s] = mass && cta < Mesh::kCtas ? at : -1;
      from[kCount + s] = count && cta < Mesh::kCtas ? kOfKind + at : -1;
    }
    await_words(got, words, from, epoch);
    Sums sums = {};
#pragma unroll
    for (int s = 0; s < kCount; s++) {
      add_masses(sums.masses, got[s]);
      sums.counts[0] += got[kCount + s].x;
      sums.counts[1] += got[kCount + s].y;
      sums.counts[2] += got[kCount + s].z;
    }
#pragma unroll
    for (int j = 0; j < 1 + kDraws; j++) sums.masses[j] = warp_sum(sums.masses[j]);
#pragma unroll
    for (int j = 0; j < kDraws; j++) sums.counts[j] = __reduce_add_sync(~0u, sums.counts[j]);
    const int kept = A::decide(x, column, choices.draws[column], sums);
    __syncwarp();
    if (x.at.lane == 0) {
      if (kept < kDraws) choices.winners[column].token = choices.drawn_token[column][kept];
      choices.choice[column] = kept < kDraws ? kChosen : kOpen;
    }
  }
  sync_consumers();
}

}  // namespace mirage
