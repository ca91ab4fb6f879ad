// Causal grouped-query attention of one layer, with q/k norm, RoPE and the KV cache.
//
// A group of the mesh holds whole KV heads. Each of its members gathers the group's q, k and v of all columns, then
// works on tasks: one column, one KV head, some of its query heads, and one of `kSplits` interleaved parts of the
// positions. The parts of a head are merged by whoever gathers them. Positions are walked in an order that depends on
// the position alone, so a column's result does not depend on what else is in the step.
//
// A, an attention: kHeads and kKvHeads of a group, kAllKvHeads, kHeadDim, kHeadsPerTask (query heads that share a read
// of K and V), kScale (of the scores, times log2 e), kQNorm, kQGammaAt and kQEps, the same of K, kGammaStride, kWidth
// (a group's q, k and v rows), kSlots, kMaxSeq, kWordsAt.
#pragma once
#include "exchange.cuh"

namespace mirage {

template <class A, class Mesh, int C, int S>
struct AttentionTasks {
  static constexpr int kQPerKv = A::kHeads / A::kKvHeads;
  static constexpr int kHeadBlocks = kQPerKv / A::kHeadsPerTask;
  static constexpr int kCount = C * A::kKvHeads * kHeadBlocks * S;
  // Words of one head of one task: its values, and with more than one split the maximum and the sum.
  static constexpr int kValueWords = ceil_div(A::kHeadDim, kValuesPerWord);
  static constexpr int kWords = kValueWords + (S > 1 ? 1 : 0);
  // Where the words of a head of a task begin in the exchange area.
  MIRAGE_DEVICE static int words(int group, int task, int head) {
    return A::kWordsAt + ((group * kCount + task) * A::kHeadsPerTask + head) * kWords;
  }
};

// How a warp reads K and V: 16 bytes a lane, so kLanes lanes hold a position and kAtOnce positions fit the warp.
template <class A>
struct KvTile {
  static constexpr int kElements = 8;
  static constexpr int kLanes = A::kHeadDim / kElements;
  static constexpr int kAtOnce = kWarp / kLanes;
  static constexpr int kRound = kAtOnce * kConsumerWarps;  // positions a CTA reads at once
  static constexpr int kUnroll = 4;
};

template <class A>
struct KvBatch {
  uint4 k[KvTile<A>::kUnroll], v[KvTile<A>::kUnroll];
};

// Position number u of this lane in the batch that begins `round` rounds into split `split` of S.
template <class A, int S>
MIRAGE_DEVICE int kv_position(const Place& at, int round, int split, int u) {
  typedef KvTile<A> T;
  return ((round + u) * S + split) * T::kRound + at.warp * T::kAtOnce + at.lane / T::kLanes;
}

template <class A>
MIRAGE_DEVICE size_t kv_row(int layer, int slot, int kv_head, int position) {
  return (((static_cast<size_t>(layer) * A::kSlots + slot) * A::kAllKvHeads + kv_head) * A::kMaxSeq + position) *
         A::kHeadDim;
}

// Loads what the cache holds of a batch: the positions below `cached`.
template <class A, int S>
MIRAGE_DEVICE void load_cached(KvBatch<A>& batch, const Params& params, const Place& at, int layer, int slot,
                               int kv_head, int round, int split, int cached) {
#pragma unroll
  for (int u = 0; u < KvTile<A>::kUnroll; u++) {
    const int j = kv_position<A, S>(at, round, split, u);
    batch.k[u] = batch.v[u] = make_uint4(0, 0, 0, 0);
    if (j < cached) {
      const size_t e = kv_row<A>(layer, slot, kv_head, j) + at.lane % KvTile<A>::kLanes * KvTile<A>::kElements;
      batch.k[u] = load_l2(reinterpret_cast<const uint4*>(params.keys + e));
      batch.v[u] = load_l2(reinterpret_cast<const uint4*>(params.values + e));
    }
  }
}

// RMSNorm and RoPE of one head of one column, in place; a lane holds elements i and i + head_dim/2 of kPairs pairs.
template <class A>
struct HeadLane {
  static constexpr int kPairs = A::kHeadDim / 2 / kWarp;
  float low[kPairs], high[kPairs];
  MIRAGE_DEVICE static int index(int lane, int i) { return lane * kPairs + i; }

