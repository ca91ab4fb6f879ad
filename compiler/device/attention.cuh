// Causal grouped-query attention of one layer, with q/k norm, RoPE and the KV cache.
//
// A group of the mesh holds whole KV heads. Its members work on tasks: one column, one KV head, some of its query
// heads, and one of up to `kSplits` parts of the positions. Positions go to the parts in turns, a stripe at a time, so
// a column has no more parts than stripes: which ones depends on its position alone, and a column's result does not
// depend on what else is in the step. The parts of a head are merged by whoever gathers them. A column below position
// `kReplicateBelow` is worked on by every member alike, which saves that exchange.
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

// Query heads of a task, at most: the columns of the tensor core's operand.
constexpr int kMostHeads = 8;
constexpr float kNoScore = -1e30f;

// Word i of four: a constant after unrolling.
MIRAGE_DEVICE uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Running softmax over the positions a warp has seen; scores are in powers of two. Lane l knows of head l / 4 the
// highest score and its own part of the sum, and holds of the outputs of heads 2 * (l % 4) and the next the elements
// that a KvBatch has of a value.
template <class A>
struct Softmax {
  float max = kNoScore, sum = 0.f;
  float out[A::kHeadDim / 16][4] = {};

  // Element e of the lane's eight of chunk c, of its head h.
  MIRAGE_DEVICE float value(int c, int e, int h) const { return out[c * 4 + e / 2][e % 2 * 2 + h]; }

  // What a batch's positions weigh, of which the first `valid` count: two of them of head l / 4, rounded to the tensor
  // core's B operand. `queries`: [kHeadsPerTask, kHeadDim] in shared memory.
  MIRAGE_DEVICE uint32_t weigh(const bf16* queries, const KvBatch<A>& batch, int valid, const Place& at) {
    // Queries times keys, in two sums because each product waits for the one before it.
    float sums[2][4] = {};
    const bf16* query = queries + at.lane / 4 * A::kHeadDim;
#pragma unroll
    for (int c = 0; c < KvBatch<A>::kKeyChunks; c++) {
      uint4 q = make_uint4(0, 0, 0, 0);
      if (at.lane / 4 < A::kHeadsPerTask) q = *reinterpret_cast<const uint4*>(query + batch.key_element(at, c));
      mma(sums[0], make_uint4(q.x, 0, q.y, 0), batch.k[c].x, batch.k[c].y);
      mma(sums[1], make_uint4(q.z, 0, q.w, 0), batch.k[c].z, batch.k[c].w);
    }
    float score[2], highest = max;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      score[i] = batch.value_position(at, i) < valid ? sums[0][i] + sums[1][i] : kNoScore;
      highest = fmaxf(highest, score[i]);
    }
#pragma unroll
    for (int o = 1; o < 4; o *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, o));
    const float keep = exp2_fast(max - highest);
    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; i++) weight[i] = batch.value_position(at, i) < valid ? exp2_fast(score[i] - highest) : 0.f;
    sum = sum * keep + weight[0] + weight[1];
    max = highest;
    const float keep_of[2] = {of_head(keep, 0, at), of_head(keep, 1, at)};
#pragma unroll
    for (int i = 0; i < A::kHeadDim / 16; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) out[i][e] *= keep_of[e % 2];
    return pack(weight[0], weight[1]);
  }

  // Adds the batch's values by these weights: pairs of positions side by side make the tensor core's A operand.
  MIRAGE_DEVICE void add_values(const KvBatch<A>& batch, uint32_t weights) {
#pragma unroll
    for (int c = 0; c < KvBatch<A>::kValueChunks; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t v0 = word_of(batch.v[0][c], i), v1 = word_of(batch.v[1][c], i);
        mma(out[c * 4 + i], __byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632), weights);
      }
  }

  // After the last batch: the lanes' parts of the sums.
  MIRAGE_DEVICE void finish() {
#pragma unroll
    for (int o = 1; o < 4; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
  }

 private:
  // What the lanes of head l / 4 know, for the lane's own head h.
  MIRAGE_DEVICE static float of_head(float value, int h, const Place& at) {
    return __shfl_sync(~0u, value, (at.lane % 4 * 2 + h) * 4);
  }
};

