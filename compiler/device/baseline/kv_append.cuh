// Writes the keys and values of every row to its sequence's cache. Cache layout: [slot][kv_head][position][head_dim],
// so that one head's positions lie one after the other. A thread copies one vector of k and one of v.
#pragma once

#include "common.cuh"

namespace mirage {

struct KvAppendParams {
  const bf16_t* k;
  const bf16_t* v;
  bf16_t* keys;
  bf16_t* values;
  const uint32_t* slot;      // of each row
  const uint32_t* position;  // of each row
  uint32_t rows;
  uint32_t kv_heads;
  uint32_t vectors;    // of a head
  uint32_t positions;  // of a slot
};

extern "C" __global__ void kv_append(const KvAppendParams p) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t vector = thread % p.vectors, head = thread / p.vectors % p.kv_heads;
  const uint32_t row = thread / p.vectors / p.kv_heads;
  if (row >= p.rows) return;
  const uint64_t place = (static_cast<uint64_t>(p.slot[row]) * p.kv_heads + head) * p.positions + p.position[row];
  store(p.keys, place * p.vectors + vector, load(p.k, thread));
  store(p.values, place * p.vectors + vector, load(p.v, thread));
}

}  // namespace mirage
