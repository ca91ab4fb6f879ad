// The next token of every row, by the definition in runtime/src/sampler.rs: exact, so that it equals the CPU's choice.
//
// Greedy is one launch, `sample_pick`. Top-k and top-p first look for the smallest logit to keep: the `sample_select`
// launches find it eleven bits at a time, from a histogram of the logits' order keys. All kernels have a grid of
// (blocks, rows); of a row's blocks, the last to arrive finishes the row.
#pragma once

#include "../random.cuh"
#include "common.cuh"

namespace mirage {

constexpr uint32_t kSampleThreads = 256;
constexpr uint32_t kDigitBits = 11;
constexpr uint32_t kBins = 1u << kDigitBits;

// What a request asks for, by slot.
struct Sampling {
  uint64_t seed;
  float inverse_temperature;  // 0 for greedy
  float top_p;                // 1 for off
  uint32_t top_k;             // 0 for off
  uint32_t sequence;
};

// What the launches for one row hand on to each other. All zero between steps.
struct SampleState {
  uint64_t best;     // key of the best token in the upper half, the token's complement in the lower
  uint64_t target;   // what the kept logits' values must still sum to
  uint32_t max_key;  // of the largest logit
  uint32_t cutoff;   // key of the smallest logit kept so far
  uint32_t prefix;   // digits found so far, in place
  uint32_t arrived;
};

struct SampleParams {
  const float* logits;       // [row][vocab]
  const Sampling* sampling;  // [slot]
  SampleState* state;        // [row]
  uint64_t* histogram;       // [row][kBins], zero between launches
  const uint32_t* row;       // of the forward pass, for each row of logits
  const uint32_t* slot;      // of each row of the forward pass
  const uint32_t* position;  // of each row of the forward pass
  uint32_t* next_token;      // [slot]
  uint32_t* next_position;   // [slot]
  uint32_t* made;            // [slot]: tokens in the history so far
  uint32_t* history;         // [slot][capacity], in the host's memory
  uint32_t vocab;
  uint32_t capacity;
};

// The number that an order key stands for.
MIRAGE_DEVICE float key_value(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

MIRAGE_DEVICE uint64_t block_max(uint64_t value) {
  __shared__ uint64_t scratch[kSampleThreads / kWarp];
  const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (uint32_t offset = kWarp / 2; offset > 0; offset /= 2) {
    value = max(value, static_cast<uint64_t>(__shfl_xor_sync(kFullWarp, value, offset)));
  }
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  for (uint32_t i = 0; i < kSampleThreads / kWarp; ++i) value = max(value, scratch[i]);
  return value;
}

// Calls `function(token, logit)` for this block's share of the row.
template <typename Function>
MIRAGE_DEVICE void for_each_logit(const SampleParams& p, Function function) {
  const float* logits = p.logits + static_cast<uint64_t>(blockIdx.y) * p.vocab;
  for (uint32_t token = blockIdx.x * kSampleThreads + threadIdx.x; token < p.vocab;
       token += gridDim.x * kSampleThreads) {
    function(token, logits[token]);
  }
}

// The largest of `key(token, logit)` over the row with the lowest token it belongs to, in `state.best`; true in the
// thread that may use it.
template <typename Key>
MIRAGE_DEVICE bool best_of_row(const SampleParams& p, Key key) {
  uint64_t best = 0;
  for_each_logit(p, [&](uint32_t token, float logit) {
    best = max(best, static_cast<uint64_t>(key(token, logit)) << 32 | (0xffffffffu - token));
  });
  best = block_max(best);
  SampleState& state = p.state[blockIdx.y];
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned long long*>(&state.best), best);
  return is_last_block(&state.arrived, gridDim.x) && threadIdx.x == 0;
}

MIRAGE_DEVICE const Sampling& sampling_of(const SampleParams& p) { return p.sampling[p.slot[p.row[blockIdx.y]]]; }

// The largest logit, which the weights of top-p are relative to. Before the selections.
extern "C" __global__ void sample_max(const SampleParams p) {
  if (best_of_row(p, [](uint32_t, float logit) { return order_key(logit); })) {
    SampleState& state = p.state[blockIdx.y];
    state.max_key = static_cast<uint32_t>(__ldcg(&state.best) >> 32);
    state.best = 0;
  }
}

// One digit of the cutoff. `weighted`: of top-p, whose values are weights; else of top-k, whose values are ones.
template <bool kWeighted>
MIRAGE_DEVICE void select_digit(const SampleParams& p, uint32_t digit) {
  // A sum in two words: 64-bit additions to shared memory are no single instruction.
  __shared__ uint32_t low[kBins], high[kBins];
  const Sampling& sampling = sampling_of(p);
  SampleState& state = p.state[blockIdx.y];
  const bool off = sampling.inverse_temperature == 0.f || (kWeighted ? sampling.top_p >= 1.f : sampling.top_k == 0);
  if (off) return;  // the same in all blocks of the row

  const uint32_t shift = digit == 0 ? 32 - kDigitBits : digit == 1 ? 32 - 2 * kDigitBits : 0;
  const uint32_t bits = digit == 2 ? 32 - 2 * kDigitBits : kDigitBits;
  const uint32_t cutoff = state.cutoff, prefix = state.prefix;
  const float max_scaled = __fmul_rn(key_value(state.max_key), sampling.inverse_temperature);
  for (uint32_t bin = threadIdx.x; bin < kBins; bin += kSampleThreads) low[bin] = high[bin] = 0;
  __syncthreads();
  for_each_logit(p, [&](uint32_t, float logit) {
    const uint32_t key = order_key(logit);
    // The digits above this one must be those found; at the first there are none.
    const bool candidate = digit == 0 || (key ^ prefix) >> (shift + bits) == 0;
    if (!candidate || (kWeighted && key < cutoff)) return;
    uint64_t value = 1;
    if (kWeighted) {
      const float scaled = __fmul_rn(key_value(key), sampling.inverse_temperature);
      value = sample_weight(scaled == max_scaled ? 0.f : __fsub_rn(scaled, max_scaled));
      if (value == 0) return;
    }
    const uint32_t bin = key >> shift & ((1u << bits) - 1), word = static_cast<uint32_t>(value);
    const uint32_t old = atomicAdd(&low[bin], word);
    const uint32_t carried = static_cast<uint32_t>(value >> 32) + (old + word < old ? 1u : 0u);
    if (carried != 0) atomicAdd(&high[bin], carried);
  });
  __syncthreads();
  uint64_t* histogram = p.histogram + static_cast<uint64_t>(blockIdx.y) * kBins;
  for (uint32_t bin = threadIdx.x; bin < kBins; bin += kSampleThreads) {
    const uint64_t sum = static_cast<uint64_t>(high[bin]) << 32 | low[bin];
    if (sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&histogram[bin]), sum);
  }
  if (!is_last_block(&state.arrived, gridDim.x)) return;