// A warp's result of one head in scratch: head_dim values, then the maximum and the sum.
template <class A>
struct WarpResult {
  static constexpr int kMax = A::kHeadDim, kSum = A::kHeadDim + 1, kStride = A::kHeadDim + 4;
  MIRAGE_DEVICE static float* of(float* scratch, int warp, int head) {
    return scratch + (warp * A::kHeadsPerTask + head) * kStride;
  }
};

template <class A>
MIRAGE_DEVICE void store_result(float* scratch, const Softmax<A>& softmax, const Place& at) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int head = at.lane % 4 * 2 + h;
    if (head >= A::kHeadsPerTask) continue;
    float* to = WarpResult<A>::of(scratch, at.warp, head);
#pragma unroll
    for (int c = 0; c < KvBatch<A>::kValueChunks; c++)
#pragma unroll
      for (int e = 0; e < 8; e += 4)
        *reinterpret_cast<float4*>(to + KvBatch<A>::value_element(at, c) + e) = make_float4(
            softmax.value(c, e, h), softmax.value(c, e + 1, h), softmax.value(c, e + 2, h), softmax.value(c, e + 3, h));
  }
  if (at.lane % 4 == 0 && at.lane / 4 < A::kHeadsPerTask) {
    float* to = WarpResult<A>::of(scratch, at.warp, at.lane / 4);
    to[WarpResult<A>::kMax] = softmax.max;
    to[WarpResult<A>::kSum] = softmax.sum;
  }
}

