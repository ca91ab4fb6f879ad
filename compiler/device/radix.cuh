// The exact thresholds of top-k and top-p, by radix selection over the whole grid, eight bits a level: every CTA counts
// its slice of the logits, the counts meet in global memory, everyone reads them. Masses are integers, so no order of
// addition matters.
#pragma once
#include "candidates.cuh"
#include "grid.cuh"
#include "head.cuh"

namespace mirage {

constexpr int kRadixBins = 256;
constexpr int kRadixLevels = 4;

// Histograms in global memory, [2 kinds, levels, columns, bins], all zero between steps.
template <int C>
struct Histograms {
  static constexpr int kOfLevel = C * kRadixBins;
  static constexpr int kOfKind = kRadixLevels * kOfLevel;
  static constexpr int kAll = 2 * kOfKind;
};

// What sampling keeps in the activation, which no linear needs between the head and the next step's embeddings.
template <int C>
struct SamplingScratch {
  uint32_t low[C][kRadixBins], high[C][kRadixBins];  // 16-bit halves of the masses, or counts in `low`
  uint32_t prefix[C];                                // leading bits of the threshold's key
  uint32_t floor[C];                                 // keys below it are out
  uint64_t target[C];                                // what must still be reached
};

// Gives this CTA's logits of one of the warp's columns, if it is open, to f(column, token, logit), several on their way
// at once.
template <class H, int C, class Mesh, class R, class F>
MIRAGE_DEVICE void each_logit_of(Context<R>& x, int c, F f) {
  typedef WarpsOfColumns<C> W;
  constexpr int kAtOnce = 6;
  if (choices_of<C>(x).choice[c] != kOpen) return;
  const Share rows = head_slice<H, Mesh>(x.at.cta).rows;
  const int begin = rows.begin * 16, end = min_of((rows.begin + rows.count) * 16, H::kVocab);
  const float* logits = x.columns.logits[c];
#pragma unroll 1
  for (int first = begin + W::lane(x.at); first < end; first += kAtOnce * W::kStride) {
    float values[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      const int token = first + j * W::kStride;
      values[j] = token < end ? logits[token] : 0.f;
    }
#pragma unroll 1
    for (int j = 0; j < kAtOnce; j++) {
      const int token = first + j * W::kStride;
      const float value = values[0];
#pragma unroll
      for (int n = 0; n + 1 < kAtOnce; n++) values[n] = values[n + 1];
      if (token < end) f(c, token, value);
    }
  }
}

// Narrows the threshold of every column with a target by one level. kMass: by mass, else by count.
template <class H, int C, bool kMass, class Mesh, class R>
MIRAGE_DEVICE void select_level(Context<R>& x, SamplingScratch<C>& s, uint64_t* histogram, int level, uint4* barrier,
                                uint32_t epoch) {
  const int shift = 24 - 8 * level;
#pragma unroll 1
  for (int i = x.at.thread; i < C * kRadixBins; i += kConsumers) (&s.low[0][0])[i] = (&s.high[0][0])[i] = 0;
  sync_consumers();
  auto count = [&](int c, int token, float logit) {
    if (s.target[c] == 0) return;
    const uint32_t key = order_key(logit);
    if (key < s.floor[c] || (level > 0 && key >> (shift + 8) != s.prefix[c])) return;
    const int bin = key >> shift & (kRadixBins - 1);
    if (kMass) {
      const float inverse = x.draws.inverse_temperature[c];
      const float highest = __fmul_rn(winners_of<C>(x)[c].logit, inverse), scaled = __fmul_rn(logit, inverse);
      const uint64_t mass = sample_weight(scaled == highest ? 0.f : __fsub_rn(scaled, highest));
      atomicAdd(&s.low[c][bin], static_cast<uint32_t>(mass & 0xffff));
      atomicAdd(&s.high[c][bin], static_cast<uint32_t>(mass >> 16));
    } else {
      atomicAdd(&s.low[c][bin], 1u);
    }
  };
#pragma unroll 1
  for (int i = 0; i < WarpsOfColumns<C>::kColumns; i++)
    each_logit_of<H, C, Mesh>(x, WarpsOfColumns<C>::column(x.at, i), count);
  sync_consumers();
#pragma unroll 1
  for (int i = x.at.thread; i < C * kRadixBins; i += kConsumers) {
    const uint64_t n = (static_cast<uint64_t>((&s.high[0][0])[i]) << 16) + (&s.low[0][0])[i];
    if (n) atomicAdd(histogram + i, n);
  }
  grid_barrier<Mesh>(x, barrier, epoch);
  // One warp a column: from the highest bin down to the one where the target is reached.
#pragma unroll 1
  for (int c = x.at.warp; c < C; c += kConsumerWarps) {
    if (s.target[c] == 0) continue;
    constexpr int kPerLane = kRadixBins / kWarp;
    const int top = kRadixBins - 1 - x.at.lane * kPerLane;
    uint64_t n[kPerLane], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(n[i]) : "l"(histogram + c * kRadixBins + top - i));
      sum += n[i];
    }
    uint64_t before = sum;
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, before, o);
      if (x.at.lane >= o) before += other;
    }
    const uint64_t total = __shfl_sync(~0u, before, kWarp - 1);
    before -= sum;
    uint64_t target = s.target[c];
    if (kMass && level == 0) {
      const double part = static_cast<double>(x.draws.top_p[c]) * static_cast<double>(total);
      target = static_cast<uint64_t>(ceil(part));
      target = target < 1 ? 1 : (target > total ? total : target);
    }
    __syncwarp();
    if (before < target && target <= before + sum) {
      int bin = top;
      bool found = false;
#pragma unroll
      for (int i = 0; i < kPerLane; i++) {
        found |= before + n[i] >= target;
        if (!found) {
          before += n[i];
          bin--;
        }
      }
      s.prefix[c] = (level > 0 ? s.prefix[c] << 8 : 0u) | static_cast<uint32_t>(bin);
      s.target[c] = target - before;
    }
  }
  sync_consumers();
}

// Finds the threshold of the open columns that have one of this kind, and raises their floor to it. Epochs of the
// barriers: `epoch` + 1 up to + kRadixLevels.
template <class H, int C, bool kMass, class Mesh, class R>
MIRAGE_DEVICE void select(Context<R>& x, SamplingScratch<C>& s, uint64_t* histograms, uint4* barrier, uint32_t epoch) {
  if (x.at.thread < C) {
    const int c = x.at.thread;
    uint64_t target = 0;
    if (choices_of<C>(x).choice[c] == kOpen) {
      // Of masses the target follows from their sum.
      if (kMass)
        target = by_mass(x, c);
      else if (by_count<H::kVocab>(x, c))
        target = x.draws.top_k[c];
    }
    s.target[c] = target;
    s.prefix[c] = 0;
  }
  sync_consumers();
#pragma unroll 1
  for (int level = 0; level < kRadixLevels; level++)
    select_level<H, C, kMass, Mesh>(x, s, histograms + kMass * Histograms<C>::kOfKind + level * Histograms<C>::kOfLevel,
                                    level, barrier, epoch + 1 + level);
  if (x.at.thread < C && s.target[x.at.thread] > 0)
    s.floor[x.at.thread] = max(s.floor[x.at.thread], s.prefix[x.at.thread]);
  sync_consumers();
}

}  // namespace mirage