  MIRAGE_DEVICE void load(const bf16* head, int lane) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      low[i] = to_float(head[index(lane, i)]);
      high[i] = to_float(head[index(lane, i) + A::kHeadDim / 2]);
    }
  }
  MIRAGE_DEVICE void store(bf16* head, int lane) const {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      head[index(lane, i)] = to_bf16(low[i]);
      head[index(lane, i) + A::kHeadDim / 2] = to_bf16(high[i]);
    }
  }
  MIRAGE_DEVICE void norm(const HeadLane& gamma, float eps) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kPairs; i++) squares += low[i] * low[i] + high[i] * high[i];
    const float scale = rsqrtf(warp_sum(squares) / A::kHeadDim + eps);
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      low[i] *= scale * gamma.low[i];
      high[i] *= scale * gamma.high[i];
    }
  }
  // Turns every pair by its angle: {cos, sin} of the column's position.
  MIRAGE_DEVICE void rotate(const float2* rope, int lane) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      const float2 turn = rope[index(lane, i)];
      const float l = low[i], h = high[i];
      low[i] = l * turn.x - h * turn.y;
      high[i] = h * turn.x + l * turn.y;
    }
  }
  MIRAGE_DEVICE void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
      low[i] *= factor;
      high[i] *= factor;
    }
  }
};

// Makes the gathered q and k ready for scores, and appends k and v to the cache (each column by one member).
template <class A, int C, class Mesh, class R>
MIRAGE_DEVICE void prepare_heads(Context<R>& x, int layer, const HeadLane<A>& q_gamma, const HeadLane<A>& k_gamma) {
  constexpr int kPerColumn = A::kHeads + 2 * A::kKvHeads;
#pragma unroll 1
  for (int item = x.at.warp; item < C * kPerColumn; item += kConsumerWarps) {
    const int column = item / kPerColumn, head = item % kPerColumn;
    const int slot = x.columns.slot[column];
    const bool appends = slot >= 0 && column % Mesh::kMembers == x.at.member;
    bf16* row = x.activation + column * padded(A::kWidth) + head * A::kHeadDim;
    HeadLane<A> values;
    values.load(row, x.at.lane);
    const int kv_head = (head - A::kHeads) % A::kKvHeads;
    const size_t to =
        kv_row<A>(layer, max_of(slot, 0), x.at.group * A::kKvHeads + max_of(kv_head, 0), x.columns.position[column]);
    if (head < A::kHeads) {
      if (A::kQNorm) values.norm(q_gamma, A::kQEps);
      values.rotate(x.rope + column * (A::kHeadDim / 2), x.at.lane);
      values.scale(A::kScale);
      values.store(row, x.at.lane);
    } else if (head < A::kHeads + A::kKvHeads) {
      if (A::kKNorm) values.norm(k_gamma, A::kKEps);
      values.rotate(x.rope + column * (A::kHeadDim / 2), x.at.lane);
      values.store(row, x.at.lane);
      if (appends) values.store(x.params.keys + to, x.at.lane);
    } else if (appends) {
      values.store(x.params.values + to, x.at.lane);
    }
  }
}

// Running softmax of one query head over the positions a group of lanes has seen; scores are in powers of two.
struct Softmax {
  float max, sum, out[8];
};
constexpr float kNoScore = -1e30f;

