// The matrix product of a linear: a CTA's tiles of the weight, streamed through the ring, times the step's columns.
// Owns the order of tiles in the stream (with program::stream in the compiler) and the epilogues.
//
// L, a linear: kRowUnits x kUnitTiles row tiles of 16 rows, kKTiles column tiles of 16; kRowsOverGroups and
// kRowsOverMembers say which of the two a mesh axis splits (else it splits the columns, and the products are partial
// sums); a pass covers kWarpRows * kTilesPerWarp row tiles and all of the CTA's columns, in pages of kPageK column
// tiles; kWarpRows * kWarpK = 8 warps share a page. kSwiGlu: each tile holds 8 rows of gate over 8 rows of up.
#pragma once
#include "context.cuh"
#include "words.cuh"

namespace mirage {

// The part of a linear one CTA computes, in tiles.
struct Slice {
  Share rows, k;
};

template <class L, class Mesh>
MIRAGE_DEVICE Slice slice_of(int group, int member) {
  Share rows{0, L::kRowUnits}, k{0, L::kKTiles};
  if (L::kRowsOverGroups)
    rows = share_of(L::kRowUnits, Mesh::kGroups, group);
  else
    k = share_of(L::kKTiles, Mesh::kGroups, group);
  rows.begin *= L::kUnitTiles;
  rows.count *= L::kUnitTiles;
  if (L::kRowsOverMembers) {
    const Share s = share_of(rows.count, Mesh::kMembers, member);
    rows = Share{rows.begin + s.begin, s.count};
  } else {
    const Share s = share_of(k.count, Mesh::kMembers, member);
    k = Share{k.begin + s.begin, s.count};
  }
  return Slice{rows, k};
}

// Bytes of a slice in a CTA's stream.
MIRAGE_DEVICE size_t bytes_of(const Slice& slice) {
  return static_cast<size_t>(slice.rows.count) * slice.k.count * 512;
}

// Row tiles of a pass over a slice of `rows` row tiles.
template <class L>
MIRAGE_DEVICE int pass_rows(int rows, int pass) {
  return L::kRowsExact ? L::kPassTiles : min_of(L::kPassTiles, rows - pass * L::kPassTiles);
}

// Asks for the pages of one linear, `most` of them at once. False when the consumers have stopped.
template <class L, class R>
MIRAGE_DEVICE bool stream_linear(RingWriter<R>& ring, const uint8_t*& source, const Slice& slice,
                                 int most = R::kInFlight) {
#pragma unroll 1
  for (int pass = 0; pass < L::kPasses; pass++) {
    const int rows = pass_rows<L>(slice.rows.count, pass);
    if (rows <= 0) break;
#pragma unroll 1
    for (int k = 0; k < slice.k.count; k += L::kPageK) {
      const uint32_t bytes = static_cast<uint32_t>(rows * min_of(L::kPageK, slice.k.count - k)) * 512;
      if (!ring.push(source, bytes, most)) return false;
      source += bytes;
    }
  }
  return true;
}

template <class L, int C>
struct Product {
  static constexpr int kColumnTiles = ceil_div(C, 8);
  float v[L::kTilesPerWarp][kColumnTiles][4];
};

// Columns of a step that exchanges words, at most. Products of more do not leave the registers for all operands at
// once.
constexpr int kMostWordColumns = 16;

// The row of a column to which a lane points in multiply_many, of the first 16 columns, in shared memory. Lanes of
// eight point to the rows of one of four 8x8 matrices: two halves of a column tile's elements, two of the columns.
MIRAGE_DEVICE uint32_t columns_of_lane(const bf16* activation, int stride, const Place& at) {
  return shared_address(activation + (at.lane / 16 * 8 + at.lane % 8) * stride + at.lane / 8 % 2 * 8);
}

// Adds one column tile's products of many columns: a warp's rows are held, and the columns go by, 16 at a time. `tiles`
// and `columns`: the first of that column tile. `stride`: of a column, in bytes. `used`: columns that are not idle.
template <class L, int C>
MIRAGE_DEVICE void multiply_many(Product<L, C>& product, const uint4* tiles, uint32_t columns, int stride, int rows,
                                 int used, const Place& at) {
  static_assert(C % 16 == 0, "columns go by 16 at a time");
  const int first_row = at.warp / L::kWarpK * L::kTilesPerWarp;
  uint4 a[L::kTilesPerWarp];
#pragma unroll
  for (int m = 0; m < L::kTilesPerWarp; m++) {
    a[m] = make_uint4(0, 0, 0, 0);
    if (L::kRowsExact || first_row + m < rows) a[m] = tiles[(first_row + m) * kWarp + at.lane];
  }
#pragma unroll
  for (int n = 0; n < C / 8; n += 2) {
    if (n * 8 >= used) break;
    const uint4 b = load_matrices(columns + n * 8 * stride);
#pragma unroll
    for (int m = 0; m < L::kTilesPerWarp; m++) {
      mma(product.v[m][n], a[m], b.x, b.y);
      mma(product.v[m][n + 1], a[m], b.z, b.w);
    }
  }
}

// One pass: this warp's row tiles over its share of the column tiles. keep: the pages are gone through once more. used:
// columns beyond these, of many, may be left out.
template <class L, int C, class R>
MIRAGE_DEVICE void multiply(Product<L, C>& product, RingReader<R>& ring, const bf16* activation, int stride, int rows,
                            int k_tiles, const Place& at, bool keep = false, int used = C) {
  constexpr int kTilesOfPage = L::kPageK / L::kWarpK;
  const int warp_row = at.warp / L::kWarpK, warp_k = at.warp % L::kWarpK;
#pragma unroll
  for (int m = 0; m < L::kTilesPerWarp; m++)
#pragma unroll
    for (int n = 0; n < Product<L, C>::kColumnTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) product.v[m][n][i] = 0.f;
  const uint32_t columns = columns_of_lane(activation, stride, at);
  const int column = at.lane / 4;
  const bf16* x = activation + column * stride + (at.lane % 4) * 2;
#pragma unroll 1
  for (int k0 = 0; k0 < k_tiles; k0 += L::kPageK) {
    const uint4* page = reinterpret_cast<const uint4*>(ring.take());
#pragma unroll
    for (int i = 0; i < kTilesOfPage; i++) {
      const int local = warp_k * kTilesOfPage + i;
      if (L::kKExact || k0 + local < k_tiles) {
        if constexpr (C > kMostWordColumns) {
          multiply_many<L, C>(product, page + local * rows * kWarp, columns + (k0 + local) * 32, stride * 2, rows, used,
                              at);
        } else {
          uint32_t b[Product<L, C>::kColumnTiles][2];
#pragma unroll
          for (int n = 0; n < Product<L, C>::kColumnTiles; n++) {
            b[n][0] = b[n][1] = 0;
            if (C % 8 == 0 || column + n * 8 < C) {
              const bf16* xk = x + n * 8 * stride + (k0 + local) * 16;
              b[n][0] = *reinterpret_cast<const uint32_t*>(xk);
              b[n][1] = *reinterpret_cast<const uint32_t*>(xk + 8);
            }
          }
#pragma unroll
          for (int m = 0; m < L::kTilesPerWarp; m++) {
            const int row = warp_row * L::kTilesPerWarp + m;
            if (L::kRowsExact || row < rows) {
              const uint4 a = page[(local * rows + row) * kWarp + at.lane];
#pragma unroll
              for (int n = 0; n < Product<L, C>::kColumnTiles; n++) mma(product.v[m][n], a, b[n][0], b[n][1]);
            }
          }
        }
      }
    }
    if (keep)
      ring.at.advance();
    else
      ring.release(at.lane);
  }
}

// Sum of squares of a column of the residual stream, of which every warp of the column has a part.
template <int C>
MIRAGE_DEVICE float sum_of_squares(const float* parts, int column) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < WarpsOfColumns<C>::kWarps; i++) sum += parts[column * kConsumerWarps + i];
  return sum;
}

