// Sampling by temperature, top-k and top-p without leaving the kernel.
//
// The definition (its CPU twin is runtime::sampler): keep the tokens whose logit is at least the k-th largest; of
// those, the smallest set of largest logits whose mass reaches top_p of the kept mass; the token is the kept one with
// the highest logit / temperature + Gumbel noise, which is an exact draw from the softmax over the kept tokens. Ties
// are kept. Both thresholds are found by radix selection over the whole grid, eight bits a level: every CTA counts its
// slice of the logits, the counts meet in global memory, everyone reads them. Masses are integers, so no order of
// addition matters.
#pragma once
#include "grid.cuh"
#include "head.cuh"
#include "random.cuh"

namespace mirage {

constexpr int kRadixBins = 256;
constexpr int kRadixLevels = 4;

// Histograms in global memory, [2 step parities, 2 kinds, levels, columns, bins].
template <int C>
struct Histograms {
  static constexpr int kOfLevel = C * kRadixBins;
  static constexpr int kOfKind = kRadixLevels * kOfLevel;
  static constexpr int kOfParity = 2 * kOfKind;
};

// What sampling keeps in the activation, which no linear needs between the head and the next step's embeddings.
template <int C>
struct SamplingScratch {
  uint32_t low[C][kRadixBins], high[C][kRadixBins];  // 16-bit halves of the masses, or counts in `low`
  uint32_t prefix[C];                                // leading bits of the threshold's key
  uint32_t floor[C];                                 // keys below it are out
  uint64_t target[C];                                // what must still be reached
};

// Gives this CTA's logits of one of the warp's columns, if it samples, to f(column, token, logit), several on their way
// at once.
template <class H, int C, class Mesh, class R, class F>
MIRAGE_DEVICE void each_logit_of(Context<R>& x, int c, F f) {
  typedef WarpsOfColumns<C> W;
  constexpr int kAtOnce = 6;
  const int slot = x.columns.slot[c];
  if (slot < 0 || x.params.sequences[slot].inverse_temperature <= 0.f) return;
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

struct ByCount {
  static constexpr bool value = false;
};
struct ByMass {
  static constexpr bool value = true;
};

// Narrows every column's threshold by one level. kMass: by mass, else by count.
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
      const float inverse = x.params.sequences[x.columns.slot[c]].inverse_temperature;
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
    if (x.columns.slot[c] < 0 || s.target[c] == 0) continue;
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
      const double part = static_cast<double>(x.params.sequences[x.columns.slot[c]].top_p) * static_cast<double>(total);
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

// Replaces the winners of the columns that sample. `words`: a word {score, token} of each CTA and column.
// Epochs of the barriers: `epoch` + 1 up to + 2 * kRadixLevels; Model::kStepEpochs leaves room for them.
template <class H, int C, class Mesh, class R>
MIRAGE_DEVICE void sample(Context<R>& x, uint64_t* histograms, uint4* words, uint4* barrier, uint32_t parity,
                          uint32_t epoch) {
  SamplingScratch<C>& s = *reinterpret_cast<SamplingScratch<C>*>(x.activation);
  bool sampled = false, by_count = false, by_mass = false;
#pragma unroll 1
  for (int c = 0; c < C; c++) {
    const int slot = x.columns.slot[c];
    if (slot < 0) continue;
    const Sequence& q = x.params.sequences[slot];
    if (q.inverse_temperature <= 0.f) continue;
    sampled = true;
    by_count |= q.top_k > 0;
    by_mass |= q.top_p < 1.f;
  }
  if (!sampled) return;
  // The other parity's histograms are done with; they serve the next step.
  uint64_t* other = histograms + (parity ^ 1) * Histograms<C>::kOfParity;
#pragma unroll 1
  for (int i = x.at.cta * kConsumers + x.at.thread; i < Histograms<C>::kOfParity; i += Mesh::kCtas * kConsumers)
    other[i] = 0;
  uint64_t* mine = histograms + parity * Histograms<C>::kOfParity;
  if (x.at.thread < C) s.floor[x.at.thread] = 0;
  auto select = [&](auto mass) {
    constexpr bool kMass = decltype(mass)::value;
    if (x.at.thread < C) {
      const int slot = x.columns.slot[x.at.thread];
      uint64_t target = 0;
      if (slot >= 0 && x.params.sequences[slot].inverse_temperature > 0.f) {
        const Sequence& q = x.params.sequences[slot];
        if (kMass)
          target = q.top_p < 1.f;
        else
          target = q.top_k < H::kVocab ? q.top_k : 0;
      }
      s.target[x.at.thread] = target;
      s.prefix[x.at.thread] = 0;
    }
    sync_consumers();
#pragma unroll 1
    for (int level = 0; level < kRadixLevels; level++)
      select_level<H, C, kMass, Mesh>(x, s, mine + kMass * Histograms<C>::kOfKind + level * Histograms<C>::kOfLevel,
                                      level, barrier, epoch + 1 + kMass * kRadixLevels + level);
    if (x.at.thread < C && s.target[x.at.thread] > 0)
      s.floor[x.at.thread] = max(s.floor[x.at.thread], s.prefix[x.at.thread]);
    sync_consumers();
  };
  if (by_count) select(ByCount{});
  if (by_mass) select(ByMass{});
  sync_consumers();

  // The best of each lane, then of each warp, then of the warps of a column.
  typedef WarpsOfColumns<C> W;
  Candidate* of_warps = reinterpret_cast<Candidate*>(x.scratch);
#pragma unroll 1
  for (int i = 0; i < W::kColumns; i++) {
    const int column = W::column(x.at, i);
    Candidate best{kLowest, 0};
    each_logit_of<H, C, Mesh>(x, column, [&](int c, int token, float logit) {
      if (order_key(logit) < s.floor[c]) return;
      const Sequence& q = x.params.sequences[x.columns.slot[c]];
      const uint64_t key = stream_key(q.seed, q.stream, x.columns.position[c] + 1);
      best.offer(__fadd_rn(__fmul_rn(logit, q.inverse_temperature), gumbel(random_bits(key, token))), token);
    });
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2)
      best.offer(__shfl_xor_sync(~0u, best.logit, o), __shfl_xor_sync(~0u, best.token, o));
    if (x.at.lane == 0) of_warps[column * kConsumerWarps + W::part(x.at)] = best;
  }
  sync_consumers();
  if (x.at.thread < C) {
    const int c = x.at.thread, slot = x.columns.slot[c];
    Candidate winner = winners_of<C>(x)[c];
    if (slot >= 0 && x.params.sequences[slot].inverse_temperature > 0.f) {
      winner = Candidate{kLowest, 0};
      for (int w = 0; w < W::kWarps; w++) {
        const Candidate other = of_warps[c * kConsumerWarps + w];
        winner.offer(other.logit, other.token);
      }
    }
    store_word(words + c * Mesh::kCtas + x.at.cta, __float_as_uint(winner.logit), winner.token, 0, epoch);
  }
  sync_consumers();
  collect_candidates<C, Mesh>(x, words, epoch);
}

}  // namespace mirage
