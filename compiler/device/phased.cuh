// The phases as kernels of their own, to compare with: what the persistent kernel saves is the difference. A step is a
// chain of kernels. Each does the exchanges and the computation up to the next hand-over between CTAs, and fetches its
// first weights while the kernel before it still runs (programmatic dependent launch, from sm_90 on).
//
// What a CTA of the persistent kernel keeps from phase to phase lies in global memory between kernels: one copy of the
// columns and the epoch, and every CTA's own residual stream. Exchange words carry their epochs as ever; nobody waits
// for one, but where the head's input goes to the CTAs without a part of the layers.
//
// K, a kernel of the chain: C, its columns; kPrefill, whether these are a prefill step's; kSavedFloats, what a CTA
// saves of the stream; fetch, the weights it streams; run, its phases.
#pragma once
#include "generate.cuh"

namespace mirage {

// The Rust twin is runtime::megakernel::phased::State.
struct PhasedState {
  Columns columns;  // of the decode step
  uint32_t epoch;   // every epoch of the step is above this one
  uint32_t prefill_step;
  uint32_t parity;   // of the decode step
  uint32_t padding;  // fills the structure up to its alignment
  Candidate winners[Columns::kMax];
};

// What every kernel of the chain is given. The Rust twin is runtime::megakernel::phased::PhasedParams.
struct PhasedParams {
  Params params;
  PhasedState* state;
  float* saved;  // [CTAs, floats of the stream of one]
  uint64_t layer;
};

// Calls f(value, saved value) for all that this thread keeps of the stream.
template <class R, class X, class Mesh, int C, class F>
MIRAGE_DEVICE void for_each_saved(const Context<R>& x, Replicated<X, Mesh, C>& stream, float* saved, F f) {
  typedef Replicated<X, Mesh, C> S;
  constexpr int kValues = S::W::kColumns * S::kSteps * kValuesPerWord;
#pragma unroll 4
  for (int i = 0; i < kValues; i++) f(stream.mine[i * kConsumers], saved[i * kConsumers + x.at.thread]);
}
template <class R, class X, class Mesh, int C, class F>
MIRAGE_DEVICE void for_each_saved(const Context<R>& x, Scattered<X, Mesh, C>& stream, float* saved, F f) {
#pragma unroll
  for (int i = 0; i < kValuesPerWord; i++) f(stream.v[i], saved[i * kConsumers + x.at.thread]);
}
template <class R, class W, class Mesh, int C, int kWidest, class F>
MIRAGE_DEVICE void for_each_saved(const Context<R>& x, StreamRows<W, Mesh, C, kWidest>& stream, float* saved, F f) {
#pragma unroll
  for (int i = 0; i < kChunk; i++) f(stream.value.v[i], saved[i * kConsumers + x.at.thread]);
}
template <class K, class R, class S>
MIRAGE_DEVICE void load_stream(const Context<R>& x, S& stream, const PhasedParams& p) {
  for_each_saved(x, stream, p.saved + static_cast<size_t>(x.at.cta) * K::kSavedFloats,
                 [](float& value, float& saved) { value = saved; });
}
template <class K, class R, class S>
MIRAGE_DEVICE void save_stream(const Context<R>& x, S& stream, const PhasedParams& p) {
  for_each_saved(x, stream, p.saved + static_cast<size_t>(x.at.cta) * K::kSavedFloats,
                 [](float& value, float& saved) { saved = value; });
}

// The columns of the decode step.
template <class R>
MIRAGE_DEVICE void load_columns(Context<R>& x, const PhasedState& state) {
  if (x.at.thread < Columns::kMax) {
    const int c = x.at.thread;
    x.columns.slot[c] = state.columns.slot[c];
    x.columns.position[c] = state.columns.position[c];
    x.columns.token[c] = state.columns.token[c];
    x.columns.first[c] = state.columns.first[c];
    x.columns.logits[c] = state.columns.logits[c];
    begin_draws(x, c);
  }
  sync_consumers();
}

template <class Model>
MIRAGE_DEVICE Context<typename Model::Ring> context_of_chain(const Params& params, const Place& at, uint8_t* shared) {
  typedef RingStorage<typename Model::Ring> Storage;
  Storage& storage = *reinterpret_cast<Storage*>(shared + Model::Shared::kRingStorage);
  return context_of<Model>(params, at, shared, storage, Model::Shared::kPages);
}

// A kernel of a step's layers, or a head.
template <class Model, class K>
MIRAGE_DEVICE void run_phases(const PhasedParams& p) {
  typedef typename Model::Ring Ring;
  extern __shared__ __align__(128) uint8_t shared[];
  RingStorage<Ring>& storage = *reinterpret_cast<RingStorage<Ring>*>(shared + Model::Shared::kRingStorage);
  const Place at = place_of_this_thread<typename Model::Mesh>();
  if (at.thread == 0) init_ring(storage);
  __syncthreads();
  allow_next_kernel();
  if (at.warp == kConsumerWarps) {
    RingWriter<Ring> ring{storage, shared + Model::Shared::kPages, at.lane};
    K::fetch(ring, p.params, at.cta, static_cast<int>(p.layer));
    ring.drain();
    return;
  }
  await_previous_kernel();
  Context<Ring> x = context_of_chain<Model>(p.params, at, shared);
  if (K::kPrefill)
    begin_prefill_step(x, K::C, p.params.prefill + p.state->prefill_step * K::C);
  else
    load_columns(x, *p.state);
  if constexpr (K::kPrefill ? Model::kPrefillRows : Model::kDecodeRows)
    count_columns<K::C>(x);
  else
    load_rope<Model, K::C>(x);
  sync_consumers();
  K::run(x, p, static_cast<int>(p.layer), p.state->epoch);
}

// Of all CTAs: forgets what the sampler counted in an earlier generation.
template <class Model>
MIRAGE_DEVICE void begin_generation(const PhasedParams& p) {
  const Place at = place_of_this_thread<typename Model::Mesh>();
  if (at.warp < kConsumerWarps) clear_histograms<Model>(p.params, at);
}

// Of one CTA: the next prefill step, after all but the last.
template <class Model>
MIRAGE_DEVICE void end_prefill_step(const PhasedParams& p) {
  allow_next_kernel();
  await_previous_kernel();
  if (threadIdx.x == 0) {
    p.state->epoch += Model::kStepEpochs;
    p.state->prefill_step++;
  }
}

// Of all CTAs: the token of every column.
template <class Model>
MIRAGE_DEVICE void choose_tokens(const PhasedParams& p) {
  typedef typename Model::Mesh Mesh;
  constexpr int C = Model::kDecodeColumns;
  extern __shared__ __align__(128) uint8_t shared[];
  const Place at = place_of_this_thread<Mesh>();
  allow_next_kernel();
  if (at.warp == kConsumerWarps) return;
  await_previous_kernel();
  Context<typename Model::Ring> x = context_of_chain<Model>(p.params, at, shared);
  load_columns(x, *p.state);
  const uint32_t parity = p.state->parity, last = p.state->epoch + Model::kLayers + 1;
  collect_candidates<typename Model::Head, C, Mesh>(x, candidates_of<Model>(p.params, parity), last);
  sample_columns<Model>(x, last);
  if (at.cta == 0 && at.thread < C) p.state->winners[at.thread] = winners_of<C>(x)[at.thread];
}

// Of one CTA: every column's next position.
template <class Model>
MIRAGE_DEVICE void end_decode_step(const PhasedParams& p) {
  constexpr int C = Model::kDecodeColumns;
  extern __shared__ __align__(128) uint8_t shared[];
  const Place at = place_of_this_thread<typename Model::Mesh>();
  allow_next_kernel();
  if (at.warp == kConsumerWarps) return;
  await_previous_kernel();
  Context<typename Model::Ring> x = context_of_chain<Model>(p.params, at, shared);
  load_columns(x, *p.state);
  if (at.thread < C) winners_of<C>(x)[at.thread] = p.state->winners[at.thread];
  sync_consumers();
  advance<Model>(x);
  if (at.thread < C) {
    const int c = at.thread;
    p.state->columns.slot[c] = x.columns.slot[c];
    p.state->columns.position[c] = x.columns.position[c];
    p.state->columns.token[c] = x.columns.token[c];
    p.state->columns.logits[c] = x.columns.logits[c];
  }
  if (at.thread == 0) {
    p.state->epoch += Model::kStepEpochs;
    p.state->parity ^= 1;
  }
}

}  // namespace mirage
