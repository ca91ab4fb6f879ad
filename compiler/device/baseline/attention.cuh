// Causal grouped-query attention over the KV cache, split over positions (flash-decoding, Dao et al. 2023), in one
// launch: a block attends from a tile of rows to one range of positions for one KV head; where there are several
// ranges, the block that arrives last puts them together.
//
// Grid: (splits, kv_heads, tiles). A tile is up to kTile rows of one sequence, one position after the other: 1 for
// decoding, more for a prefill, where the rows share what is read. All query heads of the group share it too.
#pragma once

#include "common.cuh"

namespace mirage {

constexpr uint32_t kAttentionThreads = 128;
// One lane of a warp for each range when they are put together.
constexpr uint32_t kMaxSplits = kWarp;
// Below any score, and finite, so that differences of two of them are numbers.
constexpr float kNoScore = -1e30f;

struct AttentionParams {
  const bf16_t* q;  // [row][head][head_dim]
  const bf16_t* keys;
  const bf16_t* values;  // as kv_append writes them
  bf16_t* out;           // [row][head][head_dim]
  float* partial;        // [tile][kv_head][split][query][head_dim + 2]; not used by one split
  uint32_t* arrived;     // [tile][kv_head], 0 between launches
  const uint2* tiles;    // first row and number of rows
  const uint32_t* slot;
  const uint32_t* position;
  uint32_t positions;  // of a slot
  float scale;         // of the scores, times log2(e)
};

// One query's running softmax over the positions seen so far: sum of 2^(score - max), and of that times the values.
struct Softmax {
  float max = kNoScore;
  float sum = 0.f;
};

template <uint32_t kHeads, uint32_t kKvHeads, uint32_t kHeadDim, uint32_t kTile>
struct Attention {
  static constexpr uint32_t kGroup = kHeads / kKvHeads;
  static constexpr uint32_t kQueries = kGroup * kTile;  // of a block
  static constexpr uint32_t kLanes = kHeadDim / kVector;
  static constexpr uint32_t kPlaces = kWarp / kLanes;  // positions that a warp reads at once
  static constexpr uint32_t kWarps = kAttentionThreads / kWarp;
  static constexpr uint32_t kAhead = kQueries <= 2 ? 4 : 2;  // loads of a lane in flight, for k and for v
  static constexpr uint32_t kStep = kPlaces * kAhead;        // positions of a warp's turn
  static constexpr uint32_t kPartial = kHeadDim + 2;         // a query's part: values, max, sum

  static_assert(kHeads % kKvHeads == 0, "the KV heads must divide the query heads");
  static_assert(kHeadDim % kVector == 0 && kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0,
                "a head must be 8, 16, 32, 64, 128 or 256 elements");
  static_assert(kWarps * kQueries * kPartial * sizeof(float) <= 40 * 1024,
                "the parts of the warps must fit in shared memory");

  MIRAGE_DEVICE static uint32_t query_row(uint32_t query) { return query / kGroup; }

  // Index of head `query`'s first element in q and out.
  MIRAGE_DEVICE static uint64_t query_at(uint32_t first_row, uint32_t query) {
    const uint64_t row = first_row + query_row(query);
    return (row * kHeads + blockIdx.y * kGroup + query % kGroup) * kHeadDim;
  }

  MIRAGE_DEVICE static void run(const AttentionParams& p) {
    __shared__ float parts[kWarps][kQueries][kPartial];
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const uint32_t place = lane / kLanes, part = lane % kLanes;  // which position, which eight elements
    const uint32_t splits = gridDim.x;
    const uint2 tile = p.tiles[blockIdx.z];
    const uint32_t first_row = tile.x, rows = tile.y;

    uint4 q[kQueries];
    uint32_t visible[kQueries];  // positions that the query sees
#pragma unroll
    for (uint32_t i = 0; i < kQueries; ++i) {
      const bool inside = query_row(i) < rows;
      q[i] = inside ? load(p.q + query_at(first_row, i), part) : make_uint4(0, 0, 0, 0);
      visible[i] = inside ? p.position[first_row + query_row(i)] + 1 : 0;
    }
    const uint32_t length = p.position[first_row + rows - 1] + 1;
    const uint32_t range = (length + splits - 1) / splits;
    const uint32_t begin = blockIdx.x * range, end = min(begin + range, length);

    const uint64_t cache = (static_cast<uint64_t>(p.slot[first_row]) * kKvHeads + blockIdx.y) * p.positions * kHeadDim;
    const bf16_t* keys = p.keys + cache;
    const bf16_t* values = p.values + cache;
    Softmax softmax[kQueries];
    float sums[kQueries][kVector] = {};

    for (uint32_t base = begin + warp * kStep; base < end; base += kWarps * kStep) {
      uint4 k[kAhead], v[kAhead];
#pragma unroll
      for (uint32_t i = 0; i < kAhead; ++i) {
        // Past the end, the last position again: read, but not counted below.
        const uint64_t position = min(base + i * kPlaces + place, end - 1);
        k[i] = load(keys, position * kLanes + part);
        v[i] = load(values, position * kLanes + part);
      }
#pragma unroll
      for (uint32_t query = 0; query < kQueries; ++query) {
        float x[kVector], scores[kAhead], highest = softmax[query].max;
        bool counts[kAhead];
        unpack(q[query], x);
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
          float y[kVector], dot = 0.f;
          unpack(k[i], y);
#pragma unroll
          for (uint32_t e = 0; e < kVector; ++e) dot += x[e] * y[e];
          dot = lanes_sum(dot, kLanes);
          const uint32_t position = base + i * kPlaces + place;
          counts[i] = position < end && position < visible[query];
          scores[i] = counts[i] ? dot * p.scale : kNoScore;
          highest = fmaxf(highest, scores[i]);
        }
        const float keep = exp2f(softmax[query].max - highest);
        softmax[query].max = highest;
        softmax[query].sum *= keep;
#pragma unroll
        for (uint32_t e = 0; e < kVector; ++e) sums[query][e] *= keep;
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
          const float weight = counts[i] ? exp2f(scores[i] - highest) : 0.f;
          float y[kVector];
          unpack(v[i], y);
          softmax[query].sum += weight;
#pragma unroll
          for (uint32_t e = 0; e < kVector; ++e) sums[query][e] += weight * y[e];
        }
      }
    }

