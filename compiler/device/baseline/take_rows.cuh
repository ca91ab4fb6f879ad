// Rows of a table by index: the embedding, and the rows of a prefill that are worth a logit. One block for each row.
#pragma once

#include "common.cuh"

namespace mirage {

struct TakeRowsParams {
  const bf16_t* table;
  const uint32_t* index;  // of each row, below the table's length
  bf16_t* out;
  uint32_t vectors;  // of a row
};

extern "C" __global__ void take_rows(const TakeRowsParams p) {
  const uint64_t from = static_cast<uint64_t>(p.index[blockIdx.x]) * p.vectors;
  const uint64_t to = static_cast<uint64_t>(blockIdx.x) * p.vectors;
  for (uint32_t i = threadIdx.x; i < p.vectors; i += blockDim.x) store(p.out, to + i, load(p.table, from + i));
}

}  // namespace mirage
