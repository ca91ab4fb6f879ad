// The exchange of steps with many columns: values are handed on as rows of bf16 in global memory, a row a column. A CTA
// raises its flag once its part is written; a reader waits for the flags of all whose parts it needs, and copies.
// Flags in the data (words.cuh) save a fence and a trip to L2, but every word is asked for until it is there and
// unpacked by a thread. From some columns on that takes longer. Owns flags, copies and the linear's end by rows; the
// residual stream's is in stream_rows.cuh, attention's in attention_rows.cuh.
//
// L, a linear or an attention, has besides: kOutputs (of all CTAs), kRowsAt and kFlagsAt (words of the exchange area).
#pragma once
#include "linear.cuh"

namespace mirage {

// Columns whose products the warps add up at once.
constexpr int kBlockColumns = 16;
// Products a warp holds, in tiles of 16 rows and 8 columns: what registers hold beside everything else.
constexpr int kMostProducts = 24;

// Says that all this CTA has written so far is there.
template <class R>
MIRAGE_DEVICE void raise_flag(Context<R>& x, int flags_at, uint32_t epoch) {
  sync_consumers();
  if (x.at.thread != 0) return;
  fence_gpu();
  uint32_t* flag = reinterpret_cast<uint32_t*>(x.params.exchange + flags_at) + x.at.cta;
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
}

// Waits for the flags of all workers, or of the own group's.
template <class Mesh, bool kAllGroups, class R>
MIRAGE_DEVICE void await_flags(Context<R>& x, int flags_at, uint32_t epoch) {
  constexpr int kCount = kAllGroups ? Mesh::kWorkers : Mesh::kMembers;
  const uint32_t* flags =
      reinterpret_cast<const uint32_t*>(x.params.exchange + flags_at) + (kAllGroups ? 0 : x.at.group * Mesh::kMembers);
#pragma unroll 1
  for (int i = x.at.thread; i < kCount; i += kConsumers) {
    Spin spin;
    uint32_t seen;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags + i) : "memory");
      spin.turn();
    } while (seen != epoch);
  }
  sync_consumers();
}

// Starts a copy of 16 bytes from global to shared memory, past L1; await_copies ends all of a thread's.
MIRAGE_DEVICE void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
MIRAGE_DEVICE void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A column without a sequence: nobody needs its results, so nothing of it is handed on.
template <class R>
MIRAGE_DEVICE bool is_idle(const Context<R>& x, int column) {
  return x.columns.slot[column] < 0;
}

// Takes note of which columns are not idle.
template <int C, class R>
MIRAGE_DEVICE void count_columns(Context<R>& x) {
  if (x.at.warp == 0) {
    int used = 0;
#pragma unroll
    for (int c = 0; c < C; c += kWarp) {
      const int column = c + x.at.lane;
      const uint32_t busy = __ballot_sync(~0u, column < C && !is_idle(x, min_of(column, C - 1)));
      if (busy) used = c + kWarp - __clz(busy);
    }
    if (x.at.lane == 0) x.columns.used = used;
  }
  sync_consumers();
}

// Starts copying `count` elements, a multiple of eight, of every column's row, from `begin` on; a warp a column.
template <int C, class R>
MIRAGE_DEVICE void copy_rows(Context<R>& x, bf16* to, int to_stride, const bf16* rows, int stride, int begin,
                             int count) {
#pragma unroll 1
  for (int column = x.at.warp; column < C; column += kConsumerWarps) {
    if (is_idle(x, column)) continue;
    const bf16* from = rows + static_cast<size_t>(column) * stride + begin;
#pragma unroll 4
    for (int i = x.at.lane * 8; i < count; i += kWarp * 8) copy_16(to + column * to_stride + i, from + i);
  }
}

// The rows that linear L hands on: [partial sums, columns, kOutputs].
template <class L>
MIRAGE_DEVICE bf16* rows_of(const Params& params) {
  return reinterpret_cast<bf16*>(params.exchange + L::kRowsAt);
}

// Which of the partial sums a worker's products are.
template <class L, class Mesh>
MIRAGE_DEVICE int partial_of(const Place& at) {
  return (L::kRowsOverGroups ? 0 : at.group) * (L::kRowsOverMembers ? 1 : Mesh::kMembers) +
         (L::kRowsOverMembers ? 0 : at.member);
}
template <class L, class Mesh>
constexpr int kPartialsOf = (L::kRowsOverGroups ? 1 : Mesh::kGroups) * (L::kRowsOverMembers ? 1 : Mesh::kMembers);

// Four rows of a column's products from `row`, summed over the warps.
template <class L>
MIRAGE_DEVICE float4 sum_four(const float* scratch, int column, int row) {
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int w = 0; w < L::kWarpK; w++) {
    const float4 part =
        *reinterpret_cast<const float4*>(scratch + (w * kBlockColumns + column) * Products<L>::kStride + row);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  return sum;
}

