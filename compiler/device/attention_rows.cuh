// Attention of steps that exchange rows. A task takes all positions of its columns: with many columns there are tasks
// enough for everybody, so no part of the positions has to be merged with another.
//
// A, an attention, has besides what rows.cuh says of a linear: kOutputs are the heads' elements of all groups.
#pragma once
#include "attention.cuh"
#include "rows.cuh"

namespace mirage {

// Makes the heads of a column in shared memory ready, by the warp that calls it.
template <class A, class R>
MIRAGE_DEVICE void prepare_row_head(Context<R>& x, HeadKind kind, bf16* head, const HeadGammas<A>& gammas, int column,
                                    int kv_head, bool appends, int layer) {
  bf16* append = nullptr;
  if (appends && kind != HeadKind::kQuery) append = append_to<A>(x, kind, layer, column, kv_head);
  const float2* rope = x.params.rope + static_cast<size_t>(x.columns.position[column]) * (A::kHeadDim / 2);
  prepare_head<A>(x, kind, head, gammas.of(kind), rope, append);
}

// Gathers the group's q, k and v of all columns into the activation, [columns, kWidth padded], and makes them ready, of
// the queries those of its own tasks. Each column's keys and values are appended to the cache by one member.
template <class A, class L, class Mesh, int C, class R>
MIRAGE_DEVICE void gather_all_rows(Context<R>& x, int layer) {
  const HeadGammas<A> gammas(x.params, layer, x.at);
  constexpr int kHeads = A::kHeads + 2 * A::kKvHeads;
  const int base = slice_of<L, Mesh>(x.at.group, 0).rows.begin * 16;
  copy_rows<C>(x, x.activation, padded(A::kWidth), rows_of<L>(x.params), L::kOutputs, base, A::kWidth);
  await_copies();
  sync_consumers();
  x.mark(Mark::kCollected);
#pragma unroll 1
  for (int item = x.at.warp; item < C * kHeads; item += kConsumerWarps) {
    const int column = item / kHeads, head = item % kHeads;
    if (is_idle(x, column)) continue;
    if (head < A::kHeads && !has_task<A, Mesh, C, 1>(x.at.member, column, head)) continue;
    const HeadKind kind = head < A::kHeads                 ? HeadKind::kQuery
                          : head < A::kHeads + A::kKvHeads ? HeadKind::kKey
                                                           : HeadKind::kValue;
    prepare_row_head<A>(x, kind, x.activation + column * padded(A::kWidth) + head * A::kHeadDim, gammas, column,
                        (head - A::kHeads) % A::kKvHeads, column % Mesh::kMembers == x.at.member, layer);
  }
  sync_consumers();
  x.mark(Mark::kPrepared);
}

// A member's tasks: every kMembers-th.
template <class A, class Mesh, int C>
struct OwnTasks {
  typedef AttentionTasks<A, Mesh, C, 1> T;
  static constexpr int kCount = ceil_div(T::kCount, Mesh::kMembers);
  // Heads and elements that a task of columns which are sequences of their own gathers.
  static constexpr int kHeads = A::kHeadsPerTask + 2, kElements = kHeads * A::kHeadDim;
  // Tasks that the activation holds at once: all, but for odd shapes.
  static constexpr int kAtOnce = min_of(kCount, C* padded(A::kWidth) / kElements);
  static_assert(kAtOnce > 0, "a task's heads must fit the activation");