  // From the top bin down, the first at which the sum reaches the target. A thread takes eight neighbouring bins.
  constexpr uint32_t kRun = kBins / kSampleThreads;
  __shared__ uint64_t above[kSampleThreads + 1];  // sums of the runs from the top: [i] of those before run i
  const uint32_t top = kBins - 1 - threadIdx.x * kRun;
  uint64_t run = 0;
  for (uint32_t i = 0; i < kRun; ++i) run += __ldcg(&histogram[top - i]);
  above[threadIdx.x + 1] = run;
  __syncthreads();
  if (threadIdx.x == 0) {
    above[0] = 0;
    for (uint32_t i = 0; i < kSampleThreads; ++i) above[i + 1] += above[i];
    if (digit == 0) {
      const uint64_t total = above[kSampleThreads];
      const double wanted = ceil(__dmul_rn(static_cast<double>(sampling.top_p), __ull2double_rn(total)));
      state.target = kWeighted ? __double2ull_rz(wanted) : sampling.top_k;
    }
  }
  __syncthreads();
  const uint64_t target = state.target;
  const bool never = above[kSampleThreads] < target;  // only at the first digit: then all are kept
  // Every thread has read the target before the one that finds the bin writes the next.
  __syncthreads();
  if (never) {
    if (threadIdx.x == 0) state.prefix = 0, state.target = 0;
  } else if (above[threadIdx.x] < target && above[threadIdx.x + 1] >= target) {
    uint64_t sum = above[threadIdx.x];
    uint32_t bin = top;
    while (sum + __ldcg(&histogram[bin]) < target) sum += __ldcg(&histogram[bin--]);
    const uint32_t found = prefix | bin << shift;
    state.target = target - sum;
    state.prefix = found;
    if (digit == 2) {
      state.cutoff = max(cutoff, found);
      state.prefix = 0;
    }
  }
  __syncthreads();  // the thread that found it has read its bins
  for (uint32_t bin = threadIdx.x; bin < kBins; bin += kSampleThreads) histogram[bin] = 0;
}

struct SampleSelectParams {
  SampleParams sample;
  uint32_t digit;     // 0 to 2, in this order; those of top-k before those of top-p
  uint32_t weighted;  // 1 for top-p
};

extern "C" __global__ void sample_select(const SampleSelectParams p) {
  if (p.weighted != 0) {
    select_digit<true>(p.sample, p.digit);
  } else {
    select_digit<false>(p.sample, p.digit);
  }
}

// The token: the best of the logits, or of those kept with Gumbel noise. It becomes the input of the sequence's next
// step, and the host sees it in the history.
extern "C" __global__ void sample_pick(const SampleParams p) {
  const uint32_t row = p.row[blockIdx.y], slot = p.slot[row], position = p.position[row] + 1;
  const Sampling& sampling = p.sampling[slot];
  SampleState& state = p.state[blockIdx.y];
  const float scale = sampling.inverse_temperature;
  const uint32_t cutoff = state.cutoff;
  const uint64_t stream = stream_key(sampling.seed, sampling.sequence, position);
  const bool finish = best_of_row(p, [&](uint32_t token, float logit) {
    const uint32_t key = order_key(logit);
    if (scale == 0.f) return key;
    if (key < cutoff) return 0u;
    return order_key(__fadd_rn(__fmul_rn(logit, scale), gumbel(random_bits(stream, token))));
  });
  if (!finish) return;
  const uint32_t token = 0xffffffffu - static_cast<uint32_t>(__ldcg(&state.best));
  const uint32_t made = p.made[slot];
  if (made < p.capacity) p.history[static_cast<uint64_t>(slot) * p.capacity + made] = token;
  p.made[slot] = made + 1;
  p.next_token[slot] = token;
  p.next_position[slot] = position;
  state.best = 0;
  state.cutoff = 0;
}

}  // namespace mirage