// Writes the first `outputs` of a block of columns to their rows. `scales`: the norm's, a column each.
template <class L>
MIRAGE_DEVICE void store_outputs(const float* scratch, const float* scales, bf16* rows, int outputs, const Place& at) {
#pragma unroll 1
  for (int i = at.thread; i < kBlockColumns * outputs / 4; i += kConsumers) {
    const int column = i % kBlockColumns, index = i / kBlockColumns * 4;
    const float scale = L::kNorm ? scales[column] : 1.f;
    uint2 values;
    if (L::kSwiGlu) {
      const int row = index / 8 * 16 + index % 8;
      const float4 gate = sum_four<L>(scratch, column, row), up = sum_four<L>(scratch, column, row + 8);
      values.x = pack(silu(gate.x * scale) * (up.x * scale), silu(gate.y * scale) * (up.y * scale));
      values.y = pack(silu(gate.z * scale) * (up.z * scale), silu(gate.w * scale) * (up.w * scale));
    } else {
      const float4 sum = sum_four<L>(scratch, column, index);
      values = make_uint2(pack(sum.x * scale, sum.y * scale), pack(sum.z * scale, sum.w * scale));
    }
    *reinterpret_cast<uint2*>(rows + static_cast<size_t>(column) * L::kOutputs + index) = values;
  }
}

// The whole linear of a worker. Where a warp cannot hold the products of all columns it goes through a pass's pages
// once for each half of them; they stay in the ring until the second time.
template <class L, int C, class Mesh, class R>
MIRAGE_DEVICE void linear_rows(Context<R>& x, uint32_t epoch) {
  x.begin_phase();
  constexpr int kHalves = L::kTilesPerWarp * (C / 8) <= kMostProducts ? 1 : 2, kAtOnce = C / kHalves;
  static_assert(L::kTilesPerWarp * (kAtOnce / 8) <= kMostProducts, "products of half the columns must fit registers");
  static_assert(kHalves == 1 || ceil_div(L::kMostK, L::kPageK) <= R::kPages, "a pass must stay in the ring");
  static_assert(C % kBlockColumns == 0, "columns come in whole blocks");
  constexpr int kOutputsPerTile = L::kSwiGlu ? 8 : 16;
  const int used = x.columns.used;
  const Slice slice = slice_of<L, Mesh>(x.at.group, x.at.member);
  float* scales = x.sum_squares + C * kConsumerWarps;
  if (L::kNorm && x.at.thread < C) scales[x.at.thread] = norm_scale<L, C>(x.sum_squares, x.at.thread);
  bf16* rows = rows_of<L>(x.params) + static_cast<size_t>(partial_of<L, Mesh>(x.at)) * C * L::kOutputs +
               slice.rows.begin * kOutputsPerTile;
#pragma unroll 1
  for (int pass = 0; pass < L::kPasses; pass++) {
    const int tiles = pass_rows<L>(slice.rows.count, pass);
    if (tiles <= 0) break;
#pragma unroll 1
    for (int first_column = 0; first_column == 0 || (kHalves > 1 && first_column < min_of(C, used));
         first_column += kAtOnce) {
      const bool keep = kHalves > 1 && first_column + kAtOnce < used;
      const RingCursor<R> begin = x.ring.at;
      Product<L, kAtOnce> product;
      multiply<L, kAtOnce>(product, x.ring, x.activation + first_column * padded(L::kWidth), padded(L::kWidth), tiles,
                           slice.k.count, x.at, keep, used - first_column);
      if (keep) x.ring.at = begin;
      x.mark(Mark::kMultiplied);
#pragma unroll
      for (int b = 0; b < kAtOnce / kBlockColumns; b++) {
        if (first_column + b * kBlockColumns >= used) break;
        if (b > 0 || first_column > 0 || pass > 0) sync_consumers();  // the block before is still being read
        Product<L, kBlockColumns> block;
#pragma unroll
        for (int m = 0; m < L::kTilesPerWarp; m++)
#pragma unroll
          for (int n = 0; n < kBlockColumns / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) block.v[m][n][i] = product.v[m][b * (kBlockColumns / 8) + n][i];
        store_products<L, kBlockColumns>(x.scratch, block, x.at);
        sync_consumers();
        const int column = first_column + b * kBlockColumns;
        store_outputs<L>(x.scratch, scales + column,
                         rows + static_cast<size_t>(column) * L::kOutputs + pass * L::kPassTiles * kOutputsPerTile,
                         tiles * kOutputsPerTile, x.at);
      }
    }
  }
  raise_flag(x, L::kFlagsAt, epoch);
}

// Collects into the activation what this CTA's slice of the columns of linear Next needs of the outputs of L, a linear
// or an attention. kAllGroups: it needs every group's.
template <class L, class Next, bool kAllGroups, class Mesh, int C, class R>
MIRAGE_DEVICE void collect_rows(Context<R>& x, uint32_t epoch) {
  x.begin_phase();
  await_flags<Mesh, kAllGroups>(x, L::kFlagsAt, epoch);
  const Share k = slice_of<Next, Mesh>(x.at.group, x.at.member).k;
  copy_rows<C>(x, x.activation, padded(Next::kWidth), rows_of<L>(x.params), L::kOutputs, k.begin * 16, k.count * 16);
  await_copies();
  sync_consumers();
}

}  // namespace mirage
