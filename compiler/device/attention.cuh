// Causal grouped-query attention of one layer, with q/k norm, RoPE and the KV cache.
//
// A group of the mesh holds whole KV heads. Its members work on tasks: one column, one KV head, some of its query
// heads, and one of up to `kSplits` parts of the positions. Positions go to the parts in turns, a stripe at a time, so
// a column has no more parts than stripes: which ones depends on its position alone, and a column's result does not
// depend on what else is in the step. The parts of a head are merged by whoever gathers them.
//
// Where columns are positions of one sequence (prefill), a member gathers q, k and v of all columns; where every column
// is a sequence of its own (decode), only its task's.
//
// A, an attention: kHeads and kKvHeads of a group, kAllKvHeads, kHeadDim, kHeadsPerTask (query
// heads that share a read of K and V), kScale (of the scores, times log2 e), kQNorm, kQGammaAt and kQEps, the same of
// K, kGammaStride, kWidth (a group's q, k and v rows), kSlots, kMaxSeq, kWordsAt.
#pragma once
#include "heads.cuh"

namespace mirage {

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

// One batch of positions for the H query heads of a task, of which the first `stripes` stripes hold any.
template <class A, int H>
MIRAGE_DEVICE void attend(Softmax (&state)[H], const float (&q)[H][8], const KvBatch<A>& batch,
                          const bool (&valid)[KvTile<A>::kUnroll], int stripes) {
  typedef KvTile<A> T;
#pragma unroll
  for (int u = 0; u < T::kUnroll; u++) {
    if (u >= stripes) break;  // the same for the whole CTA
    float score[H];
#pragma unroll
    for (int h = 0; h < H; h++) score[h] = dot(q[h], batch.k[u]);
#pragma unroll
    for (int o = T::kLanes / 2; o > 0; o /= 2)
#pragma unroll
      for (int h = 0; h < H; h++) score[h] += __shfl_xor_sync(~0u, score[h], o);
#pragma unroll
    for (int h = 0; h < H; h++) {
      const float max = valid[u] ? fmaxf(state[h].max, score[h]) : state[h].max;
      const float keep = exp2_fast(state[h].max - max), p = valid[u] ? exp2_fast(score[h] - max) : 0.f;
      state[h].max = max;
      state[h].sum = state[h].sum * keep + p;
#pragma unroll
      for (int e = 0; e < 8; e++) state[h].out[e] *= keep;
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
    float2 v = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kConsumerWarps; w++) {
      const float* r = WarpResult<A>::of(x.scratch, w, head);
      const float weight = exp2_fast(r[WarpResult<A>::kMax] - total.x);
      const float2 part = *reinterpret_cast<const float2*>(r + e);
      v.x += weight * part.x;
      v.y += weight * part.y;
    }
    const float scale = S == 1 && total.y > 0.f ? 1.f / total.y : 1.f;
    return pack(v.x * scale, v.y * scale);
  });
  // The last warp has the fewest value words to publish.
  if (S > 1 && x.at.warp == kConsumerWarps - 1 && x.at.lane < A::kHeadsPerTask) {
    const float2 total = merged_max_sum<A>(x.scratch, x.at.lane);
    store_word(to + x.at.lane * T::kWords + T::kValueWords, __float_as_uint(total.x), __float_as_uint(total.y), 0,
               epoch);
  }
}

