// The residual stream: f32, updated by the linears that add to it, and handed on to the next linear as bf16 with the
// norm's gamma applied. The norm's scale, one number a column, follows in that linear's epilogue, so RMSNorm costs no
// step.
//
// Two forms, chosen by the planner for each kind of step:
// - Replicated: every worker sums all partials of all elements (an all-reduce in one hop) and keeps the whole stream;
//   good for few columns and narrow streams.
// - Scattered: every worker sums the partials of its share (reduce-scatter), keeps that share, and publishes it as the
//   next linear's operand, with its sum of squares, for all to collect (all-gather): a hop more, a small part of the
//   volume, and gamma is multiplied once.
#pragma once
#include "context.cuh"
#include "exchange.cuh"
#include "linear.cuh"
#include "words.cuh"

namespace mirage {

// N, the linear that multiplies the stream next: kNorm, kNormWidth, kWidth, kGammaAt (element of Params::norms, of
// layer 0), kGammaStride (a layer's elements).
template <class N>
MIRAGE_DEVICE const bf16* gamma_of(const Params& params, int layer) {
  return params.norms + N::kGammaAt + static_cast<size_t>(layer) * N::kGammaStride;
}

// The pairs of a span of bf16, asked for before they are needed.
struct Pairs {
  uint32_t pairs[kValuesPerWord / 2];
};
MIRAGE_DEVICE Pairs load_pairs(const bf16* row, const Span& span, uint32_t otherwise) {
  Pairs p;
#pragma unroll
  for (int i = 0; i < kValuesPerWord / 2; i++) {
    p.pairs[i] = otherwise;
    if (2 * i < span.count) p.pairs[i] = *reinterpret_cast<const uint32_t*>(row + span.begin + 2 * i);
  }
  return p;
}
MIRAGE_DEVICE Values unpack(const Pairs& p) { return unpack(make_uint4(p.pairs[0], p.pairs[1], p.pairs[2], 0)); }

template <class N>
MIRAGE_DEVICE Pairs load_gamma(const bf16* gamma, const Span& span) {
  return load_pairs(gamma, N::kNorm ? span : Span{0, 0}, 0x3f803f80);  // {1, 1}
}

// Writes a span of one column of the stream as the next linear's operand and returns its part of the sum of squares.
MIRAGE_DEVICE float store_normed(bf16* row, const Span& span, const float (&v)[kValuesPerWord], const Pairs& gamma) {
  float squares = 0.f;
#pragma unroll
  for (int e = 0; e < kValuesPerWord; e += 2)
    if (e < span.count) {
      const uint32_t g = gamma.pairs[e / 2];
      *reinterpret_cast<uint32_t*>(row + span.begin + e) = pack(v[e] * low_half(g), v[e + 1] * high_half(g));
      squares += v[e] * v[e] + v[e + 1] * v[e + 1];
    }
  return squares;
}

template <int C, class R>
MIRAGE_DEVICE void store_sum_squares(Context<R>& x, int column, float squares) {
  squares = warp_sum(squares);
  if (x.at.lane == 0) x.sum_squares[column * kConsumerWarps + WarpsOfColumns<C>::part(x.at)] = squares;
}

// X: the exchange of the linears that write the stream (they share one placement). Every thread keeps the units that
// collect_all would give it, in shared memory that no other thread touches: [columns of a warp, steps, values,
// threads].
template <class X, class Mesh, int C>
struct Replicated {
  typedef Producers<X, Mesh> P;
  typedef WarpsOfColumns<C> W;
  static constexpr int kSteps = ceil_div(P::kUnits, W::kStride);
  float* mine;

  template <class R>
  MIRAGE_DEVICE explicit Replicated(const Context<R>& x) : mine(x.stream + x.at.thread) {}

  // Value e of unit s of the warp's column i.
  MIRAGE_DEVICE float& value(int i, int s, int e) const {
    return mine[((i * kSteps + s) * kValuesPerWord + e) * kConsumers];
  }

  // Runs f(column index, step, column, unit, span) for this thread's units; the first is a constant after
  // unrolling.
  template <class F>
  MIRAGE_DEVICE static void for_each(const Place& at, F f) {
#pragma unroll
    for (int i = 0; i < W::kColumns; i++)
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        const int unit = s * W::kStride + W::lane(at);
        if (unit < P::kUnits) {
          const Span span = span_of_unit<X, Mesh>(P::of_unit(unit / X::Source::kWords, at), unit % X::Source::kWords);
          f(i, s, W::column(at, i), unit, span);
        }
      }
  }
};