// 1 / sqrt(mean square + eps) of a column of the residual stream, or 1 where the linear has no norm.
template <class L, int C>
MIRAGE_DEVICE float norm_scale(const float* sum_squares, int column) {
  if (!L::kNorm) return 1.f;
  return rsqrtf(sum_of_squares<C>(sum_squares, column) / L::kNormWidth + L::kEps);
}

// Layout of the products in scratch: [kWarpK, columns, kStride], rows innermost, padded against bank conflicts.
template <class L>
struct Products {
  static constexpr int kRows = L::kPassTiles * 16;
  static constexpr int kStride = kRows + 4;
  static constexpr int kOutputs = L::kSwiGlu ? kRows / 2 : kRows;
};

template <class L, int C>
MIRAGE_DEVICE void store_products(float* scratch, const Product<L, C>& product, const Place& at) {
  const int warp_row = at.warp / L::kWarpK, warp_k = at.warp % L::kWarpK;
  float* to = scratch + warp_k * C * Products<L>::kStride + warp_row * L::kTilesPerWarp * 16 + at.lane / 4;
#pragma unroll
  for (int m = 0; m < L::kTilesPerWarp; m++)
#pragma unroll
    for (int n = 0; n < Product<L, C>::kColumnTiles; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = n * 8 + (at.lane % 4) * 2 + j;
        if (C % 8 == 0 || column < C) {
          to[column * Products<L>::kStride + m * 16] = product.v[m][n][j];
          to[column * Products<L>::kStride + m * 16 + 8] = product.v[m][n][j + 2];
        }
      }
}

