// Exchange words: 128 bits that carry 96 bits of payload and the epoch in which they were written, stored and loaded as
// one. A reader that sees the epoch it waits for has the payload: there is no separate flag and no fence.
// Owns the word, its packing and the waiting; which words a phase reads and writes is exchange.cuh's concern.
#pragma once
#include "context.cuh"

namespace mirage {

// bf16 values a word carries.
constexpr int kValuesPerWord = 6;

MIRAGE_DEVICE void store_word(uint4* p, uint32_t a, uint32_t b, uint32_t c, uint32_t epoch) {
  const uint64_t low = static_cast<uint64_t>(b) << 32 | a, high = static_cast<uint64_t>(epoch) << 32 | c;
  asm volatile("{ .reg .b128 w; mov.b128 w, {%1, %2}; st.relaxed.gpu.global.b128 [%0], w; }" ::"l"(p), "l"(low),
               "l"(high)
               : "memory");
}

MIRAGE_DEVICE uint4 load_word(const uint4* p) {
  uint64_t low, high;
  asm volatile("{ .reg .b128 w; ld.relaxed.gpu.global.b128 w, [%2]; mov.b128 {%0, %1}, w; }"
               : "=l"(low), "=l"(high)
               : "l"(p)
               : "memory");
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                    static_cast<uint32_t>(high >> 32));
}

// Words with less to say repeat it, and their readers use all of it. Of a word whose middle nobody reads ptxas loads
// the two ends one by one, and then the payload may be older than the epoch beside it.
MIRAGE_DEVICE void store_scalar(uint4* p, uint32_t value, uint32_t epoch) { store_word(p, value, value, value, epoch); }
MIRAGE_DEVICE uint32_t scalar_of(const uint4& word) { return word.x & word.y & word.z; }
MIRAGE_DEVICE void store_pair(uint4* p, uint32_t first, uint32_t second, uint32_t epoch) {
  store_word(p, first, second, second, epoch);
}
MIRAGE_DEVICE uint2 pair_of(const uint4& word) { return make_uint2(word.x, word.y & word.z); }

// Waits until the N words at base[offsets[i]] carry `epoch`; a negative offset is not waited for. The whole set is
// asked for again at each turn: asking word by word, or only for the missing ones, is slower.
template <int N>
MIRAGE_DEVICE void await_words(uint4 (&words)[N], const uint4* base, const int (&offsets)[N], uint32_t epoch) {
  // A word that is not waited for gets a value too: a register that is set only under a condition would be taken
  // for live all the way from the kernel's start.
#pragma unroll
  for (int i = 0; i < N; i++) words[i] = make_uint4(0, 0, 0, 0);
  Spin spin;
  bool complete;
  do {
    complete = true;
#pragma unroll
    for (int i = 0; i < N; i++)
      if (offsets[i] >= 0) words[i] = load_word(base + offsets[i]);
#pragma unroll
    for (int i = 0; i < N; i++) complete &= offsets[i] < 0 || words[i].w == epoch;
    spin.turn();
  } while (!complete);
}

// Things a thread does at once of `all` it has to do, at most `most`, in rounds of equal size.
__host__ __device__ constexpr int batch_of(int all, int most) { return ceil_div(all, ceil_div(all, max_of(1, most))); }

struct Values {
  float v[kValuesPerWord];
};

MIRAGE_DEVICE Values unpack(const uint4& word) {
  return Values{
      {low_half(word.x), high_half(word.x), low_half(word.y), high_half(word.y), low_half(word.z), high_half(word.z)}};
}

// Publishes `outputs` values of each of C columns as words of six: pair(column, index) gives values `index` and
// `index + 1` as a pair of bf16, and is asked once for each by one lane of three; ten words a warp at a time. A
// column's words begin `stride` words after the previous column's. kWords: words of a column at most.
template <int C, int kWords, class Pair>
MIRAGE_DEVICE void publish_values(uint4* to, int stride, int outputs, uint32_t epoch, const Place& at, Pair pair) {
  constexpr int kLanes = kValuesPerWord / 2, kWordsPerWarp = kWarp / kLanes;
  const int slot = at.lane / kLanes, i = at.lane % kLanes;
#pragma unroll 1
  for (int first = at.warp * kWordsPerWarp; first < C * kWords; first += kConsumerWarps * kWordsPerWarp) {
    const int word = first + slot, column = word / kWords, index = word % kWords * kValuesPerWord + 2 * i;
    const bool mine = slot < kWordsPerWarp && word < C * kWords && index < outputs;
    const uint32_t a = mine ? pair(column, index) : 0;
    const uint32_t b = __shfl_down_sync(~0u, a, 1), c = __shfl_down_sync(~0u, a, 2);
    if (mine && i == 0) store_word(to + column * stride + word % kWords, a, b, c, epoch);
  }
}

}  // namespace mirage
