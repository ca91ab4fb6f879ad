// The generation loop: prefill steps, wide ones first, then decode steps until every sequence has ended, all in one
// launch. The last prefill step holds the last position of every prompt and makes its first token; without prefill
// steps (scoring) the first decode step does. Every CTA runs it in step with all others; what differs from model to
// model is in Model, which the compiler writes.
//
// Model: Mesh, Ring, Shared (regions of shared memory), Head, kPrefillColumns, kDecodeColumns, kPrefillRows and
// kDecodeRows (whether such steps exchange rows), kWideColumns (0: no wide prefill steps) and WideRing, kStepEpochs,
// word offsets, and the phases: stream_layer, prefill_layers, wide_layers, decode_layers.
#pragma once
#include "attention.cuh"
#include "attention_rows.cuh"
#include "exchange.cuh"
#include "head.cuh"
#include "linear.cuh"
#include "residual.cuh"
#include "rows.cuh"
#include "sampling.cuh"
#include "stream_rows.cuh"

namespace mirage {

// Asks for the weights of a CTA's part of the layers. False when the consumers have stopped.
template <class Model, class R>
MIRAGE_DEVICE bool stream_layers(RingWriter<R>& ring, const uint8_t*& source, int cta) {
  typedef typename Model::Mesh Mesh;
  bool more = true;
  if (cta < Mesh::kWorkers)
#pragma unroll 1
    for (int layer = 0; more && layer < Model::kLayers; layer++)
      more = Model::stream_layer(ring, source, cta / Mesh::kMembers, cta % Mesh::kMembers);
  return more;
}

// The producer warp.
template <class Model>
MIRAGE_DEVICE void stream_weights(const Params& params, uint8_t* shared, int cta, int lane) {
  typedef typename Model::Mesh Mesh;
  typedef typename Model::Ring Ring;
  typedef typename Model::Shared Shared;
  // A small model leaves some CTAs without weights.
  if (params.stream_offsets[cta] == params.stream_offsets[cta + 1]) return;
  const uint8_t* stream = params.weights + params.stream_offsets[cta];
  const Slice head = head_slice<typename Model::Head, Mesh>(cta);
  RingWriter<Ring> ring{*reinterpret_cast<RingStorage<Ring>*>(shared + Shared::kRingStorage), shared + Shared::kPages,
                        lane};
  if constexpr (Model::kWideColumns > 0) {
    typedef typename Model::WideRing Wide;
    RingWriter<Wide> wide{*reinterpret_cast<RingStorage<Wide>*>(shared + Shared::kWideRingStorage),
                          shared + Shared::kWidePages, lane};
    bool more = true;
#pragma unroll 1
    for (uint32_t step = 0; more && step < params.wide_steps; step++) {
      const uint8_t* source = stream;
      more = stream_layers<Model>(wide, source, cta);
    }
    wide.drain();
    if (!more || (params.wide_steps > 0 && !ring.await_hand_over())) return;
  }
  // The last prefill step makes tokens, and so does every step after it.
  const bool wide_last = params.wide_steps > 0 && params.prefill_steps == 0;
#pragma unroll 1
  for (uint32_t step = 0;; step++) {
    const uint8_t* source = stream;
    bool more = true;
    if (step > 0 || !wide_last)
      more = stream_layers<Model>(ring, source, cta);
    else  // The head's weights come last.
      source = params.weights + params.stream_offsets[cta + 1] - bytes_of(head);
    if (more && step + 1 >= params.prefill_steps)
      more = stream_linear<typename Model::Head>(ring, source, head, Ring::kHeadInFlight);
    if (!more) break;
  }
  ring.drain();
}

// {cos, sin} of every column's position, for attention of words.
template <class Model, int C, class R>
MIRAGE_DEVICE void load_rope(Context<R>& x) {
  constexpr int kPairs = Model::kRopePairs;
#pragma unroll 1
  for (int i = x.at.thread; i < C * kPairs; i += kConsumers)
    x.rope[i] = x.params.rope[static_cast<size_t>(x.columns.position[i / kPairs]) * kPairs + i % kPairs];
}

// Whether the host has cancelled: known to the first threads of CTA 0, and told to all others by the step's words.
template <class R>
MIRAGE_DEVICE uint32_t cancelled_by_host(const Context<R>& x) {
  uint32_t cancelled = 0;
  if (x.at.cta == 0 && x.at.thread < Columns::kMax)
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(cancelled) : "l"(x.params.cancel));
  return cancelled;
}