MIRAGE_DEVICE float dot(const float (&q)[8], const uint4& k) {
  return q[0] * low_half(k.x) + q[1] * high_half(k.x) + q[2] * low_half(k.y) + q[3] * high_half(k.y) +
         q[4] * low_half(k.z) + q[5] * high_half(k.z) + q[6] * low_half(k.w) + q[7] * high_half(k.w);
}
MIRAGE_DEVICE void add_scaled(float (&out)[8], float p, const uint4& v) {
  out[0] += p * low_half(v.x);
  out[1] += p * high_half(v.x);
  out[2] += p * low_half(v.y);
  out[3] += p * high_half(v.y);
  out[4] += p * low_half(v.z);
  out[5] += p * high_half(v.z);
  out[6] += p * low_half(v.w);
  out[7] += p * high_half(v.w);
}

// One batch of positions for the H query heads of a task.
template <class A, int H>
MIRAGE_DEVICE void attend(Softmax (&state)[H], const float (&q)[H][8], const KvBatch<A>& batch,
                          const bool (&valid)[KvTile<A>::kUnroll]) {
  typedef KvTile<A> T;
#pragma unroll
  for (int h = 0; h < H; h++) {
    float score[T::kUnroll];
#pragma unroll
    for (int u = 0; u < T::kUnroll; u++) score[u] = valid[u] ? dot(q[h], batch.k[u]) : 0.f;
#pragma unroll
    for (int o = T::kLanes / 2; o > 0; o /= 2)
#pragma unroll
      for (int u = 0; u < T::kUnroll; u++) score[u] += __shfl_xor_sync(~0u, score[u], o);
    float max = state[h].max;
#pragma unroll
    for (int u = 0; u < T::kUnroll; u++)
      if (valid[u]) max = fmaxf(max, score[u]);
    const float keep = exp2_fast(state[h].max - max);
    state[h].max = max;
    state[h].sum *= keep;
#pragma unroll
    for (int e = 0; e < 8; e++) state[h].out[e] *= keep;
#pragma unroll
    for (int u = 0; u < T::kUnroll; u++)
      if (valid[u]) {
        const float p = exp2_fast(score[u] - max);
        state[h].sum += p;
        add_scaled(state[h].out, p, batch.v[u]);
      }
  }
}

// Merges the positions that different lanes of the warp have seen.
template <class A>
MIRAGE_DEVICE void merge_lanes(Softmax& s) {
#pragma unroll
  for (int o = KvTile<A>::kLanes; o < kWarp; o *= 2) {
    const float other = __shfl_xor_sync(~0u, s.max, o), max = fmaxf(s.max, other);
    const float mine = exp2_fast(s.max - max), theirs = exp2_fast(other - max);
    s.max = max;
    s.sum = s.sum * mine + __shfl_xor_sync(~0u, s.sum, o) * theirs;
#pragma unroll
    for (int e = 0; e < 8; e++) s.out[e] = s.out[e] * mine + __shfl_xor_sync(~0u, s.out[e], o) * theirs;
  }
}

// A warp's result of one head in scratch: head_dim values, then the maximum and the sum.
template <class A>
struct WarpResult {
  static constexpr int kMax = A::kHeadDim, kSum = A::kHeadDim + 1, kStride = A::kHeadDim + 4;
  MIRAGE_DEVICE static const float* of(const float* scratch, int warp, int head) {
    return scratch + (warp * A::kHeadsPerTask + head) * kStride;
  }
};

template <class A>
MIRAGE_DEVICE float2 merged_max_sum(const float* scratch, int head) {
  float max = kNoScore, sum = 0.f;
#pragma unroll
  for (int w = 0; w < kConsumerWarps; w++) max = fmaxf(max, WarpResult<A>::of(scratch, w, head)[WarpResult<A>::kMax]);
#pragma unroll
  for (int w = 0; w < kConsumerWarps; w++) {
    const float* r = WarpResult<A>::of(scratch, w, head);
    sum += exp2_fast(r[WarpResult<A>::kMax] - max) * r[WarpResult<A>::kSum];
  }
  return make_float2(max, sum);
}

