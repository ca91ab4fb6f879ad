// Weights into the order of the streams, when a model is loaded: a kernel of its own beside mirage_generate, in the
// same cubin, so that loading needs no compiler. Owns the layout of a tile as it is written (program::stream::fragment
// in the compiler); where tiles go is told by the host.
//
// A piece of a weight comes as it is in the checkpoint, row after row, but the rows are those of the packed weight, in
// its order. 16 rows are a row tile, and every 16 of their columns become a tile of 512 bytes somewhere in the streams.
#pragma once
#include "prelude.cuh"

namespace mirage {

// Tiles of one row tile that lie in one CTA's stream at equal distances. The Rust twin is runtime::pack::pieces::Run.
struct RepackRun {
  uint64_t at;      // bytes into the weights: its first tile
  uint32_t stride;  // bytes from a tile to the next
  uint32_t row;     // row tile of the piece
  uint32_t k;       // first column tile
  uint32_t count;   // column tiles
};

// The Rust twin is runtime::megakernel::upload::RepackParams.
struct RepackParams {
  const bf16* rows;  // [row tiles * 16, columns]
  const RepackRun* runs;
  uint8_t* weights;
  uint64_t columns;
};

static_assert(sizeof(RepackRun) == 24 && sizeof(RepackParams) == 32, "the Rust twins have these sizes");

}  // namespace mirage

// A run for every block in x, its tiles in turns over the blocks in y and their warps. A lane gathers its own 16 bytes
// of a tile, the fragment that it will multiply one day: a warp reads 16 rows of 32 bytes and writes 512 in one piece.
extern "C" __global__ void __launch_bounds__(mirage::kConsumers)
    mirage_repack(const __grid_constant__ mirage::RepackParams params) {
  using namespace mirage;
  const RepackRun run = params.runs[blockIdx.x];
  const uint32_t lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  // In pairs of columns, of which a tile has eight.
  const uint64_t pairs = params.columns / 2;
  const uint32_t* top =
      reinterpret_cast<const uint32_t*>(params.rows) + (run.row * 16ull + lane / 4) * pairs + lane % 4;
  const uint32_t* bottom = top + 8 * pairs;
  uint8_t* out = params.weights + run.at + lane * sizeof(uint4);
  for (uint32_t i = blockIdx.y * warps + threadIdx.x / kWarp; i < run.count; i += gridDim.y * warps) {
    const uint64_t column = (static_cast<uint64_t>(run.k) + i) * 8;
    *reinterpret_cast<uint4*>(out + static_cast<uint64_t>(i) * run.stride) =
        make_uint4(top[column], bottom[column], top[column + 4], bottom[column + 4]);
  }
}