// The attention phase of a worker. Q: the exchange that brings q, k and v. kAlone: every column is a sequence of its
// own.
template <class A, class Q, class Mesh, int C, int S, bool kAlone, class R>
MIRAGE_DEVICE void attention(Context<R>& x, int layer, uint32_t epoch) {
  x.begin_phase();
  typedef AttentionTasks<A, Mesh, C, S> T;
  typedef KvTile<A> Tile;
  constexpr int H = A::kHeadsPerTask;
  auto cached_of = [&](int column) {
    return static_cast<int>(x.columns.position[column]) - (column - static_cast<int>(x.columns.first[column]));
  };

  // Old keys and values do not depend on the current token: they are asked for before q, k and v are waited for.
  KvBatch<A> batch = {};
  auto load_first = [&](int index) {
    const AttentionTask task = task_of<A, Mesh, C, S>(index);
    const int slot = x.columns.slot[task.column];
    load_cached<A, S>(batch, kv_rows<A>(x.params, layer, slot, x.at.group * A::kKvHeads + task.kv_head), x.at, 0,
                      task.split, slot >= 0 ? cached_of(task.column) : 0);
  };
  if (!kAlone && x.at.member < T::kCount) load_first(x.at.member);
  HeadLane<A> q_gamma = {}, k_gamma = {};
  if (A::kQNorm) q_gamma.load(x.params.norms + A::kQGammaAt + static_cast<size_t>(layer) * A::kGammaStride, x.at.lane);
  if (A::kKNorm) k_gamma.load(x.params.norms + A::kKGammaAt + static_cast<size_t>(layer) * A::kGammaStride, x.at.lane);
  if (!kAlone) gather_all_heads<A, Q, Mesh, C, S>(x, layer, q_gamma, k_gamma, epoch);

#pragma unroll 1
  for (int index = x.at.member; index < T::kCount; index += Mesh::kMembers) {
    const AttentionTask task = task_of<A, Mesh, C, S>(index);
    if (task.split >= active_splits<A, S>(x.columns.position[task.column])) continue;
    const int slot = x.columns.slot[task.column];
    const int position = slot >= 0 ? static_cast<int>(x.columns.position[task.column]) : -1;
    const int cached = cached_of(task.column);
    const KvRows rows = kv_rows<A>(x.params, layer, slot, x.at.group * A::kKvHeads + task.kv_head);
    const int element = x.at.lane % Tile::kLanes * Tile::kElements;
    if (kAlone || index != x.at.member) load_first(index);
    if (kAlone) gather_heads_of_task<A, Q, Mesh, C>(x, task, layer, q_gamma, k_gamma, epoch);
    // The task's first query head, and the keys and values of the first position that is not in the cache.
    const bf16* queries = x.activation;
    const bf16* fresh = x.activation + H * A::kHeadDim;
    int value_after = A::kHeadDim;
    if (!kAlone) {
      queries += task.column * padded(A::kWidth) + task.q_head * A::kHeadDim;
      fresh =
          x.activation + x.columns.first[task.column] * padded(A::kWidth) + (A::kHeads + task.kv_head) * A::kHeadDim;
      value_after = A::kKvHeads * A::kHeadDim;
    }
    float q[H][8];
    Softmax state[H];
#pragma unroll
    for (int h = 0; h < H; h++) {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        q[h][e] = to_float(queries[h * A::kHeadDim + element + e]);
        state[h].out[e] = 0.f;
      }
      state[h].max = kNoScore;
      state[h].sum = 0.f;
    }
#pragma unroll 1
    for (int first = 0; stripe_begin<A, S>(first, task.split) <= position; first += Tile::kUnroll) {
      // The next batch is on its way while this one is worked on, where registers suffice for both.
      constexpr bool kAhead = H <= kHeadsAhead;
      KvBatch<A> next = {};
      if (!kAhead && first > 0) load_cached<A, S>(batch, rows, x.at, first, task.split, cached);
      if (kAhead) load_cached<A, S>(next, rows, x.at, first + Tile::kUnroll, task.split, cached);
      bool valid[Tile::kUnroll];
      int stripes = 0;
#pragma unroll
      for (int u = 0; u < Tile::kUnroll; u++) {
        const int j = kv_position<A, S>(x.at, first + u, task.split);
        stripes += stripe_begin<A, S>(first + u, task.split) <= position;
        valid[u] = j <= position;
        if (valid[u] && j >= cached) {
          const bf16* row = fresh + (kAlone ? 0 : (j - cached) * padded(A::kWidth)) + element;
          batch.k[u] = *reinterpret_cast<const uint4*>(row);
          batch.v[u] = *reinterpret_cast<const uint4*>(row + value_after);
        }
      }
      attend<A, H>(state, q, batch, valid, stripes);
      if (kAhead) batch = next;
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
    x.mark(Mark::kAttended);
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
    // The splits of a unit are shared by neighbouring lanes, if there are enough of these.
    constexpr int kLanes = 2 * U::kCount <= kConsumers ? 2 : 1, kSplits = ceil_div(S, kLanes);
    constexpr int kBatch = batch_of(kSplits, kWordsInFlight / 2 / kLanes);
    const int lane = x.at.thread % kLanes;
#pragma unroll 1
    for (int first = 0; first < U::kCount; first += kConsumers / kLanes) {
      const int index = first + x.at.thread / kLanes;
      const U unit(min_of(index, U::kCount - 1));
      const int words = unit.words(x.at), active = active_splits<A, S>(x.columns.position[unit.column]);
      float max = kNoScore, sum = 0.f;
      Values merged{{0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
      for (int s0 = 0; s0 * kLanes < active; s0 += kBatch) {
        int from[2 * kBatch];
        uint4 got[2 * kBatch];
#pragma unroll
        for (int s = 0; s < kBatch; s++) {
          const int split = (s0 + s) * kLanes + lane;
          const int at = split < active ? words + split * U::kSplitStride : -1;
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