// Prepares the first linear's operand from the embeddings of the step's tokens, and gives each unit's values to
// keep(column index, step, values).
template <class N, class X, class Mesh, int C, class R, class Keep>
MIRAGE_DEVICE void embed_columns(Context<R>& x, const bf16* gamma, Keep keep) {
  typedef Replicated<X, Mesh, C> S;
  constexpr int kBatch = batch_of(S::kSteps, 6);
#pragma unroll 1
  for (int i = 0; i < S::W::kColumns; i++) {
    const int column = S::W::column(x.at, i);
    const bf16* row = x.params.embedding + static_cast<size_t>(x.columns.token[column]) * N::kNormWidth;
    float squares = 0.f;
#pragma unroll 1
    for (int s0 = 0; s0 < S::kSteps; s0 += kBatch) {
      Span spans[kBatch];
      Pairs values[kBatch], gammas[kBatch];
#pragma unroll
      for (int s = 0; s < kBatch; s++) {
        const int unit = (s0 + s) * S::W::kStride + S::W::lane(x.at);
        spans[s] = Span{0, 0};
        if (s0 + s < S::kSteps && unit < S::P::kUnits)
          spans[s] = span_of_unit<X, Mesh>(S::P::of_unit(unit / X::Source::kWords, x.at), unit % X::Source::kWords);
        values[s] = load_pairs(row, spans[s], 0);
        gammas[s] = load_gamma<N>(gamma, spans[s]);
      }
#pragma unroll
      for (int s = 0; s < kBatch; s++) {
        const Values v = unpack(values[s]);
        if (s0 + s < S::kSteps) keep(i, s0 + s, v);
        squares += store_normed(x.activation + column * padded(N::kWidth), spans[s], v.v, gammas[s]);
      }
    }
    store_sum_squares<C>(x, column, squares);
  }
}

// Starts the stream with the embeddings of the step's tokens and prepares the first linear's operand.
template <class N, class X, class Mesh, int C, class R>
MIRAGE_DEVICE void embed(Context<R>& x, Replicated<X, Mesh, C>& stream, const bf16* gamma) {
  embed_columns<N, X, Mesh, C>(x, gamma, [&](int i, int s, const Values& values) {
#pragma unroll
    for (int e = 0; e < kValuesPerWord; e++) stream.value(i, s, e) = values.v[e];
  });
  sync_consumers();
}

// Adds what linear X::Source published and prepares the operand of the linear N with that gamma.
template <class N, class X, class Shared, class Mesh, int C, class R>
MIRAGE_DEVICE void add_to_stream(Context<R>& x, Replicated<Shared, Mesh, C>& stream, const bf16* gamma,
                                 uint32_t epoch) {
  x.begin_phase();
  typedef Replicated<Shared, Mesh, C> S;
  constexpr int kBatch = batch_of(S::kSteps, kWordsInFlight / S::P::kPartials);
#pragma unroll 1
  for (int i = 0; i < S::W::kColumns; i++) {
    const int column = S::W::column(x.at, i);
    float squares = 0.f;
#pragma unroll 1
    for (int s0 = 0; s0 < S::kSteps; s0 += kBatch) {
      int units[kBatch];
      Span spans[kBatch];
      Pairs gammas[kBatch];
      Values sums[kBatch];
#pragma unroll
      for (int s = 0; s < kBatch; s++) {
        const int unit = (s0 + s) * S::W::kStride + S::W::lane(x.at);
        units[s] = -1;
        spans[s] = Span{0, 0};
        if (s0 + s < S::kSteps && unit < S::P::kUnits) {
          spans[s] = span_of_unit<X, Mesh>(Producers<X, Mesh>::of_unit(unit / X::Source::kWords, x.at),
                                           unit % X::Source::kWords);
          if (spans[s].count > 0) units[s] = unit;
        }
        gammas[s] = load_gamma<N>(gamma, spans[s]);
      }
      collect_units<X, Mesh>(sums, units, column, C, epoch, x.params.exchange, x.at);
#pragma unroll
      for (int s = 0; s < kBatch; s++)
        if (s0 + s < S::kSteps && units[s] >= 0) {
#pragma unroll
          for (int e = 0; e < kValuesPerWord; e++) {
            sums[s].v[e] += stream.value(i, s0 + s, e);
            stream.value(i, s0 + s, e) = sums[s].v[e];
          }
          squares += store_normed(x.activation + column * padded(N::kWidth), spans[s], sums[s].v, gammas[s]);
        }
    }
    store_sum_squares<C>(x, column, squares);
  }
  sync_consumers();
}

// The stream as it is handed on: the words of the next linear's operand, [columns, units], then sums of squares in f32,
// a word a run, [columns, runs]. A run is what one pass of one producer gives of a column.
template <class X, class Mesh, int C>
struct Gathered {
  typedef Producers<X, Mesh> P;
  static constexpr int kPasses = X::Source::kPasses;
  static constexpr int kRunsOfColumn = P::kConcat * kPasses;
  static constexpr int kRuns = kRunsOfColumn * C;
  MIRAGE_DEVICE static int operand(int unit, int column) { return column * P::kUnits + unit; }
  MIRAGE_DEVICE static int squares(int run, int column) { return C * P::kUnits + column * kRunsOfColumn + run; }
};