template <class A>
MIRAGE_DEVICE float2 merged_max_sum(float* scratch, int head) {
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

// Elements e and e + 1 of a head, the warps' results merged; normalised where these are all positions.
template <class A>
MIRAGE_DEVICE uint32_t merged_pair(float* scratch, int head, int e, bool normalise) {
  const float2 total = merged_max_sum<A>(scratch, head);
  float2 v = make_float2(0.f, 0.f);
#pragma unroll
  for (int w = 0; w < kConsumerWarps; w++) {
    const float* r = WarpResult<A>::of(scratch, w, head);
    const float weight = exp2_fast(r[WarpResult<A>::kMax] - total.x);
    const float2 part = *reinterpret_cast<const float2*>(r + e);
    v.x += weight * part.x;
    v.y += weight * part.y;
  }
  const float scale = normalise && total.y > 0.f ? 1.f / total.y : 1.f;
  return pack(v.x * scale, v.y * scale);
}

// Publishes a finished task for whoever collects its heads.
template <class A, class Mesh, int C, int S, class R>
MIRAGE_DEVICE void publish_task(Context<R>& x, int task, uint32_t epoch) {
  typedef AttentionTasks<A, Mesh, C, S> T;
  uint4* to = x.params.exchange + T::words(x.at.group, task, 0);
  publish_values<A::kHeadsPerTask, T::kValueWords>(to, T::kWords, A::kHeadDim, epoch, x.at, [&](int head, int e) {
    return merged_pair<A>(x.scratch, head, e, S == 1);
  });
  // The last warp has the fewest value words to publish.
  if (S > 1 && x.at.warp == kConsumerWarps - 1 && x.at.lane < A::kHeadsPerTask) {
    const float2 total = merged_max_sum<A>(x.scratch, x.at.lane);
    store_pair(to + x.at.lane * T::kWords + T::kValueWords, __float_as_uint(total.x), __float_as_uint(total.y), epoch);
  }
}

// Writes a finished task of a replicated column as the operand of linear Next.
template <class A, class Next, class Mesh, class R>
MIRAGE_DEVICE void keep_task(Context<R>& x, const AttentionTask& task) {
  constexpr int kPairs = A::kHeadDim / 2;
  const Share k = slice_of<Next, Mesh>(x.at.group, x.at.member).k;
  const int first = (x.at.group * A::kHeads + task.q_head) * A::kHeadDim - k.begin * 16;
  bf16* row = x.activation + task.column * padded(Next::kWidth);
#pragma unroll 1
  for (int i = x.at.thread; i < A::kHeadsPerTask * kPairs; i += kConsumers) {
    const int to = first + 2 * i;
    if (to >= 0 && to < k.count * 16)
      *reinterpret_cast<uint32_t*>(row + to) = merged_pair<A>(x.scratch, i / kPairs, i % kPairs * 2, true);
  }
}

// Whether a column's context is so short that every member of its group attends to all of it rather than waiting for
// the others' parts.
template <int kReplicateBelow>
MIRAGE_DEVICE bool replicated(uint32_t position) {
  return static_cast<int>(position) < kReplicateBelow;
}

// Which columns an attention phase works on: kernels of a chain forget what a replicated column keeps in shared memory,
// so there the next linear's kernel does these.
enum class Contexts { kAll, kPublished, kReplicated };

// The attention phase of a worker. Q: the exchange that brings q, k and v. Next: the linear that reads the heads.
// kAlone: every column is a sequence of its own.
template <class A, class Q, class Next, class Mesh, int C, int S, int kReplicateBelow, bool kAlone,
          Contexts kContexts = Contexts::kAll, class R>
MIRAGE_DEVICE void attention(Context<R>& x, int layer, uint32_t epoch) {
  static_assert(A::kHeadsPerTask <= kMostHeads, "a task's query heads are the columns of one mma");
  static_assert(kAlone || kReplicateBelow == 0, "only decode steps replicate attention");
  x.begin_phase();
  typedef AttentionTasks<A, Mesh, C, S> T;
  // Many columns and heads leave no registers for old values while the new ones are gathered.
  constexpr bool kValuesLate = kAlone && C * A::kHeadsPerTask >= 64;
  // What attention gathers lies behind the next linear's operand, into which a replicated column's result goes at once.
  bf16* const gathered = x.activation + (kReplicateBelow > 0 ? C * padded(Next::kWidth) : 0);
  // Positions of a column that the cache holds; the others, up to its own, come with this step.
  auto cached_of = [&](int column) {
    const int own = static_cast<int>(x.columns.position[column]);
    return x.columns.slot[column] >= 0 ? own - (column - static_cast<int>(x.columns.first[column])) : 0;
  };
  auto rows_of = [&](const AttentionTask& task) {
    return kv_rows<A>(x.params, layer, x.columns.slot[task.column], x.at.group * A::kKvHeads + task.kv_head);
  };
  // Of a block of tasks, one for each part of the positions, this member's first.
  auto first_split = [&](int block) {
    return (x.at.member + Mesh::kMembers - block * S % Mesh::kMembers) % Mesh::kMembers;
  };

  if (!kAlone) gather_all_heads<A, Q, Mesh, C, S>(x, layer, epoch);

  bool first_task = true;
#pragma unroll 1
  for (int block = 0; block < T::kCount / S; block++) {
    const int column = task_of<A, Mesh, C, S>(block * S).column;
    const bool whole = replicated<kReplicateBelow>(x.columns.position[column]);
    if (kContexts != Contexts::kAll && whole != (kContexts == Contexts::kReplicated)) continue;
    const int splits = whole ? 1 : S, active = active_splits(x.columns.position[column], splits);
#pragma unroll 1
    for (int split = whole ? 0 : first_split(block); split < active; split += Mesh::kMembers) {
      const AttentionTask task = task_of<A, Mesh, C, S>(block * S + split);
      const int position = x.columns.slot[column] >= 0 ? static_cast<int>(x.columns.position[column]) : -1;
      const int cached = cached_of(column);
      // Old keys and values do not depend on the current token: they are asked for before q, k and v are waited for.
      KvBatch<A> batch;
      load_keys<A>(batch, rows_of(task), x.at, first_position(x.at, 0, split, splits), cached);
      if (!kValuesLate) load_values<A>(batch, rows_of(task), x.at, first_position(x.at, 0, split, splits), cached);
      // The task's query heads, and the keys and values that are not in the cache.
      const bf16* queries = gathered;
      FreshRows fresh{gathered + A::kHeadsPerTask * A::kHeadDim, cached, 0, A::kHeadDim};
      if (kAlone) {
        const bool appends = whole ? column % Mesh::kMembers == x.at.member : split == 0;
        gather_heads_of_task<A, Q, Mesh, C>(x, gathered, task, appends, layer, epoch);
        if (kValuesLate) load_values<A>(batch, rows_of(task), x.at, first_position(x.at, 0, split, splits), cached);
      } else {
        queries += column * padded(A::kWidth) + task.q_head * A::kHeadDim;
        fresh =
            FreshRows{gathered + x.columns.first[column] * padded(A::kWidth) + (A::kHeads + task.kv_head) * A::kHeadDim,
                      cached, padded(A::kWidth), A::kKvHeads * A::kHeadDim};
      }
      Softmax<A> softmax;
#pragma unroll 1
      for (int stripe = 0;; stripe++) {
        asm volatile("" : "+r"(x.at.warp), "+r"(x.at.lane));  // as begin_phase
        const int first = first_position(x.at, stripe, split, splits);
        if (first > position) break;
        const int next = first_position(x.at, stripe + 1, split, splits);
        take_fresh<A>(batch, fresh, x.at, first, position);
        const uint32_t weights = softmax.weigh(queries, batch, position + 1 - first, x.at);
        load_keys<A>(batch, rows_of(task), x.at, next, cached);
        softmax.add_values(batch, weights);
        load_values<A>(batch, rows_of(task), x.at, next, cached);
      }
      softmax.finish();
      if (!first_task) sync_consumers();  // the previous task's results are still being read
      first_task = false;
      store_result<A>(x.scratch, softmax, x.at);
      sync_consumers();
      x.mark(Mark::kAttended);
      if (whole)
        keep_task<A, Next, Mesh>(x, task);
      else
        publish_task<A, Mesh, C, S>(x, block * S + split, epoch);
    }
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
// kAllGroups: the next linear needs every group's heads, not only its own group's. Replicated columns are there
// already.
template <class A, class Next, bool kAllGroups, class Mesh, int C, int S, int kReplicateBelow, class R>
MIRAGE_DEVICE void collect_heads(Context<R>& x, uint32_t epoch) {
  x.begin_phase();
  typedef HeadUnits<A, Next, kAllGroups, Mesh, C, S> U;
  static_assert(!kAllGroups || kReplicateBelow == 0, "a member has only its own group's heads");
  if (S == 1) {
    constexpr int kBatch = batch_of(ceil_div(U::kCount, kConsumers), 4);
#pragma unroll 1
    for (int first = x.at.thread; first < U::kCount; first += kConsumers * kBatch) {
      int from[kBatch];
      uint4 got[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const U unit(first + i * kConsumers);
        const bool there = replicated<kReplicateBelow>(x.columns.position[min_of(unit.column, C - 1)]);
        from[i] = first + i * kConsumers < U::kCount && !there ? unit.words(x.at) + unit.word : -1;
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
      const uint32_t position = x.columns.position[unit.column];
      const bool there = replicated<kReplicateBelow>(position);
      const int words = unit.words(x.at), active = there ? 0 : active_splits(position, S);
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
            const uint2 total = pair_of(got[2 * s + 1]);
            const float other = __uint_as_float(total.x), new_max = fmaxf(max, other);
            const float keep = exp2_fast(max - new_max), weight = exp2_fast(other - new_max);
            const Values part = unpack(got[2 * s]);
            max = new_max;
            sum = sum * keep + weight * __uint_as_float(total.y);
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
      if (index < U::kCount && lane == 0 && !there) unit.store(x, merged);
    }
  }
  sync_consumers();
}

}  // namespace mirage