// Publishes a finished task: the warps' results merged; normalised where the task saw all positions.
template <class A, class Mesh, int C, int S, class R>
MIRAGE_DEVICE void publish_task(Context<R>& x, int task, uint32_t epoch) {
  typedef AttentionTasks<A, Mesh, C, S> T;
  uint4* to = x.params.exchange + T::words(x.at.group, task, 0);
  publish_values<A::kHeadsPerTask, T::kValueWords>(to, T::kWords, A::kHeadDim, epoch, x.at, [&](int head, int e) {
    const float2 total = merged_max_sum<A>(x.scratch, head);
    float v = 0.f;
#pragma unroll
    for (int w = 0; w < kConsumerWarps; w++) {
      const float* r = WarpResult<A>::of(x.scratch, w, head);
      v += exp2_fast(r[WarpResult<A>::kMax] - total.x) * r[e];
    }
    return S == 1 && total.y > 0.f ? v / total.y : v;
  });
  // The last warp has the fewest value words to publish.
  if (S > 1 && x.at.warp == kConsumerWarps - 1 && x.at.lane < A::kHeadsPerTask) {
    const float2 total = merged_max_sum<A>(x.scratch, x.at.lane);
    store_word(to + x.at.lane * T::kWords + T::kValueWords, __float_as_uint(total.x), __float_as_uint(total.y), 0,
               epoch);
  }
}

// The attention phase of a worker. Q: the exchange that brings q, k and v.
template <class A, class Q, class Mesh, int C, int S, class R>
MIRAGE_DEVICE void attention(Context<R>& x, int layer, uint32_t epoch) {
  x.begin_phase();
  typedef AttentionTasks<A, Mesh, C, S> T;
  typedef KvTile<A> Tile;
  constexpr int H = A::kHeadsPerTask;
  struct Task {
    int split, q_head, kv_head, column;
  };
  auto decode = [](int task) {
    const int block = task / S % T::kHeadBlocks, kv_head = task / S / T::kHeadBlocks % A::kKvHeads;
    return Task{task % S, kv_head * T::kQPerKv + block * H, kv_head, task / S / T::kHeadBlocks / A::kKvHeads};
  };
  auto cached_of = [&](int column) {
    return static_cast<int>(x.columns.position[column]) - (column - static_cast<int>(x.columns.first[column]));
  };

  // Nothing here depends on the current token: ask for it before waiting for q, k and v.
  KvBatch<A> batch = {};
  if (x.at.member < T::kCount) {
    const Task task = decode(x.at.member);
    const int slot = x.columns.slot[task.column];
    if (slot >= 0)
      load_cached<A, S>(batch, x.params, x.at, layer, slot, x.at.group * A::kKvHeads + task.kv_head, 0, task.split,
                        cached_of(task.column));
  }
  HeadLane<A> q_gamma = {}, k_gamma = {};
  if (A::kQNorm) q_gamma.load(x.params.norms + A::kQGammaAt + static_cast<size_t>(layer) * A::kGammaStride, x.at.lane);
  if (A::kKNorm) k_gamma.load(x.params.norms + A::kKGammaAt + static_cast<size_t>(layer) * A::kGammaStride, x.at.lane);

  const int base = slice_of<typename Q::Source, Mesh>(x.at.group, 0).rows.begin * 16;
  collect_all<Q, Mesh, C>(x.params.exchange, epoch, x.at, [&](int column, const Span& span, const Values& values) {
    store_span(x.activation + column * padded(A::kWidth), span, values, base, A::kWidth);
  });
  sync_consumers();
  prepare_heads<A, C, Mesh>(x, layer, q_gamma, k_gamma);
  sync_consumers();

#pragma unroll 1
  for (int index = x.at.member; index < T::kCount; index += Mesh::kMembers) {
    const Task task = decode(index);
    const int slot = x.columns.slot[task.column];
    const int position = slot >= 0 ? static_cast<int>(x.columns.position[task.column]) : -1;
    const int cached = cached_of(task.column);
    const int kv_head = x.at.group * A::kKvHeads + task.kv_head;
    const int element = x.at.lane % Tile::kLanes * Tile::kElements;
    float q[H][8];
    Softmax state[H];
#pragma unroll
    for (int h = 0; h < H; h++) {
      const bf16* row = x.activation + task.column * padded(A::kWidth) + (task.q_head + h) * A::kHeadDim + element;
#pragma unroll
      for (int e = 0; e < 8; e++) {
        q[h][e] = to_float(row[e]);
        state[h].out[e] = 0.f;
      }
      state[h].max = kNoScore;
      state[h].sum = 0.f;
    }
#pragma unroll 1
    for (int round = 0; kv_position<A, S>(x.at, round, task.split, 0) - x.at.lane / Tile::kLanes <= position;
         round += Tile::kUnroll) {
      if (round > 0 || index != x.at.member)
        load_cached<A, S>(batch, x.params, x.at, layer, slot, kv_head, round, task.split, cached);
      bool valid[Tile::kUnroll];
#pragma unroll
      for (int u = 0; u < Tile::kUnroll; u++) {
        const int j = kv_position<A, S>(x.at, round, task.split, u);
        valid[u] = j <= position;
        // Positions of this very step are not in the cache yet; they came with the exchange.
        if (valid[u] && j >= cached) {
          const bf16* row = x.activation + (x.columns.first[task.column] + j - cached) * padded(A::kWidth) +
                            (A::kHeads + task.kv_head) * A::kHeadDim + element;
          batch.k[u] = *reinterpret_cast<const uint4*>(row);
          batch.v[u] = *reinterpret_cast<const uint4*>(row + A::kKvHeads * A::kHeadDim);
        }
      }
      attend<A, H>(state, q, batch, valid);
    }
    if (index != x.at.member) sync_consumers();  // the previous task is still being published
#pragma unroll
    for (int h = 0; h < H; h++) {
      merge_lanes<A>(state[h]);
      float* to = const_cast<float*>(WarpResult<A>::of(x.scratch, x.at.warp, h));
      if (x.at.lane < Tile::kLanes) {
#pragma unroll
        for (int e = 0; e < 8; e++) to[element + e] = state[h].out[e];
      }
      if (x.at.lane == 0) {
        to[WarpResult<A>::kMax] = state[h].max;
        to[WarpResult<A>::kSum] = state[h].sum;
      }
    }
    sync_consumers();
    publish_task<A, Mesh, C, S>(x, index, epoch);
  }
}