// Collects a handed-on stream at `words` as the operand of linear N.
template <class N, class X, class Mesh, int C, class R>
MIRAGE_DEVICE void gather_stream(Context<R>& x, const uint4* words, uint32_t epoch) {
  x.begin_phase();
  typedef Producers<X, Mesh> P;
  typedef Gathered<X, Mesh, C> G;
  typedef WarpsOfColumns<C> W;
  // Each round more is a trip to L2 more.
  constexpr int kSteps = ceil_div(P::kUnits, W::kStride), kBatch = batch_of(kSteps, 6);
  constexpr int kSums = ceil_div(G::kRunsOfColumn, W::kStride);
#pragma unroll 1
  for (int i = 0; i < W::kColumns; i++) {
    const int column = W::column(x.at, i);
    bf16* row = x.activation + column * padded(N::kWidth);
    float squares = 0.f;
#pragma unroll 1
    for (int s0 = 0; s0 < kSteps; s0 += kBatch) {
      int from[kBatch + kSums];
      uint4 got[kBatch + kSums];
      Span spans[kBatch];
#pragma unroll
      for (int s = 0; s < kBatch; s++) {
        const int unit = (s0 + s) * W::kStride + W::lane(x.at);
        spans[s] = Span{0, 0};
        if (unit < P::kUnits)
          spans[s] = span_of_unit<X, Mesh>(P::of_unit(unit / X::Source::kWords, x.at), unit % X::Source::kWords);
        from[s] = spans[s].count > 0 ? G::operand(unit, column) : -1;
      }
#pragma unroll
      for (int s = 0; s < kSums; s++) {
        const int run = s * W::kStride + W::lane(x.at);
        from[kBatch + s] = s0 == 0 && run < G::kRunsOfColumn ? G::squares(run, column) : -1;
      }
      await_words(got, words, from, epoch);
#pragma unroll
      for (int s = 0; s < kBatch; s++)
        if (from[s] >= 0) {
          uint32_t* to = reinterpret_cast<uint32_t*>(row + spans[s].begin);
          to[0] = got[s].x;
          if (spans[s].count > 2) to[1] = got[s].y;
          if (spans[s].count > 4) to[2] = got[s].z;
        }
#pragma unroll
      for (int s = 0; s < kSums; s++)
        if (from[kBatch + s] >= 0) squares += __uint_as_float(scalar_of(got[kBatch + s]));
    }
    store_sum_squares<C>(x, column, squares);
  }
  sync_consumers();
}

// Hands the operand of linear N, which the replicated stream was prepared for, on to the CTAs that hold no part of the
// layers and only help with the head.
template <class N, class X, class Mesh, int C, class R>
MIRAGE_DEVICE void publish_stream(Context<R>& x, uint4* words, uint32_t epoch) {
  typedef Gathered<X, Mesh, C> G;
  Replicated<X, Mesh, C>::for_each(x.at, [&](int, int, int column, int unit, const Span& span) {
    const bf16* row = x.activation + column * padded(N::kWidth);
    const Pairs pairs = load_pairs(row, span, 0);
    if (span.count > 0)
      store_word(words + G::operand(unit, column), pairs.pairs[0], pairs.pairs[1], pairs.pairs[2], epoch);
  });
  // The whole sum stands in a column's first run.
#pragma unroll 1
  for (int i = x.at.thread; i < G::kRuns; i += kConsumers) {
    const int run = i / C, column = i % C;
    const float squares = run == 0 ? sum_of_squares<C>(x.sum_squares, column) : 0.f;
    store_scalar(words + G::squares(run, column), __float_as_uint(squares), epoch);
  }
}

// The share of a worker: some runs, each in a slot of a warp's lanes, a unit to kLanes neighbouring lanes, which split
// its partials among them.
template <class X, class Mesh, int C>
struct Scattered {
  typedef Producers<X, Mesh> P;
  typedef Gathered<X, Mesh, C> G;
  static constexpr int kPassWords = X::Source::kPassWords;
  static constexpr int kShare = ceil_div(G::kRuns, Mesh::kWorkers);
  static constexpr int slot_of(int lanes) {
    int slot = lanes;
    while (slot < kPassWords * lanes) slot *= 2;
    return slot;
  }
  static constexpr bool fits(int lanes) { return slot_of(lanes) <= kWarp && kShare <= kConsumers / slot_of(lanes); }
  static_assert(fits(1), "a worker's share of the stream must fit its threads");
  static constexpr int lanes() {
    int lanes = 1;
    while (lanes < P::kPartials && fits(2 * lanes)) lanes *= 2;
    return lanes;
  }
  static constexpr int kLanes = lanes(), kSlot = slot_of(kLanes);
  float v[kValuesPerWord];
  // What this thread works on; run < 0 or unit < 0: nothing.
  int run, unit, column, lane;
  Span span;