    // The places of a warp, then its part to shared memory.
#pragma unroll
    for (uint32_t query = 0; query < kQueries; ++query) {
#pragma unroll
      for (uint32_t offset = kLanes; offset < kWarp; offset *= 2) {
        const float other_max = __shfl_xor_sync(kFullWarp, softmax[query].max, offset);
        const float other_sum = __shfl_xor_sync(kFullWarp, softmax[query].sum, offset);
        const float highest = fmaxf(softmax[query].max, other_max);
        const float mine = exp2f(softmax[query].max - highest), theirs = exp2f(other_max - highest);
        softmax[query].max = highest;
        softmax[query].sum = softmax[query].sum * mine + other_sum * theirs;
#pragma unroll
        for (uint32_t e = 0; e < kVector; ++e) {
          const float other = __shfl_xor_sync(kFullWarp, sums[query][e], offset);
          sums[query][e] = sums[query][e] * mine + other * theirs;
        }
      }
      if (place == 0) {
#pragma unroll
        for (uint32_t e = 0; e < kVector; ++e) parts[warp][query][part * kVector + e] = sums[query][e];
        if (part == 0) {
          parts[warp][query][kHeadDim] = softmax[query].max;
          parts[warp][query][kHeadDim + 1] = softmax[query].sum;
        }
      }
    }
    __syncthreads();

    if (splits == 1) {
      combine<kWarps>([&](uint32_t source, uint32_t query, uint32_t element) { return parts[source][query][element]; },
                      kWarps, p.out, first_row, rows);
      return;
    }
    // The warps of this block to one part in memory.
    const uint64_t block = (static_cast<uint64_t>(blockIdx.z) * kKvHeads + blockIdx.y) * splits;
    float* partial = p.partial + (block + blockIdx.x) * kQueries * kPartial;
    for (uint32_t item = threadIdx.x; item < kQueries * kHeadDim; item += kAttentionThreads) {
      const uint32_t query = item / kHeadDim, element = item % kHeadDim;
      float highest = kNoScore, sum = 0.f, value = 0.f;
      for (uint32_t source = 0; source < kWarps; ++source) highest = fmaxf(highest, parts[source][query][kHeadDim]);
      for (uint32_t source = 0; source < kWarps; ++source) {
        const float weight = exp2f(parts[source][query][kHeadDim] - highest);
        sum += weight * parts[source][query][kHeadDim + 1];
        value += weight * parts[source][query][element];
      }
      partial[query * kPartial + element] = value;
      if (element == 0) {
        partial[query * kPartial + kHeadDim] = highest;
        partial[query * kPartial + kHeadDim + 1] = sum;
      }
    }
    if (!is_last_block(p.arrived + blockIdx.z * kKvHeads + blockIdx.y, splits)) return;
    const float* all = p.partial + block * kQueries * kPartial;
    combine<kMaxSplits>(
        [&](uint32_t source, uint32_t query, uint32_t element) {
          return __ldcg(all + (static_cast<uint64_t>(source) * kQueries + query) * kPartial + element);
        },
        splits, p.out, first_row, rows);
  }

  // out = Σ parts' values / Σ parts' sums, each brought to the common max. `get(source, query, element)` reads a part.
  template <uint32_t kMaxSources, typename Get>
  MIRAGE_DEVICE static void combine(Get get, uint32_t sources, bf16_t* out, uint32_t first_row, uint32_t rows) {
    static_assert(kMaxSources <= kWarp, "a lane for each part");
    __shared__ float weights[kQueries][kMaxSources];
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (uint32_t query = warp; query < kQueries; query += kWarps) {
      const float max = lane < sources ? get(lane, query, kHeadDim) : kNoScore;
      const float sum = lane < sources ? get(lane, query, kHeadDim + 1) : 0.f;
      float highest = max;
      for (uint32_t offset = kWarp / 2; offset > 0; offset /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, offset));
      }
      const float weight = exp2f(max - highest);
      const float total = lanes_sum(weight * sum, kWarp);
      if (lane < sources) weights[query][lane] = weight / total;
    }
    __syncthreads();
    for (uint32_t item = threadIdx.x; item < kQueries * kHeadDim / 2; item += kAttentionThreads) {
      const uint32_t query = item / (kHeadDim / 2), element = item % (kHeadDim / 2) * 2;
      if (query_row(query) >= rows) break;  // queries are in the order of rows
      float low = 0.f, high = 0.f;
#pragma unroll 4
      for (uint32_t source = 0; source < sources; ++source) {
        low += weights[query][source] * get(source, query, element);
        high += weights[query][source] * get(source, query, element + 1);
      }
      reinterpret_cast<uint32_t*>(out + query_at(first_row, query))[element / 2] = pack_bf16(low, high);
    }
  }
};

}  // namespace mirage
