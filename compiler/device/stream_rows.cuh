// The residual stream of steps that exchange rows: every worker adds up the partial sums of its share and hands it on
// with the norm's gamma applied, for all to copy (a reduce-scatter, then an all-gather).
//
// L, a linear that writes the stream, has besides: kStreamRowsAt and kStreamFlagsAt, where the stream after it lies.
#pragma once
#include "residual.cuh"
#include "rows.cuh"

namespace mirage {

// Elements of a 16-byte load.
constexpr int kChunk = 8;
struct Chunk {
  float v[kChunk];
};
MIRAGE_DEVICE Chunk unpack_chunk(const uint4& c) {
  return Chunk{{low_half(c.x), high_half(c.x), low_half(c.y), high_half(c.y), low_half(c.z), high_half(c.z),
                low_half(c.w), high_half(c.w)}};
}

// The stream times gamma, as the next linear's operand; adds to the sum of squares.
MIRAGE_DEVICE uint4 normed_chunk(const Chunk& values, const Chunk& gamma, float& squares) {
  float z[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; e++) {
    squares += values.v[e] * values.v[e];
    z[e] = values.v[e] * gamma.v[e];
  }
  return make_uint4(pack(z[0], z[1]), pack(z[2], z[3]), pack(z[4], z[5]), pack(z[6], z[7]));
}

template <class N>
MIRAGE_DEVICE Chunk gamma_chunk(const bf16* gamma, int chunk) {
  if (!N::kNorm) return Chunk{{1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f}};
  return unpack_chunk(reinterpret_cast<const uint4*>(gamma)[chunk]);
}

// The share of a worker. A run is some neighbouring chunks of a column, whose squares are handed on as one sum; a chunk
// has kLanes neighbouring lanes, which split its partial sums among them. Lanes and runs are those of the program's
// widest such step, kWidest columns, so that a column is the same to the bit in all of them.
// W: a linear that writes the stream.
template <class W, class Mesh, int C, int kWidest>
struct StreamRows {
  static constexpr int kPartials = kPartialsOf<W, Mesh>;
  static constexpr int kChunks = W::kOutputs / kChunk;
  static constexpr int run_of(int lanes) {
    int run = 1;
    while (2 * run * lanes <= kWarp && kChunks % (2 * run) == 0) run *= 2;
    return run;
  }
  static constexpr bool fits(int lanes) {
    return lanes <= kWarp &&
           ceil_div(kWidest * (kChunks / run_of(lanes)), Mesh::kWorkers) * run_of(lanes) * lanes <= kConsumers;
  }
  static_assert(fits(1), "a worker's share of the stream must fit its threads");
  static constexpr int lanes() {
    int lanes = 1;
    while (lanes < kPartials && fits(2 * lanes)) lanes *= 2;
    return lanes;
  }
  static constexpr int kLanes = lanes(), kRun = run_of(kLanes), kSlot = kRun * kLanes;
  static constexpr int kRunsOfColumn = kChunks / kRun;
  // Rows as they are handed on, [columns, chunks], then the runs' sums of squares, [columns, runs].
  static constexpr int kSquares = C * kChunks;

  // The chunk that this thread works on, in f32: all that it keeps from phase to phase.
  Chunk value;