template <class R>
MIRAGE_DEVICE void begin_prefill_step(Context<R>& x, int columns, const PrefillColumn* of_step) {
  if (x.at.thread < columns) {
    const PrefillColumn column = of_step[x.at.thread];
    x.columns.slot[x.at.thread] = column.slot;
    x.columns.position[x.at.thread] = column.position;
    x.columns.token[x.at.thread] = column.token;
    x.columns.first[x.at.thread] = column.first;
    x.columns.logits[x.at.thread] = nullptr;
  }
  sync_consumers();
}

// Where a column's logits of its current position go: the caller's dump, else the sampler's scratch, else nowhere.
template <class Model>
MIRAGE_DEVICE float* logits_of(const Params& params, int slot, uint32_t position) {
  const Sequence& q = params.sequences[slot];
  if (q.logits_row >= 0)
    return params.logits_dump + (static_cast<size_t>(q.logits_row) + position) * Model::Head::kVocab;
  if (q.inverse_temperature > 0.f) return params.logits + static_cast<size_t>(slot) * Model::Head::kVocab;
  return nullptr;
}

// Sets the decode columns to the first positions with logits.
template <class Model, class R>
MIRAGE_DEVICE void begin_decode(Context<R>& x) {
  const int c = x.at.thread;
  if (c < Model::kDecodeColumns) {
    const bool on = c < static_cast<int>(x.params.batch);
    const uint32_t position = on ? x.params.sequences[c].first_logits : 0;
    x.columns.slot[c] = on ? c : -1;
    x.columns.position[c] = position;
    x.columns.token[c] = on ? x.params.prompts[c * Model::kMaxSeq + position] : 0;
    x.columns.first[c] = c;
    x.columns.logits[c] = on ? logits_of<Model>(x.params, c, position) : nullptr;
    begin_draws(x, c);
  }
  sync_consumers();
}

// Turns the columns of the last prefill step into those of a decode step after its layers: a sequence's last position
// becomes the column of its slot, with its row of the head's input. P: columns of the prefill step.
template <class Model, int P, class R>
MIRAGE_DEVICE void end_prefill(Context<R>& x) {
  constexpr int C = Model::kDecodeColumns;
  static_assert(P >= C, "the last prefill step holds the last position of every sequence");
  // Sequences come in the order of their slots: a row moves to a lower place, or stays.
  int* last = reinterpret_cast<int*>(x.scratch);
  const int c = x.at.thread;
  if (c < P) {
    const int slot = x.columns.slot[c];
    if (slot >= 0 && (c + 1 == P || x.columns.slot[c + 1] != slot)) last[slot] = c;
  }
  sync_consumers();
  const int batch = static_cast<int>(x.params.batch);
  const float squares = c < batch ? sum_of_squares<P>(x.sum_squares, last[c]) : 0.f;
  constexpr int kStride = padded(Model::Head::kWidth) / 8;  // of a row, in threads' 16 bytes
  uint4* rows = reinterpret_cast<uint4*>(x.activation);
#pragma unroll 1
  for (int i = c; i < kStride; i += kConsumers)
#pragma unroll 1
    for (int slot = 0; slot < batch; slot++) rows[slot * kStride + i] = rows[last[slot] * kStride + i];
  sync_consumers();
  if (c < C)
#pragma unroll
    for (int w = 0; w < WarpsOfColumns<C>::kWarps; w++) x.sum_squares[c * kConsumerWarps + w] = w == 0 ? squares : 0.f;
  begin_decode<Model>(x);
}