  MIRAGE_DEVICE explicit Scattered(const Place& at) : run(-1), unit(-1), column(0), lane(at.lane % kLanes), span{0, 0} {
    const Share share = share_of(G::kRuns, Mesh::kWorkers, at.cta);
    const int mine = at.thread / kSlot, word = at.thread % kSlot / kLanes;
    if (mine >= share.count) return;
    run = (share.begin + mine) / C;
    column = (share.begin + mine) % C;
    if (word >= kPassWords) return;
    const int producer = run / G::kPasses, of_producer = run % G::kPasses * kPassWords + word;
    span = span_of_unit<X, Mesh>(P::of_unit(producer, at), of_producer);
    if (span.count > 0) unit = producer * X::Source::kWords + of_producer;
  }
};

template <class N, class X, class Mesh, int C, class R>
MIRAGE_DEVICE void embed(Context<R>& x, Scattered<X, Mesh, C>& stream, const bf16* gamma) {
  embed_columns<N, X, Mesh, C>(x, gamma, [](int, int, const Values&) {});
  if (stream.unit >= 0) {
    const bf16* row = x.params.embedding + static_cast<size_t>(x.columns.token[stream.column]) * N::kNormWidth;
    const Values values = unpack(load_pairs(row, stream.span, 0));
#pragma unroll
    for (int e = 0; e < kValuesPerWord; e++) stream.v[e] = values.v[e];
  }
  sync_consumers();
}

// Reduce-scatter: adds the partials of this worker's share and hands it on at `words` as the operand of the linear N
// with that gamma.
template <class N, class X, class Shared, class Mesh, int C, class R>
MIRAGE_DEVICE void reduce_scatter(Context<R>& x, Scattered<Shared, Mesh, C>& stream, uint4* words, const bf16* gamma,
                                  uint32_t epoch) {
  x.begin_phase();
  asm volatile("" : "+r"(stream.unit), "+r"(stream.column), "+r"(stream.lane));  // as begin_phase
  typedef Scattered<Shared, Mesh, C> S;
  typedef Gathered<Shared, Mesh, C> G;
  typedef Producers<X, Mesh> P;
  constexpr int kMine = ceil_div(P::kPartials, S::kLanes), kBatch = batch_of(kMine, kWordsInFlight);
  const P producer = P::of_unit(max_of(stream.unit, 0) / X::Source::kWords, x.at);
  const int offset = stream.column * X::Source::kWords + max_of(stream.unit, 0) % X::Source::kWords;
  const Values factors = unpack(load_gamma<N>(gamma, stream.span));
  Values sum{{0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
  for (int b = 0; b < kMine; b += kBatch) {
    int from[kBatch];
    uint4 got[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int partial = (b + i) * S::kLanes + stream.lane;
      from[i] = stream.unit >= 0 && partial < P::kPartials ? producer.words(partial, C) + offset : -1;
    }
    await_words(got, x.params.exchange, from, epoch);
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      if (from[i] >= 0) {
        const Values part = unpack(got[i]);
#pragma unroll
        for (int e = 0; e < kValuesPerWord; e++) sum.v[e] += part.v[e];
      }
  }
#pragma unroll
  for (int e = 0; e < kValuesPerWord; e++)
#pragma unroll
    for (int o = S::kLanes / 2; o > 0; o /= 2) sum.v[e] += __shfl_xor_sync(~0u, sum.v[e], o);
  float squares = 0.f;
  if (stream.unit >= 0) {
    float z[kValuesPerWord];
#pragma unroll
    for (int e = 0; e < kValuesPerWord; e++) {
      stream.v[e] += sum.v[e];
      z[e] = stream.v[e] * factors.v[e];
      if (stream.lane == 0) squares += stream.v[e] * stream.v[e];
    }
    if (stream.lane == 0)
      store_word(words + G::operand(stream.unit, stream.column), pack(z[0], z[1]), pack(z[2], z[3]), pack(z[4], z[5]),
                 epoch);
  }
#pragma unroll
  for (int o = S::kSlot / 2; o > 0; o /= 2) squares += __shfl_xor_sync(~0u, squares, o);
  if (stream.run >= 0 && x.at.lane % S::kSlot == 0)
    store_scalar(words + G::squares(stream.run, stream.column), __float_as_uint(squares), epoch);
}

}  // namespace mirage
