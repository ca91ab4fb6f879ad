// The cache of keys and values: where a position lies, which parts of the positions a task walks, and how a warp holds
// them. A, an attention: see attention.cuh.
#pragma once
#include "context.cuh"

namespace mirage {

// Positions a warp works on at once: half the rows of the tensor core's operand, because keys and values of all of them
// are more than registers hold.
constexpr int kWarpPositions = 8;
// Positions of a stripe, the grain in which they go to the parts: what a CTA works on at once.
constexpr int kStripe = kWarpPositions * kConsumerWarps;

// Parts of a column's positions 0 to `position` that are not empty, of `splits`.
MIRAGE_DEVICE int active_splits(uint32_t position, int splits) {
  return min_of(splits, static_cast<int>(position) / kStripe + 1);
}

// First of this warp's positions in stripe number `stripe` of part `split` of `splits`.
MIRAGE_DEVICE int first_position(const Place& at, int stripe, int split, int splits) {
  return (stripe * splits + split) * kStripe + at.warp * kWarpPositions;
}

// Keys and values of a warp's eight positions, in the order of the tensor core's fragments (`attention.cuh`): lane l
// holds of key l / 4 eight elements of every 32, from 8 * (l % 4), and of values 2 * (l % 4) and the next, eight
// elements of every 64, from 8 * (l / 4).
template <class A>
struct KvBatch {
  static constexpr int kKeyChunks = A::kHeadDim / 32, kValueChunks = A::kHeadDim / 64;
  uint4 k[kKeyChunks];
  uint4 v[2][kValueChunks];

  // Position of the lane's key or values, counted from the batch's first, and its elements.
  MIRAGE_DEVICE static int key_position(const Place& at) { return at.lane / 4; }
  MIRAGE_DEVICE static int key_element(const Place& at, int c) { return c * 32 + at.lane % 4 * 8; }
  MIRAGE_DEVICE static int value_position(const Place& at, int i) { return at.lane % 4 * 2 + i; }
  MIRAGE_DEVICE static int value_element(const Place& at, int c) { return c * 64 + at.lane / 4 * 8; }
};

template <class A>
MIRAGE_DEVICE size_t kv_row(int layer, int slot, int kv_head, int position) {
  return (((static_cast<size_t>(layer) * A::kSlots + slot) * A::kAllKvHeads + kv_head) * A::kMaxSeq + position) *
         A::kHeadDim;
}

// The cache rows of a sequence's KV head in a layer.
struct KvRows {
  const bf16* keys;
  const bf16* values;
};

template <class A>
MIRAGE_DEVICE KvRows kv_rows(const Params& params, int layer, int slot, int kv_head) {
  const size_t first = kv_row<A>(layer, max_of(slot, 0), kv_head, 0);
  return KvRows{params.keys + first, params.values + first};
}

// Loads what the cache holds of the eight positions from `first`: those below `cached`, and zeros for the others.
template <class A>
MIRAGE_DEVICE void load_keys(KvBatch<A>& batch, const KvRows& rows, const Place& at, int first, int cached) {
  const int position = first + batch.key_position(at);
  const bf16* row = rows.keys + position * A::kHeadDim;
#pragma unroll
  for (int c = 0; c < batch.kKeyChunks; c++) {
    batch.k[c] = make_uint4(0, 0, 0, 0);
    if (position < cached) batch.k[c] = load_l2(reinterpret_cast<const uint4*>(row + batch.key_element(at, c)));
  }
}
template <class A>
MIRAGE_DEVICE void load_values(KvBatch<A>& batch, const KvRows& rows, const Place& at, int first, int cached) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int position = first + batch.value_position(at, i);
    const bf16* row = rows.values + position * A::kHeadDim;
#pragma unroll
    for (int c = 0; c < batch.kValueChunks; c++) {
      batch.v[i][c] = make_uint4(0, 0, 0, 0);
      if (position < cached) batch.v[i][c] = load_l2(reinterpret_cast<const uint4*>(row + batch.value_element(at, c)));
    }
  }
}

// Where keys and values of this step's positions lie in shared memory: those of position p of a run that begins with
// `begin` at keys + (p - begin) * stride, and values value_after further on.
struct FreshRows {
  const bf16* keys;
  int begin, stride, value_after;
};

// Takes the positions from `rows.begin` to `last` from shared memory.
template <class A>
MIRAGE_DEVICE void take_fresh(KvBatch<A>& batch, const FreshRows& rows, const Place& at, int first, int last) {
  const int of_key = first + batch.key_position(at);
  if (of_key >= rows.begin && of_key <= last)
#pragma unroll
    for (int c = 0; c < batch.kKeyChunks; c++)
      batch.k[c] =
          *reinterpret_cast<const uint4*>(rows.keys + (of_key - rows.begin) * rows.stride + batch.key_element(at, c));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int position = first + batch.value_position(at, i);
    if (position >= rows.begin && position <= last)
#pragma unroll
      for (int c = 0; c < batch.kValueChunks; c++)
        batch.v[i][c] = *reinterpret_cast<const uint4*>(rows.keys + (position - rows.begin) * rows.stride +
                                                        rows.value_after + batch.value_element(at, c));
  }
}

}  // namespace mirage
