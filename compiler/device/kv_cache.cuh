// The cache of keys and values: where a position lies, which parts of the positions a task walks, and how it reads
// them. A, an attention: see attention.cuh.
#pragma once
#include "context.cuh"

namespace mirage {

// How a warp reads K and V: 16 bytes a lane, so kLanes lanes hold a position and kAtOnce positions fit the warp.
template <class A>
struct KvTile {
  static constexpr int kElements = 8;
  static constexpr int kLanes = A::kHeadDim / kElements;
  static constexpr int kAtOnce = kWarp / kLanes;
  static constexpr int kStripe = kAtOnce * kConsumerWarps;  // positions a CTA reads at once
  static constexpr int kUnroll = 4;                         // stripes of a split on their way together
};

// Parts of a column's positions 0 to `position` that are not empty.
template <class A, int S>
MIRAGE_DEVICE int active_splits(uint32_t position) {
  return min_of(S, static_cast<int>(position) / KvTile<A>::kStripe + 1);
}

template <class A>
struct KvBatch {
  uint4 k[KvTile<A>::kUnroll], v[KvTile<A>::kUnroll];
};

// First position of stripe number `stripe` of split `split` of S, and this lane's.
template <class A, int S>
MIRAGE_DEVICE int stripe_begin(int stripe, int split) {
  return (stripe * S + split) * KvTile<A>::kStripe;
}
template <class A, int S>
MIRAGE_DEVICE int kv_position(const Place& at, int stripe, int split) {
  typedef KvTile<A> T;
  return stripe_begin<A, S>(stripe, split) + at.warp * T::kAtOnce + at.lane / T::kLanes;
}

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

// Loads what the cache holds of a batch that begins with stripe `first`: the positions below `cached`.
template <class A, int S>
MIRAGE_DEVICE void load_cached(KvBatch<A>& batch, const KvRows& rows, const Place& at, int first, int split,
                               int cached) {
#pragma unroll
  for (int u = 0; u < KvTile<A>::kUnroll; u++) {
    const int j = kv_position<A, S>(at, first + u, split);
    batch.k[u] = batch.v[u] = make_uint4(0, 0, 0, 0);
    if (j < cached) {
      const uint32_t e = j * A::kHeadDim + at.lane % KvTile<A>::kLanes * KvTile<A>::kElements;
      batch.k[u] = load_l2(reinterpret_cast<const uint4*>(rows.keys + e));
      batch.v[u] = load_l2(reinterpret_cast<const uint4*>(rows.values + e));
    }
  }
}

}  // namespace mirage
