// What every phase sees: who this thread is, the launch's parameters, the shared-memory regions, and the step's
// columns. A column is one token position of one sequence that the current step computes; a step computes all of them
// at once.
#pragma once
#include "prelude.cuh"
#include "ring.cuh"

namespace mirage {

// One sequence of the batch, as the host asks for it. The Rust twin is runtime::megakernel::launch::Sequence.
struct Sequence {
  uint32_t prompt_length;     // positions below are given, not generated
  uint32_t first_logits;      // the first position whose logits are of use: a prompt's last, or 0 to score it
  uint32_t max_new;           // generated tokens, at most
  uint32_t top_k;             // 0: all
  float inverse_temperature;  // 0: greedy
  float top_p;
  uint64_t seed;
  uint32_t stream;      // the sequence's index in the random numbers
  int32_t logits_row;   // row of logits_dump for position 0, or -1
  uint32_t stop_begin;  // its stop tokens in Params::stop_tokens
  uint32_t stop_count;
};

// One column of a prefill step. The Rust twin is runtime::megakernel::launch::PrefillColumn.
struct PrefillColumn {
  int32_t slot;  // -1: nothing
  uint32_t position;
  uint32_t token;
  uint32_t first;  // the column of this step at which the sequence's run of positions begins
};

// The one kernel parameter. The Rust twin is runtime::megakernel::launch::Params.
struct Params {
  const uint8_t* weights;
  const uint64_t* stream_offsets;  // of each CTA's stream, in bytes
  const bf16* embedding;           // [vocab, hidden]
  const bf16* norms;               // [layers, per-layer vectors], then the final norm
  const float2* rope;              // [max_seq, head_dim / 2] of {cos, sin}
  bf16* keys;                      // [layers, slots, kv_heads, max_seq, head_dim]
  bf16* values;
  uint4* exchange;
  float* logits;            // [slots, vocab], scratch of the sampler
  float* logits_dump;       // [rows, vocab] or null
  const uint32_t* prompts;  // [slots, max_seq]
  const Sequence* sequences;
  const PrefillColumn* prefill;  // [wide_steps, wide columns], then [prefill_steps, prefill columns]
  const uint32_t* stop_tokens;
  uint32_t* tokens_out;    // host memory, [slots, max_seq], token + 1
  const uint32_t* cancel;  // host memory
  uint32_t wide_steps;
  uint32_t prefill_steps;  // after the wide ones
  uint32_t batch;
  uint32_t epoch;         // every epoch of this launch is above this one
  uint32_t trace_events;  // events of a CTA that fit the trace
  uint2* trace;           // [ctas, trace_events], of a kernel that is compiled with MIRAGE_TRACE
};

struct Columns {
  static constexpr int kMax = 64;
  int32_t slot[kMax];  // -1: the column is idle; its results are finite and ignored
  uint32_t position[kMax];
  uint32_t token[kMax];
  uint32_t first[kMax];
  float* logits[kMax];  // where the column's logits go, or null
  uint32_t note;        // of CTA 0, at the last barrier over the grid
  int32_t used;         // where rows are exchanged: columns up to the last one that is not idle
};

// What the columns of a decode step sample with, and the best that the CTA's rows of the head have drawn for them
// (draws.cuh).
struct Draws {
  uint64_t best[Columns::kMax];              // the highest score and its token
  uint64_t random[Columns::kMax];            // state of the random numbers
  float inverse_temperature[Columns::kMax];  // 0: the column is greedy, or idle
  float top_p[Columns::kMax];
  uint32_t top_k[Columns::kMax];
  uint32_t second[Columns::kMax];              // key of the second-highest score
  float logit[Columns::kMax][kConsumerWarps];  // of the token that is the best of the warp's, if it is the CTA's best
};

// Bytes of a column, for which program/layout.rs makes room.
constexpr int kDrawBytes = 32 + 4 * kConsumerWarps;
static_assert(sizeof(Draws) == Columns::kMax * kDrawBytes, "as large as the compiler takes them for");

struct Place {
  int cta, group, member;
  int thread, warp, lane;
};

template <class Mesh>
MIRAGE_DEVICE Place place_of_this_thread() {
  const int thread = threadIdx.x, cta = blockIdx.x;
  return Place{cta, cta / Mesh::kMembers, cta % Mesh::kMembers, thread, thread / kWarp, thread % kWarp};
}

// Shared-memory regions. `activation` holds what the next linear multiplies, [columns, K + 8] bf16, or q, k and v, and
// after the head what the sampler counts; `scratch` what warps of one phase hand to each other; `sum_squares` the parts
// of the norm of the residual stream.
template <class Ring>
struct Context {
  const Params& params;
  Place at;
  RingReader<Ring> ring;
  Columns& columns;
  Draws& draws;
  bf16* activation;
  float* scratch;
  float* sum_squares;  // [columns, kConsumerWarps], then the scale of each column that follows from them
  float2* rope;        // [columns, head_dim / 2]
  float* stream;       // the replicated residual stream
  Trace trace = {};

  MIRAGE_DEVICE void mark(Mark mark) { trace.mark(mark, ring.waited); }

  // Called where a phase begins. Without it the compiler computes every phase's addresses once, ahead of the loop over
  // layers, and keeps them in registers that it does not have.
  MIRAGE_DEVICE void begin_phase() {
    mark(Mark::kPhase);
    asm volatile("" : "+r"(at.cta), "+r"(at.thread), "+r"(at.warp), "+r"(at.lane), "+r"(at.group), "+r"(at.member));
  }
};

// How the eight consumer warps share the columns: whole warps to a column where there are fewer columns than warps.
template <int C>
struct WarpsOfColumns {
  static constexpr int kWarps = max_of(1, kConsumerWarps / C);    // warps of one column
  static constexpr int kColumns = max_of(1, C / kConsumerWarps);  // columns of one warp
  static constexpr int kStride = kWarps * kWarp;
  MIRAGE_DEVICE static int column(const Place& at, int i) { return at.warp / kWarps + i * kConsumerWarps; }
  MIRAGE_DEVICE static int part(const Place& at) { return at.warp % kWarps; }
  MIRAGE_DEVICE static int lane(const Place& at) { return part(at) * kWarp + at.lane; }
};

// Stride of a bf16 row in shared memory: 16 bytes of padding put the rows of an mma operand on distinct banks.
__host__ __device__ constexpr int padded(int width) { return width + 8; }

}  // namespace mirage
