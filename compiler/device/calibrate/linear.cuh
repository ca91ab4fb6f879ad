// What a linear takes whose pages are there: all of it, from the phase's beginning to its last word.
#pragma once
#include "calibrate/common.cuh"

namespace mirage {

// Two row tiles of a CTA, in so many passes of one or two, each of so many pages.
template <class Mesh, class R, int kPassesOf, int kPagesOfPass>
struct CalibrationLinear {
  static constexpr int kPassTiles = 2, kPageK = R::kPageBytes / 512 / kPassTiles;
  static constexpr int kRowUnits = Mesh::kCtas * kPassTiles * kPassesOf, kUnitTiles = 1;
  static constexpr int kKTiles = kPagesOfPass * kPageK;
  static constexpr bool kRowsOverGroups = true, kRowsOverMembers = true, kRowsExact = true, kKExact = true;
  static constexpr int kPasses = kPassesOf, kTilesPerWarp = kPassTiles, kWarpRows = 1, kWarpK = kConsumerWarps;
  static constexpr int kWidth = kKTiles * 16;
  static constexpr bool kSwiGlu = false, kNorm = false;
  static constexpr int kNormWidth = 1, kGammaAt = 0, kGammaStride = 0;
  static constexpr float kEps = 0.f;
  static constexpr int kPassWords = ceil_div(kPassTiles * 16, kValuesPerWord), kWords = kPasses * kPassWords;
  static constexpr int kWordsAt = 0;
};

template <class Mesh, class R, int kPasses, int kPagesOfPass, int C>
MIRAGE_DEVICE void measure_linear(const Calibration& p) {
  typedef CalibrationLinear<Mesh, R, kPasses, kPagesOfPass> L;
  static_assert(kPasses * kPagesOfPass <= R::kPages, "all of a linear's pages are there before it begins");
  static_assert(C * padded(L::kWidth) * 2 <= kActivationBytes, "the columns fit the activation");
  static_assert(L::kWarpK * C * Products<L>::kStride * 4 <= kScratchBytes, "the products fit the scratch");
  extern __shared__ __align__(128) uint8_t shared[];
  if (begin_calibration<R>(shared))
    return produce<R>(p, shared, static_cast<uint64_t>(p.rounds) * kPasses * kPagesOfPass, threadIdx.x % kWarp);
  Params params = {};
  params.exchange = p.exchange;
  Context<R> x = calibration_context<R>(params, place_of_this_thread<Mesh>(), shared);
  for (int i = x.at.thread; i < C * padded(L::kWidth); i += kConsumers) x.activation[i] = 0;
  uint64_t clocks = 0;
#pragma unroll 1
  for (uint32_t round = 0; round < p.rounds; round++) {
    // Twice as long as the pages take to come.
    const uint64_t filled = clock_of_sm() + 40000;
    while (clock_of_sm() < filled) {
    }
    sync_consumers();
    const uint64_t begin = clock_of_sm();
    linear<L, C, Mesh>(x, p.epoch + round + 1);
    clocks += clock_of_sm() - begin;
    sync_consumers();
  }
  if (x.at.thread == 0) p.clocks[x.at.cta * kClocks] = clocks;
}

}  // namespace mirage
