/* Of linear.cc: bf16 by the tile instructions of AMX, and which kind of tiles bf16 weights get at this level. */
#pragma once
#include "common/amx.h"
#include "cpu/linear_tiles.h"

namespace lmi::LMI_LEVEL {
namespace {

#if defined(LMI_AMX)
/* 32 rows times 32 outputs are four accumulators (0 to 3); a step of 32 inputs loads two tiles of x (4, 5) and two of weights (6, 7).
 * Up to 16 rows are one tile of x and two accumulators, cut to the rows there are; so one row costs what reading the weights costs.
 * x: [steps of 32 inputs][rows][32], inputs beyond the last one 0. */
class AmxTiles {
 public:
  static constexpr bool kInPlace = false;
  static constexpr int64_t kMaxRows = 32, kPartInputs = 512; /* a tile's x in the first-level cache */
  static constexpr int64_t kBlockRows = 512;                 /* their x in the second-level cache */

  static int64_t width(int64_t num_rows) { return num_rows <= 16 ? num_rows : kMaxRows; }
  static int64_t x_bytes(int64_t width, int64_t num_inputs) { return (num_inputs + kStep - 1) / kStep * kStep * width * 2; }

  static void read(const lmi_tensor &x, int64_t first, int64_t num_rows, char *to) {
    const int64_t num = width(num_rows), step_bytes = num * 2 * kStep, rest = x.size[1] % kStep;
    char *const end = to + step_bytes * (x.size[1] / kStep);
    for (int64_t row = 0; row < num; ++row, to += 2 * kStep) {
      const char *from = row < num_rows ? static_cast<const char *>(at(x, first + row)) : nullptr;
      char *step = to;
      for (; step < end; step += step_bytes) { /* of a fixed size: instructions, no calls */
        if (from) std::memcpy(step, from, 2 * kStep);
        else std::memset(step, 0, 2 * kStep);
        if (from) from += 2 * kStep;
      }
      if (rest == 0) continue;
      std::memset(step, 0, 2 * kStep);
      if (from) std::memcpy(step, from, static_cast<size_t>(2 * rest));
    }
  }

  void multiply(int64_t width, const char *panel, const PanelLayout &, Inputs inputs, const TileInput &x,
                const SumsPlace &y, Next next) {
    tiles_.configure(std::min<int64_t>(width, 16));
    const char *weights = panel + inputs.first / kStep * kWeightBytes;
    const int64_t num_steps = (inputs.num + kStep - 1) / kStep;
    with_lines(next.step, [&](auto lines) {
      if (width == kMaxRows) multiply_32<lines>(weights, num_steps, x.data, y, inputs.first == 0, next);
      else multiply_16<lines>(weights, num_steps, x.data, width * 2 * kStep, y, inputs.first == 0, next);
    });
  }

 private:
  static constexpr int64_t kStep = kTileInputs, kWeightBytes = 2 * kStep * kPanel;

  /* fn(std::integral_constant) of the lines that a step asks for: as many as it takes, or a few more. A loop over them would take
   * longer than the products beside it. */
  template <class Function>
  static void with_lines(int64_t column_bytes, Function fn) {
    const int64_t lines = column_bytes * (kStep / 2) / 64;
    if (lines <= 2) return fn(std::integral_constant<int, 2>());
    if (lines <= 4) return fn(std::integral_constant<int, 4>());
    if (lines <= 8) return fn(std::integral_constant<int, 8>());
    if (lines <= 16) return fn(std::integral_constant<int, 16>());
    return fn(std::integral_constant<int, 32>());
  }

  template <int kLines>
  static void ask(Next &next) {
#pragma GCC unroll 32
    for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(next.at + line * 64, 0, 2);
    next.at += kStep / 2 * next.step; /* a step has 16 columns */
  }

  /* Weights pass by the first-level cache, where x stays. */
  template <int kLines>
  static void multiply_32(const char *weights, int64_t num_steps, const char *x, const SumsPlace &y, bool is_first, Next next) {
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, y.low, 4 * y.stride);
      _tile_loadd(1, y.high, 4 * y.stride);
      _tile_loadd(2, y.low + 16 * y.stride, 4 * y.stride);
      _tile_loadd(3, y.high + 16 * y.stride, 4 * y.stride);
    }
    for (int64_t step = 0; step < num_steps; ++step, weights += kWeightBytes, x += kMaxRows * 64) {
      ask<kLines>(next);
      _tile_stream_loadd(6, weights, 128);
      _tile_loadd(4, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stream_loadd(7, weights + 64, 128);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, x + 16 * 64, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y.low, 4 * y.stride);
    _tile_stored(1, y.high, 4 * y.stride);
    _tile_stored(2, y.low + 16 * y.stride, 4 * y.stride);
    _tile_stored(3, y.high + 16 * y.stride, 4 * y.stride);
  }

  template <int kLines>
  static void multiply_16(const char *weights, int64_t num_steps, const char *x, int64_t step_bytes, const SumsPlace &y, bool is_first,
                          Next next) {
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_loadd(0, y.low, 4 * y.stride);
      _tile_loadd(1, y.high, 4 * y.stride);
    }
    for (int64_t step = 0; step < num_steps; ++step, weights += kWeightBytes, x += step_bytes) {
      ask<kLines>(next);
      _tile_loadd(4, x, 64);
      _tile_loadd(6, weights, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, weights + 64, 128);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, y.low, 4 * y.stride);
    _tile_stored(1, y.high, 4 * y.stride);
  }

  ThreadTiles<false> tiles_;
};

using BF16Tiles = AmxTiles;
#elif defined(__AVX512BF16__)
using BF16Tiles = DotTiles;
#else
using BF16Tiles = FloatTiles<BF16Columns>;
#endif

}  // namespace
}  // namespace lmi::LMI_LEVEL