// Moves every column to its next position: the next token is given or the winner. True while any sequence goes on.
template <class Model, class R>
MIRAGE_DEVICE bool advance(Context<R>& x) {
  const int c = x.at.thread;
  if (c < Model::kDecodeColumns && x.columns.slot[c] >= 0) {
    const Sequence& q = x.params.sequences[c];
    const uint32_t next = x.columns.position[c] + 1;
    uint32_t token = winners_of<Model::kDecodeColumns>(x)[c].token;
    bool on = true;
    if (next < q.prompt_length) {
      token = x.params.prompts[c * Model::kMaxSeq + next];
    } else {
      const uint32_t made = next - q.prompt_length;
      if (x.at.cta == 0)
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(x.params.tokens_out + c * Model::kMaxSeq + made),
                     "r"(token + 1)
                     : "memory");
      on = made + 1 < q.max_new && next < Model::kMaxSeq;
#pragma unroll 1
      for (uint32_t i = 0; i < q.stop_count; i++) on &= token != x.params.stop_tokens[q.stop_begin + i];
    }
    x.columns.slot[c] = on ? c : -1;
    x.columns.token[c] = on ? token : 0;
    x.columns.position[c] = on ? next : 0;
    x.columns.logits[c] = on ? logits_of<Model>(x.params, c, next) : nullptr;
    begin_draws(x, c);
  }
  sync_consumers();
  bool any = false;
#pragma unroll 1
  for (int i = 0; i < Model::kDecodeColumns; i++) any |= x.columns.slot[i] >= 0;
  return any;
}

template <class Model, class R>
MIRAGE_DEVICE Context<R> context_of(const Params& params, const Place& at, uint8_t* shared, RingStorage<R>& storage,
                                    int pages_at) {
  typedef typename Model::Shared Shared;
  return Context<R>{params,
                    at,
                    RingReader<R>{storage, shared + pages_at},
                    *reinterpret_cast<Columns*>(shared + Shared::kColumns),
                    *reinterpret_cast<Draws*>(shared + Shared::kDraws),
                    reinterpret_cast<bf16*>(shared + Shared::kActivation),
                    reinterpret_cast<float*>(shared + Shared::kScratch),
                    reinterpret_cast<float*>(shared + Shared::kSumSquares),
                    reinterpret_cast<float2*>(shared + Shared::kRope),
                    reinterpret_cast<float*>(shared + Shared::kStream)};
}

// By the parity of the step: a CTA without a part of the layers may still read the last step's candidates while the
// others write this step's.
template <class Model>
MIRAGE_DEVICE uint4* candidates_of(const Params& params, uint32_t parity) {
  return params.exchange + Model::kCandidatesAt +
         parity * CandidateWords<Model::kDecodeColumns, typename Model::Mesh>::kOfStep;
}

template <class Model>
MIRAGE_DEVICE uint64_t* histograms_of(const Params& params) {
  return reinterpret_cast<uint64_t*>(params.exchange + Model::kHistogramsAt);
}

template <class Model>
MIRAGE_DEVICE void clear_histograms(const Params& params, const Place& at) {
  constexpr int kAll = Histograms<Model::kDecodeColumns>::kAll;
#pragma unroll 1
  for (int i = at.cta * kConsumers + at.thread; i < kAll; i += Model::Mesh::kCtas * kConsumers)
    histograms_of<Model>(params)[i] = 0;
}

// What candidates do not choose.
template <class Model, class R>
MIRAGE_DEVICE void sample_columns(Context<R>& x, uint32_t epoch) {
  uint4* exchange = x.params.exchange;
  sample<typename Model::Head, Model::kDecodeColumns, typename Model::Mesh>(
      x, exchange + Model::kSumsAt, histograms_of<Model>(x.params), exchange + Model::kSamplesAt,
      exchange + Model::kBarrierAt, epoch);
}

// The prefill steps of one width. The last step of all leaves its columns to the head. True when the host has
// cancelled.
template <class Model, bool kWide, class R>
MIRAGE_DEVICE bool prefill(Context<R>& x, uint32_t& epoch) {
  typedef typename Model::Mesh Mesh;
  constexpr int P = kWide ? Model::kWideColumns : Model::kPrefillColumns;
  const Params& params = x.params;
  const uint32_t steps = kWide ? params.wide_steps : params.prefill_steps;
  const PrefillColumn* columns = params.prefill + (kWide ? 0 : params.wide_steps * Model::kWideColumns);
#pragma unroll 1
  for (uint32_t step = 0; step < steps; step++) {
    const uint32_t cancelled = cancelled_by_host(x);
    const bool last = step + 1 == steps && !(kWide && params.prefill_steps > 0);
    x.mark(Mark::kPrefillStep);
    begin_prefill_step(x, P, columns + step * P);
    if constexpr (kWide || Model::kPrefillRows) count_columns<P>(x);
    if constexpr (!kWide && !Model::kPrefillRows) load_rope<Model, P>(x);
    sync_consumers();
    if (x.at.cta < Mesh::kWorkers || last) {
      if constexpr (kWide)
        Model::wide_layers(x, epoch);
      else
        Model::prefill_layers(x, epoch);
    }
    if (last) {
      end_prefill<Model, P>(x);
      break;
    }
    // The next step reads the cache rows that other CTAs wrote in this one.
    if (grid_barrier<Mesh>(x, params.exchange + Model::kBarrierAt, epoch + Model::kLayers + 1, cancelled)) return true;
    epoch += Model::kStepEpochs;
  }
  return false;
}