  // Which one that is; column < 0: none.
  struct Part {
    int column, chunk, lane;
  };
  template <class R>
  MIRAGE_DEVICE static Part part(const Context<R>& x) {
    const Share share = share_of(C * kRunsOfColumn, Mesh::kWorkers, x.at.cta);
    const int mine = x.at.thread / kSlot, run = share.begin + min_of(mine, share.count - 1);
    const int column = run / kRunsOfColumn;
    return Part{mine < share.count && !is_idle(x, column) ? column : -1,
                run % kRunsOfColumn * kRun + x.at.thread % kSlot / kLanes, x.at.thread % kLanes};
  }
};

// Starts the stream with the embeddings of the step's tokens and prepares the first linear's operand.
template <class N, class W, class Mesh, int C, int kWidest, class R>
MIRAGE_DEVICE void embed(Context<R>& x, StreamRows<W, Mesh, C, kWidest>& stream, const bf16* gamma) {
  typedef StreamRows<W, Mesh, C, kWidest> S;
  const uint4* table = reinterpret_cast<const uint4*>(x.params.embedding);
#pragma unroll 1
  for (int column = x.at.warp; column < C; column += kConsumerWarps) {
    if (is_idle(x, column)) continue;
    const uint4* row = table + static_cast<size_t>(x.columns.token[column]) * S::kChunks;
    uint4* to = reinterpret_cast<uint4*>(x.activation + column * padded(N::kWidth));
    float squares = 0.f;
#pragma unroll 4
    for (int i = x.at.lane; i < S::kChunks; i += kWarp)
      to[i] = normed_chunk(unpack_chunk(row[i]), gamma_chunk<N>(gamma, i), squares);
    store_sum_squares<C>(x, column, squares);
  }
  const typename S::Part mine = S::part(x);
  if (mine.column >= 0)
    stream.value = unpack_chunk(table[static_cast<size_t>(x.columns.token[mine.column]) * S::kChunks + mine.chunk]);
  sync_consumers();
}

// Adds what linear L handed on to this worker's share, and hands that on as the operand of the linear N with that
// gamma.
template <class N, class L, class W, class Mesh, int C, int kWidest, class R>
MIRAGE_DEVICE void reduce_rows(Context<R>& x, StreamRows<W, Mesh, C, kWidest>& stream, const bf16* gamma,
                               uint32_t epoch) {
  typedef StreamRows<W, Mesh, C, kWidest> S;
  x.begin_phase();
  constexpr int kMine = ceil_div(S::kPartials, S::kLanes), kBatch = min_of(kMine, 8);
  const typename S::Part mine = S::part(x);
  const Chunk factors = gamma_chunk<N>(gamma, mine.chunk);
  await_flags<Mesh, true>(x, L::kFlagsAt, epoch);
  const uint4* rows = reinterpret_cast<const uint4*>(rows_of<L>(x.params)) + mine.column * S::kChunks + mine.chunk;
  Chunk sum{};
#pragma unroll 1
  for (int b = 0; b < kMine; b += kBatch) {
    uint4 got[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int partial = (b + i) * S::kLanes + mine.lane;
      got[i] = make_uint4(0, 0, 0, 0);
      if (mine.column >= 0 && partial < S::kPartials)
        got[i] = load_l2(rows + static_cast<size_t>(partial) * C * S::kChunks);
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const Chunk part = unpack_chunk(got[i]);
#pragma unroll
      for (int e = 0; e < kChunk; e++) sum.v[e] += part.v[e];
    }
  }
#pragma unroll
  for (int e = 0; e < kChunk; e++) {
#pragma unroll
    for (int o = S::kLanes / 2; o > 0; o /= 2) sum.v[e] += __shfl_xor_sync(~0u, sum.v[e], o);
    stream.value.v[e] += sum.v[e];
  }
  float squares = 0.f;
  const uint4 handed_on = normed_chunk(stream.value, factors, squares);
  if (mine.lane != 0) squares = 0.f;
#pragma unroll
  for (int o = S::kSlot / 2; o > 0; o /= 2) squares += __shfl_xor_sync(~0u, squares, o);
  if (mine.column >= 0 && mine.lane == 0) {
    uint4* to = x.params.exchange + L::kStreamRowsAt;
    to[mine.column * S::kChunks + mine.chunk] = handed_on;
    if (mine.chunk % S::kRun == 0)
      reinterpret_cast<float*>(to + S::kSquares)[mine.column * S::kRunsOfColumn + mine.chunk / S::kRun] = squares;
  }
  raise_flag(x, L::kStreamFlagsAt, epoch);
}

// Collects the stream after linear L, shared out as S has it, as the operand of linear N.
template <class N, class L, class S, class Mesh, int C, class R>
MIRAGE_DEVICE void gather_rows(Context<R>& x, uint32_t epoch) {
  x.begin_phase();
  await_flags<Mesh, true>(x, L::kStreamFlagsAt, epoch);
  const uint4* from = x.params.exchange + L::kStreamRowsAt;
  copy_rows<C>(x, x.activation, padded(N::kWidth), reinterpret_cast<const bf16*>(from), L::kOutputs, 0, L::kOutputs);
  const float* runs = reinterpret_cast<const float*>(from + S::kSquares);
#pragma unroll 1
  for (int column = x.at.warp; column < C; column += kConsumerWarps) {
    if (is_idle(x, column)) continue;
    float squares = 0.f;
#pragma unroll
    for (int run = x.at.lane; run < ceil_div(S::kRunsOfColumn, kWarp) * kWarp; run += kWarp)
      if (run < S::kRunsOfColumn) squares += load_l2(runs + column * S::kRunsOfColumn + run);
    store_sum_squares<C>(x, column, squares);
  }
  await_copies();
  sync_consumers();
}

}  // namespace mirage
