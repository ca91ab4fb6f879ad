// Collecting what other CTAs published: the all-gathers, reduces, and reduce-scatters between phases.
//
// X, an exchange: Source is the linear whose words it reads; kGroups and kMembers say, for each mesh axis, whether the
// reader takes its own coordinate's values, all coordinates' side by side, or the sum over them (the source's columns
// were split along that axis, so its products are partial sums). Sums run in a fixed order: results repeat bit for bit.
#pragma once
#include "context.cuh"
#include "linear.cuh"
#include "words.cuh"

namespace mirage {

enum class Along { kOwn, kConcat, kSum };

// Words a thread asks for at once: enough to hide L2's latency, few enough to stay in registers.
constexpr int kWordsInFlight = 16;

template <class X, class Mesh>
struct Producers {
  static constexpr int kGroups = X::kGroups == Along::kConcat ? Mesh::kGroups : 1;
  static constexpr int kMembers = X::kMembers == Along::kConcat ? Mesh::kMembers : 1;
  static constexpr int kConcat = kGroups * kMembers;
  static constexpr int kSumGroups = X::kGroups == Along::kSum ? Mesh::kGroups : 1;
  static constexpr int kSumMembers = X::kMembers == Along::kSum ? Mesh::kMembers : 1;
  static constexpr int kPartials = kSumGroups * kSumMembers;
  // A unit is one word's place: six values of one column of one of the producers that are read side by side.
  static constexpr int kUnits = kConcat * X::Source::kWords;

  int group, member;
  MIRAGE_DEVICE static Producers of_unit(int producer, const Place& at) {
    return Producers{
        X::kGroups == Along::kConcat ? producer / kMembers : (X::kGroups == Along::kSum ? 0 : at.group),
        X::kMembers == Along::kConcat ? producer % kMembers : (X::kMembers == Along::kSum ? 0 : at.member)};
  }
  // Where the words of partial sum `i` begin in the exchange area.
  MIRAGE_DEVICE int words(int i, int columns) const {
    const int g = group + (kSumGroups > 1 ? i / kSumMembers : 0), m = member + (kSumMembers > 1 ? i % kSumMembers : 0);
    return X::Source::kWordsAt + (g * Mesh::kMembers + m) * columns * X::Source::kWords;
  }
};

// The values of a unit: `count` of them from index `begin` of the source's output; none where the word is unused.
struct Span {
  int begin, count;
};

template <class X, class Mesh>
MIRAGE_DEVICE Span span_of_unit(const Producers<X, Mesh>& from, int word) {
  typedef typename X::Source L;
  constexpr int kOutputsPerTile = L::kSwiGlu ? 8 : 16;
  const Share rows = slice_of<L, Mesh>(from.group, from.member).rows;
  const int pass = word / L::kPassWords, inside = word % L::kPassWords * kValuesPerWord;
  const int of_pass = pass_rows<L>(rows.count, pass) * kOutputsPerTile;
  return Span{rows.begin * kOutputsPerTile + pass * L::kPassTiles * kOutputsPerTile + inside,
              max_of(0, min_of(kValuesPerWord, of_pass - inside))};
}

// Collects N units at once, each the sum of its partials. units[i] < 0: nothing to collect.
template <class X, class Mesh, int N>
MIRAGE_DEVICE void collect_units(Values (&sums)[N], const int (&units)[N], int column, int columns, uint32_t epoch,
                                 const uint4* exchange, const Place& at) {
  typedef Producers<X, Mesh> P;
  constexpr int kBatch = batch_of(P::kPartials, kWordsInFlight / N);
#pragma unroll
  for (int i = 0; i < N; i++) sums[i] = Values{{0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
#pragma unroll 1
  for (int p0 = 0; p0 < P::kPartials; p0 += kBatch) {
    int from[N * kBatch];
    uint4 words[N * kBatch];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const P producer = P::of_unit(units[i] / X::Source::kWords, at);
      const int word = units[i] % X::Source::kWords;
#pragma unroll
      for (int p = 0; p < kBatch; p++)
        from[i * kBatch + p] = units[i] >= 0 && p0 + p < P::kPartials
                                   ? producer.words(p0 + p, columns) + column * X::Source::kWords + word
                                   : -1;
    }
    await_words(words, exchange, from, epoch);
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int p = 0; p < kBatch; p++)
        if (from[i * kBatch + p] >= 0) {
          const Values part = unpack(words[i * kBatch + p]);
#pragma unroll
          for (int e = 0; e < kValuesPerWord; e++) sums[i].v[e] += part.v[e];
        }
  }
}

// Walks all units of all columns, a warp's columns by the warp's lanes, and gives each to sink(column, span, values).
template <class X, class Mesh, int C, class Sink>
MIRAGE_DEVICE void collect_all(const uint4* exchange, uint32_t epoch, const Place& at, Sink sink) {
  typedef Producers<X, Mesh> P;
  typedef WarpsOfColumns<C> W;
  constexpr int kSteps = ceil_div(P::kUnits, W::kStride);
  constexpr int kBatch = batch_of(kSteps, min_of(4, kWordsInFlight / P::kPartials));
#pragma unroll 1
  for (int i = 0; i < W::kColumns; i++) {
    const int column = W::column(at, i);
#pragma unroll 1
    for (int s0 = 0; s0 < kSteps; s0 += kBatch) {
      int units[kBatch];
      Span spans[kBatch];
      Values values[kBatch];
#pragma unroll
      for (int s = 0; s < kBatch; s++) {
        const int unit = (s0 + s) * W::kStride + W::lane(at);
        units[s] = -1;
        spans[s] = Span{0, 0};
        if (unit < P::kUnits) {
          spans[s] = span_of_unit<X, Mesh>(P::of_unit(unit / X::Source::kWords, at), unit % X::Source::kWords);
          if (spans[s].count > 0) units[s] = unit;
        }
      }
      collect_units<X, Mesh>(values, units, column, C, epoch, exchange, at);
#pragma unroll
      for (int s = 0; s < kBatch; s++)
        if (units[s] >= 0) sink(column, spans[s], values[s]);
    }
  }
}

// Writes the values of a span that fall into [begin, begin + count) to a row whose first element is `begin`.
MIRAGE_DEVICE void store_span(bf16* row, const Span& span, const Values& values, int begin, int count) {
#pragma unroll
  for (int e = 0; e < kValuesPerWord; e += 2) {
    const int index = span.begin + e - begin;
    if (e < span.count && index >= 0 && index < count)
      *reinterpret_cast<uint32_t*>(row + index) = pack(values.v[e], values.v[e + 1]);
  }
}

// Collects into the activation what this CTA's slice of the columns of linear Next needs.
template <class X, class Next, class Mesh, int C, class R>
MIRAGE_DEVICE void collect_activation(Context<R>& x, uint32_t epoch) {
  x.begin_phase();
  const Share k = slice_of<Next, Mesh>(x.at.group, x.at.member).k;
  collect_all<X, Mesh, C>(x.params.exchange, epoch, x.at, [&](int column, const Span& span, const Values& values) {
    store_span(x.activation + column * padded(Next::kWidth), span, values, k.begin * 16, k.count * 16);
  });
  sync_consumers();
}

}  // namespace mirage