template <class Model>
MIRAGE_DEVICE void generate(const Params& params) {
  typedef typename Model::Mesh Mesh;
  typedef typename Model::Ring Ring;
  typedef typename Model::Shared Shared;
  constexpr int C = Model::kDecodeColumns;
  extern __shared__ __align__(128) uint8_t shared[];
  RingStorage<Ring>& storage = *reinterpret_cast<RingStorage<Ring>*>(shared + Shared::kRingStorage);
  const Place at = place_of_this_thread<Mesh>();
  if (at.thread == 0) {
    init_ring(storage);
    if constexpr (Model::kWideColumns > 0)
      init_ring(*reinterpret_cast<RingStorage<typename Model::WideRing>*>(shared + Shared::kWideRingStorage));
  }
  __syncthreads();
  if (at.warp == kConsumerWarps) {
    stream_weights<Model>(params, shared, at.cta, at.lane);
    return;
  }
  Trace trace;
#ifdef MIRAGE_TRACE
  if (at.thread == 0) {
    trace.next = params.trace + static_cast<size_t>(at.cta) * params.trace_events;
    trace.end = trace.next + params.trace_events;
  }
#endif
  clear_histograms<Model>(params, at);

  uint32_t epoch = params.epoch;
  if constexpr (Model::kWideColumns > 0) {
    typedef typename Model::WideRing Wide;
    if (params.wide_steps > 0) {
      RingStorage<Wide>& wide = *reinterpret_cast<RingStorage<Wide>*>(shared + Shared::kWideRingStorage);
      Context<Wide> x = context_of<Model>(params, at, shared, wide, Shared::kWidePages);
      x.trace = trace;
      if (prefill<Model, true>(x, epoch)) {
        if (at.thread == 0) wide.stop = storage.stop = 1;
        return;
      }
      trace = x.trace;
      hand_over(storage, at.lane);
    }
  }
  Context<Ring> x = context_of<Model>(params, at, shared, storage, Shared::kPages);
  x.trace = trace;
  if (prefill<Model, false>(x, epoch)) {
    if (at.thread == 0) storage.stop = 1;
    return;
  }
  bool prefilled = params.wide_steps + params.prefill_steps > 0;
  if (!prefilled) begin_decode<Model>(x);
#pragma unroll 1
  for (;; epoch += Model::kStepEpochs) {
    if (!prefilled) {
      x.mark(Mark::kDecodeStep);
      if constexpr (Model::kDecodeRows)
        count_columns<C>(x);
      else
        load_rope<Model, C>(x);
      sync_consumers();
      Model::decode_layers(x, epoch);
    }
    prefilled = false;
    const uint32_t last = epoch + Model::kLayers + 1;
    const uint32_t parity = epoch / Model::kStepEpochs % 2;
    uint4* candidates = candidates_of<Model>(params, parity);
    x.mark(Mark::kHead);
    lm_head<typename Model::Head, C, Mesh>(x, candidates, cancelled_by_host(x) != 0, last);
    prefetch_logits<typename Model::Head, C, Mesh>(x);
    x.mark(Mark::kLogits);
    const bool stop = collect_candidates<typename Model::Head, C, Mesh>(x, candidates, last);
    x.mark(Mark::kCandidates);
    sample_columns<Model>(x, last);
    x.mark(Mark::kChosen);
    if (!advance<Model>(x) || stop) break;
  }
  if (at.thread == 0) storage.stop = 1;
}

}  // namespace mirage