  MIRAGE_DEVICE static AttentionTask task(const Place& at, int i) {
    return task_of<A, Mesh, C, 1>(i * Mesh::kMembers + at.member);
  }
  // Whether there is a task number i, and somebody needs it.
  template <class R>
  MIRAGE_DEVICE static bool is_there(const Context<R>& x, int i) {
    return i * Mesh::kMembers + x.at.member < T::kCount && !is_idle(x, task(x.at, i).column);
  }
};

// Gathers the q heads, k and v of some tasks from number `first` on to the activation, [tasks, kHeadsPerTask + 2,
// kHeadDim], and makes them ready. The first of the tasks that share keys and values appends them to the cache.
template <class A, class L, class Mesh, int C, class R>
MIRAGE_DEVICE void gather_rows_of_tasks(Context<R>& x, int first, int layer) {
  typedef OwnTasks<A, Mesh, C> Own;
  const HeadGammas<A> gammas(x.params, layer, x.at);
  constexpr int H = A::kHeadsPerTask, D = A::kHeadDim, kChunks = D / 8;
  const bf16* rows = rows_of<L>(x.params) + slice_of<L, Mesh>(x.at.group, 0).rows.begin * 16;
#pragma unroll 1
  for (int i = x.at.thread; i < Own::kAtOnce * Own::kHeads * kChunks; i += kConsumers) {
    const int number = first + i / kChunks / Own::kHeads, head = i / kChunks % Own::kHeads;
    if (!Own::is_there(x, number)) continue;
    const AttentionTask task = Own::task(x.at, number);
    const int k = A::kHeads + task.kv_head;
    const int from = head < H ? task.q_head + head : head == H ? k : k + A::kKvHeads;
    copy_16(x.activation + i * 8, rows + static_cast<size_t>(task.column) * L::kOutputs + from * D + i % kChunks * 8);
  }
  await_copies();
  sync_consumers();
  x.mark(Mark::kCollected);
#pragma unroll 1
  for (int item = x.at.warp; item < Own::kAtOnce * Own::kHeads; item += kConsumerWarps) {
    const int number = first + item / Own::kHeads, head = item % Own::kHeads;
    if (!Own::is_there(x, number)) continue;
    const AttentionTask task = Own::task(x.at, number);
    const HeadKind kind = head < H ? HeadKind::kQuery : head == H ? HeadKind::kKey : HeadKind::kValue;
    prepare_row_head<A>(x, kind, x.activation + item * D, gammas, task.column, task.kv_head,
                        task.q_head % (A::kHeads / A::kKvHeads) == 0, layer);
  }
  sync_consumers();
  x.mark(Mark::kPrepared);
}

// The attention phase of a worker. L: the linear that makes q, k and v. kAlone: every column is a sequence of its own.
template <class A, class L, class Mesh, int C, bool kAlone, class R>
MIRAGE_DEVICE void attention_rows(Context<R>& x, int layer, uint32_t epoch) {
  static_assert(A::kHeadsPerTask <= kMostHeads, "a task's query heads are the columns of one mma");
  x.begin_phase();
  typedef OwnTasks<A, Mesh, C> Own;
  // Positions of a task's column that the cache holds; the others, up to its own, come with this step.
  auto cached_of = [&](int column) {
    return static_cast<int>(x.columns.position[column]) - (column - static_cast<int>(x.columns.first[column]));
  };
  // Asks for a task's first old keys and values: they do not depend on the current tokens, nor on the task before.
  KvBatch<A> batch;
  auto load_first = [&](int number) {
    const bool there = Own::is_there(x, number);
    const AttentionTask task = Own::task(x.at, there ? number : 0);
    const KvRows rows =
        kv_rows<A>(x.params, layer, x.columns.slot[task.column], x.at.group * A::kKvHeads + task.kv_head);
    const int first = first_position(x.at, 0, 0, 1), cached = there ? cached_of(task.column) : 0;
    load_keys<A>(batch, rows, x.at, first, cached);
    load_values<A>(batch, rows, x.at, first, cached);
  };
  if (kAlone) load_first(0);
  await_flags<Mesh, false>(x, L::kFlagsAt, epoch);
  if (!kAlone) gather_all_rows<A, L, Mesh, C>(x, layer);
#pragma unroll 1
  for (int number = 0; number < Own::kCount; number++) {
    if (kAlone && number % Own::kAtOnce == 0) gather_rows_of_tasks<A, L, Mesh, C>(x, number, layer);
    if (!Own::is_there(x, number)) {
      if (kAlone) load_first(number + 1);
      continue;
    }
    if (!kAlone) load_first(number);  // a prompt's own keys are mostly in shared memory
    const AttentionTask task = Own::task(x.at, number);
    const int position = static_cast<int>(x.columns.position[task.column]), cached = cached_of(task.column);
    const KvRows rows =
        kv_rows<A>(x.params, layer, x.columns.slot[task.column], x.at.group * A::kKvHeads + task.kv_head);
    // The task's query heads, and the keys and values that are not in the cache.
    const bf16* queries = x.activation + number % Own::kAtOnce * Own::kElements;
    FreshRows fresh{queries + A::kHeadsPerTask * A::kHeadDim, cached, 0, A::kHeadDim};
    if (!kAlone) {
      queries = x.activation + task.column * padded(A::kWidth) + task.q_head * A::kHeadDim;
      fresh = FreshRows{
          x.activation + x.columns.first[task.column] * padded(A::kWidth) + (A::kHeads + task.kv_head) * A::kHeadDim,
          cached, padded(A::kWidth), A::kKvHeads * A::kHeadDim};
    }
    Softmax<A> softmax;
#pragma unroll 1
    for (int stripe = 0;; stripe++) {
      asm volatile("" : "+r"(x.at.warp), "+r"(x.at.lane));  // as begin_phase
      const int first = first_position(x.at, stripe, 0, 1);
      if (first > position) break;
      const int next = first_position(x.at, stripe + 1, 0, 1);
      take_fresh<A>(batch, fresh, x.at, first, position);
      const uint32_t weights = softmax.weigh(queries, batch, position + 1 - first, x.at);
      load_keys<A>(batch, rows, x.at, next, cached);
      softmax.add_values(batch, weights);
      load_values<A>(batch, rows, x.at, next, cached);
    }
    softmax.finish();
    sync_consumers();  // the previous task's results are still being read
    store_result<A>(x.scratch, softmax, x.at);
    if (kAlone) load_first(number + 1);
    sync_consumers();
    x.mark(Mark::kAttended);
    constexpr int kPairs = A::kHeadDim / 2;
    uint32_t* to = reinterpret_cast<uint32_t*>(rows_of<A>(x.params) + static_cast<size_t>(task.column) * A::kOutputs +
                                               (x.at.group * A::kHeads + task.q_head) * A::kHeadDim);
#pragma unroll 1
    for (int i = x.at.thread; i < A::kHeadsPerTask * kPairs; i += kConsumers)
      to[i] = merged_pair<A>(x.scratch, i / kPairs, i % kPairs * 2, true);
  }
  raise_flag(x, A::kFlagsAt, epoch);
}

}  // namespace mirage
