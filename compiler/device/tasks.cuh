// How a group's attention is cut into tasks, and where their words lie. A, an attention: see attention.cuh.
#pragma once
#include "words.cuh"

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

// What a task is about; `q_head` and `kv_head` count within the group.
struct AttentionTask {
  int split, q_head, kv_head, column;
};

template <class A, class Mesh, int C, int S>
MIRAGE_DEVICE AttentionTask task_of(int index) {
  typedef AttentionTasks<A, Mesh, C, S> T;
  const int block = index / S % T::kHeadBlocks, kv_head = index / S / T::kHeadBlocks % A::kKvHeads;
  return AttentionTask{index % S, kv_head * T::kQPerKv + block * A::kHeadsPerTask, kv_head,
                       index / S / T::kHeadBlocks / A::kKvHeads};
}

// Whether one of a member's tasks is about a query head of a column.
template <class A, class Mesh, int C, int S>
MIRAGE_DEVICE bool has_task(int member, int column, int q_head) {
  typedef AttentionTasks<A, Mesh, C, S> T;
  const int first = (column * A::kKvHeads * T::kHeadBlocks + q_head / A::kHeadsPerTask) * S;
  return (member + Mesh::kMembers - first % Mesh::kMembers) % Mesh::kMembers < S;
}

}  // namespace mirage