// What collect_heads walks: words of heads of columns. A unit is one word of one head of one column.
template <class A, class Next, bool kAllGroups, class Mesh, int C, int S>
struct HeadUnits {
  typedef AttentionTasks<A, Mesh, C, S> T;
  static constexpr int kHeads = A::kHeads * (kAllGroups ? Mesh::kGroups : 1);
  static constexpr int kCount = C * kHeads * T::kValueWords;
  int word, head, column;
  MIRAGE_DEVICE explicit HeadUnits(int unit)
      : word(unit % T::kValueWords), head(unit / T::kValueWords % kHeads), column(unit / T::kValueWords / kHeads) {}

  // Where the head's words of split 0 begin; those of split s lie s * kSplitStride further on.
  static constexpr int kSplitStride = A::kHeadsPerTask * T::kWords;
  MIRAGE_DEVICE int words(const Place& at) const {
    const int group = kAllGroups ? head / A::kHeads : at.group, local = head % A::kHeads;
    const int block = local / A::kHeadsPerTask;  // over all KV heads of the group: heads of a KV head are neighbours
    return T::words(group, (column * A::kKvHeads * T::kHeadBlocks + block) * S, local % A::kHeadsPerTask);
  }
  template <class R>
  MIRAGE_DEVICE void store(Context<R>& x, const Values& values) const {
    const Share k = slice_of<Next, Mesh>(x.at.group, x.at.member).k;
    const int first_head = kAllGroups ? 0 : x.at.group * A::kHeads;
    const Span span{(first_head + head) * A::kHeadDim + word * kValuesPerWord,
                    min_of(kValuesPerWord, A::kHeadDim - word * kValuesPerWord)};
    store_span(x.activation + column * padded(Next::kWidth), span, values, k.begin * 16, k.count * 16);
  }
};

