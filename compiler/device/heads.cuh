// Heads of q, k and v between the linear that makes them and attention: gathered, normed, turned by RoPE, and appended
// to the cache. A, an attention: see attention.cuh.
#pragma once
#include "exchange.cuh"
#include "kv_cache.cuh"
#include "tasks.cuh"

namespace mirage {

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

enum class HeadKind { kQuery, kKey, kValue };

// The norms' gammas of a layer's heads.
template <class A>
struct HeadGammas {
  HeadLane<A> query = {}, key = {};

  MIRAGE_DEVICE HeadGammas(const Params& params, int layer, const Place& at) {
    const bf16* of_layer = params.norms + static_cast<size_t>(layer) * A::kGammaStride;
    if (A::kQNorm) query.load(of_layer + A::kQGammaAt, at.lane);
    if (A::kKNorm) key.load(of_layer + A::kKGammaAt, at.lane);
  }
  // Register by register: a reference to either would put both in memory.
  MIRAGE_DEVICE HeadLane<A> of(HeadKind kind) const {
    HeadLane<A> chosen;
#pragma unroll
    for (int i = 0; i < HeadLane<A>::kPairs; i++) {
      chosen.low[i] = kind == HeadKind::kQuery ? query.low[i] : key.low[i];
      chosen.high[i] = kind == HeadKind::kQuery ? query.high[i] : key.high[i];
    }
    return chosen;
  }
};

// Makes a gathered head ready for scores, by one warp: norm, RoPE by the position's {cos, sin}, and for queries the
// scale. Keys and values go to the cache row `append`, if there is one.
template <class A, class R>
MIRAGE_DEVICE void prepare_head(Context<R>& x, HeadKind kind, bf16* head, const HeadLane<A>& gamma, const float2* rope,
                                bf16* append) {
  if (kind == HeadKind::kValue && !append) return;
  HeadLane<A> values;
  values.load(head, x.at.lane);
  if (kind != HeadKind::kValue) {
    if (kind == HeadKind::kQuery ? A::kQNorm : A::kKNorm)
      values.norm(gamma, kind == HeadKind::kQuery ? A::kQEps : A::kKEps);
    values.rotate(rope, x.at.lane);
    if (kind == HeadKind::kQuery) values.scale(A::kScale);
    values.store(head, x.at.lane);
  }
  if (kind != HeadKind::kQuery && append) values.store(append, x.at.lane);
}

// The cache row of a column's own position.
template <class A, class R>
MIRAGE_DEVICE bf16* append_to(Context<R>& x, HeadKind kind, int layer, int column, int kv_head) {
  const size_t row = kv_row<A>(layer, x.columns.slot[column], x.at.group * A::kKvHeads + kv_head,
                               static_cast<int>(x.columns.position[column]));
  return (kind == HeadKind::kKey ? x.params.keys : x.params.values) + row;
}

// Gathers the group's q, k and v of all columns into the activation, [columns, kWidth padded], and makes them ready,
// of the queries those of its own tasks. Each column's keys and values are appended to the cache by one member.
template <class A, class Q, class Mesh, int C, int S, class R>
MIRAGE_DEVICE void gather_all_heads(Context<R>& x, int layer, uint32_t epoch) {
  const HeadGammas<A> gammas(x.params, layer, x.at);
  constexpr int kPerColumn = A::kHeads + 2 * A::kKvHeads;
  const int base = slice_of<typename Q::Source, Mesh>(x.at.group, 0).rows.begin * 16;
  collect_all<Q, Mesh, C>(x.params.exchange, epoch, x.at, [&](int column, const Span& span, const Values& values) {
    store_span(x.activation + column * padded(A::kWidth), span, values, base, A::kWidth);
  });
  sync_consumers();
  x.mark(Mark::kCollected);
#pragma unroll 1
  for (int item = x.at.warp; item < C * kPerColumn; item += kConsumerWarps) {
    const int column = item / kPerColumn, head = item % kPerColumn;
    const bool appends = x.columns.slot[column] >= 0 && column % Mesh::kMembers == x.at.member;
    if (head < A::kHeads && !has_task<A, Mesh, C, S>(x.at.member, column, head)) continue;
    const HeadKind kind = head < A::kHeads                 ? HeadKind::kQuery
                          : head < A::kHeads + A::kKvHeads ? HeadKind::kKey
                                                           : HeadKind::kValue;
    bf16* append = nullptr;
    if (appends && kind != HeadKind::kQuery)
      append = append_to<A>(x, kind, layer, column, (head - A::kHeads) % A::kKvHeads);
    prepare_head<A>(x, kind, x.activation + column * padded(A::kWidth) + head * A::kHeadDim, gammas.of(kind),
                    x.rope + column * (A::kHeadDim / 2), append);
  }
  sync_consumers();
  x.mark(Mark::kPrepared);
}

// Gathers one task's q heads, k and v to shared memory at `to`, [kHeadsPerTask + 2, kHeadDim], and makes them ready.
// With `appends`, the first of the tasks that share keys and values appends them to the cache.
template <class A, class Q, class Mesh, int C, class R>
MIRAGE_DEVICE void gather_heads_of_task(Context<R>& x, bf16* to, const AttentionTask& task, bool appends, int layer,
                                        uint32_t epoch) {
  const HeadGammas<A> gammas(x.params, layer, x.at);
  typedef Producers<Q, Mesh> P;
  constexpr int H = A::kHeadsPerTask, D = A::kHeadDim;
  constexpr int kSteps = ceil_div(P::kUnits, kConsumers);
  const int base = slice_of<typename Q::Source, Mesh>(x.at.group, 0).rows.begin * 16;
  const int q = base + task.q_head * D, k = base + (A::kHeads + task.kv_head) * D, v = k + A::kKvHeads * D;
  auto meets = [](const Span& span, int begin, int count) {
    return span.begin < begin + count && span.begin + span.count > begin;
  };
#pragma unroll 1
  for (int s = 0; s < kSteps; s++) {
    const int unit = s * kConsumers + x.at.thread;
    int units[1] = {-1};
    Span span{0, 0};
    if (unit < P::kUnits) {
      span = span_of_unit<Q, Mesh>(P::of_unit(unit / Q::Source::kWords, x.at), unit % Q::Source::kWords);
      if (span.count > 0 && (meets(span, q, H * D) || meets(span, k, D) || meets(span, v, D))) units[0] = unit;
    }
    Values values[1];
    collect_units<Q, Mesh>(values, units, task.column, C, epoch, x.params.exchange, x.at);
    if (units[0] >= 0) {
      store_span(to, span, values[0], q, H * D);
      store_span(to + H * D, span, values[0], k, D);
      store_span(to + (H + 1) * D, span, values[0], v, D);
    }
  }
  sync_consumers();
  x.mark(Mark::kCollected);
  appends = appends && x.columns.slot[task.column] >= 0 && task.q_head % (A::kHeads / A::kKvHeads) == 0;
#pragma unroll 1
  for (int head = x.at.warp; head < H + 2; head += kConsumerWarps) {
    const HeadKind kind = head < H ? HeadKind::kQuery : head == H ? HeadKind::kKey : HeadKind::kValue;
    bf16* append = nullptr;
    if (appends && kind != HeadKind::kQuery) append = append_to<A>(x, kind, layer, task.column, task.kv_head);
    prepare_head<A>(x, kind, to + head * D, gammas.of(kind), x.rope + task.column * (A::kHeadDim / 2), append);
  }
  sync_consumers();
  x.mark(Mark::kPrepared);
}

}  // namespace mirage