// Rows `row` and `row + 1` of a column's products, summed over the warps.
template <class L, int C>
MIRAGE_DEVICE float2 sum_products(const float* scratch, int column, int row) {
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int w = 0; w < L::kWarpK; w++) {
    const float2 part = *reinterpret_cast<const float2*>(scratch + (w * C + column) * Products<L>::kStride + row);
    sum.x += part.x;
    sum.y += part.y;
  }
  return sum;
}

// Outputs `index` and `index + 1` of a pass, in bf16; `index` is even. `scales`: the norm's, a column each.
template <class L, int C>
MIRAGE_DEVICE uint32_t epilogue(const float* scratch, const float* scales, int column, int index) {
  const float scale = L::kNorm ? scales[column] : 1.f;
  if (!L::kSwiGlu) {
    const float2 sum = sum_products<L, C>(scratch, column, index);
    return pack(sum.x * scale, sum.y * scale);
  }
  const int row = index / 8 * 16 + index % 8;
  const float2 gate = sum_products<L, C>(scratch, column, row), up = sum_products<L, C>(scratch, column, row + 8);
  return pack(silu(gate.x * scale) * (up.x * scale), silu(gate.y * scale) * (up.y * scale));
}

// The whole linear of a worker: all passes, each published as soon as it is done.
template <class L, int C, class Mesh, class R>
MIRAGE_DEVICE void linear(Context<R>& x, uint32_t epoch) {
  x.begin_phase();
  const Slice slice = slice_of<L, Mesh>(x.at.group, x.at.member);
  float* scales = x.sum_squares + C * kConsumerWarps;
  if (L::kNorm && x.at.thread < C) scales[x.at.thread] = norm_scale<L, C>(x.sum_squares, x.at.thread);
  uint4* words = x.params.exchange + L::kWordsAt + static_cast<size_t>(x.at.cta) * C * L::kWords;
#pragma unroll 1
  for (int pass = 0; pass < L::kPasses; pass++) {
    const int rows = pass_rows<L>(slice.rows.count, pass);
    if (rows <= 0) break;
    Product<L, C> product;
    multiply<L, C>(product, x.ring, x.activation, padded(L::kWidth), rows, slice.k.count, x.at);
    x.mark(Mark::kMultiplied);
    if (pass > 0) sync_consumers();  // the previous pass is still being read
    store_products<L, C>(x.scratch, product, x.at);
    sync_consumers();
    const int outputs = rows * (L::kSwiGlu ? 8 : 16);
    publish_values<C, L::kPassWords>(
        words + pass * L::kPassWords, L::kWords, outputs, epoch, x.at,
        [&](int column, int index) { return epilogue<L, C>(x.scratch, scales, column, index); });
  }
}

}  // namespace mirage