// Gathers the heads of all columns, merges their splits, and writes them as the operand of linear Next.
// kAllGroups: the next linear needs every group's heads, not only its own group's.
template <class A, class Next, bool kAllGroups, class Mesh, int C, int S, class R>
MIRAGE_DEVICE void collect_heads(Context<R>& x, uint32_t epoch) {
  x.begin_phase();
  typedef HeadUnits<A, Next, kAllGroups, Mesh, C, S> U;
  if (S == 1) {
    constexpr int kBatch = batch_of(ceil_div(U::kCount, kConsumers), 4);
#pragma unroll 1
    for (int first = x.at.thread; first < U::kCount; first += kConsumers * kBatch) {
      int from[kBatch];
      uint4 got[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const U unit(first + i * kConsumers);
        from[i] = first + i * kConsumers < U::kCount ? unit.words(x.at) + unit.word : -1;
      }
      await_words(got, x.params.exchange, from, epoch);
#pragma unroll
      for (int i = 0; i < kBatch; i++)
        if (from[i] >= 0) U(first + i * kConsumers).store(x, unpack(got[i]));
    }
  } else {
    // The splits of a unit are shared by neighbouring lanes.
    constexpr int kLanes = S >= 4 ? 4 : 2, kSplits = ceil_div(S, kLanes), kBatch = batch_of(kSplits, 4);
    const int lane = x.at.thread % kLanes;
#pragma unroll 1
    for (int first = 0; first < U::kCount; first += kConsumers / kLanes) {
      const int index = first + x.at.thread / kLanes;
      const U unit(min_of(index, U::kCount - 1));
      const int words = unit.words(x.at);
      float max = kNoScore, sum = 0.f;
      Values merged{{0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
      for (int s0 = 0; s0 < kSplits; s0 += kBatch) {
        int from[2 * kBatch];
        uint4 got[2 * kBatch];
#pragma unroll
        for (int s = 0; s < kBatch; s++) {
          const int split = (s0 + s) * kLanes + lane;
          const int at = split < S ? words + split * U::kSplitStride : -1;
          from[2 * s] = at >= 0 ? at + unit.word : -1;
          from[2 * s + 1] = at >= 0 ? at + U::T::kValueWords : -1;
        }
        await_words(got, x.params.exchange, from, epoch);
#pragma unroll
        for (int s = 0; s < kBatch; s++)
          if (from[2 * s] >= 0) {
            const float other = __uint_as_float(got[2 * s + 1].x), new_max = fmaxf(max, other);
            const float keep = exp2_fast(max - new_max), weight = exp2_fast(other - new_max);
            const Values part = unpack(got[2 * s]);
            max = new_max;
            sum = sum * keep + weight * __uint_as_float(got[2 * s + 1].y);
#pragma unroll
            for (int e = 0; e < kValuesPerWord; e++) merged.v[e] = merged.v[e] * keep + weight * part.v[e];
          }
      }
#pragma unroll
      for (int o = kLanes / 2; o > 0; o /= 2) {
        const float other = __shfl_xor_sync(~0u, max, o), new_max = fmaxf(max, other);
        const float keep = exp2_fast(max - new_max), weight = exp2_fast(other - new_max);
        max = new_max;
        sum = sum * keep + weight * __shfl_xor_sync(~0u, sum, o);
#pragma unroll
        for (int e = 0; e < kValuesPerWord; e++)
          merged.v[e] = merged.v[e] * keep + weight * __shfl_xor_sync(~0u, merged.v[e], o);
      }
      const float scale = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
      for (int e = 0; e < kValuesPerWord; e++) merged.v[e] *= scale;
      if (index < U::kCount && lane == 0) unit.store(x, merged);
    }
  }
  sync_consumers();
}

}  // namespace mirage
