/* Of linear.cc: a tile of rows times one panel, in vector registers. Rows of a tile and the lanes of a panel are sums that stay in
 * registers while the inputs go by; a broadcast number of x meets two registers of weights.
 *
 * What linear.cc expects of a kind of tiles (FloatTiles, DotTiles, AmxTiles):
 *   kMaxRows, kBlockRows   rows of a tile and of a block at most
 *   kPartInputs            inputs that many tiles take at a time
 *   width(num_rows)        rows that a tile of so many takes up
 *   x_bytes(width, num)    bytes of so many inputs of a tile, as `read` writes them
 *   read(x, first, num_rows, to)   rows first .. first+num_rows-1 of x as a tile
 *   multiply(width, panel, layout, inputs, x, y, next)   y[row][0..31] (+)= sum over `inputs` of x w; y is taken as 0 if the first
 *                          input is 0. x points at the first of the inputs
 * An object is what one thread multiplies with for a while. */
#pragma once
#include <algorithm>

#include "common/rows.h"
#include "cpu/linear_formats.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace lmi::LMI_LEVEL {
namespace {

/* Some of a weight's inputs: whole columns, and whole groups if there are several. */
struct Inputs {
  int64_t first, num;
};

#if defined(__AVX512F__)
constexpr int kMaxTileRows = 12; /* 24 sums of 32 registers */
#else
constexpr int kMaxTileRows = 4; /* 8 of 16 */
#endif
/* The weights that will be needed next, of which each column of a tile asks for `step` bytes, at most 128: what all tiles ask for
 * together is as much as they read. */
struct Next {
  const char *at;
  int64_t step;

  void ask() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + step / 2, 0, 2);
    at += step;
  }
};

template <int kRows>
struct Sums {
  Vector low[kRows], high[kRows];

  /* With the sums so far, if there are any. */
  void start(const float *y, bool is_first) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      low[row] = is_first ? Vector{} : load(y + row * kPanel);
      high[row] = is_first ? Vector{} : load(y + row * kPanel + kHalf);
    }
  }

  void write(float *y) const {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      store(y + row * kPanel, low[row]);
      store(y + row * kPanel + kHalf, high[row]);
    }
  }

  void add(const float *x, const Pair &weights) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      low[row] += x[row] * weights.low;
      high[row] += x[row] * weights.high;
    }
  }

#if defined(__AVX512BF16__)
  /* x: two inputs a word. The products of a pair are added one after the other, rounded like a multiply-add. */
  void add_dots(const uint32_t *x, const uint32_t *column) {
    const __m512bh w_low = (__m512bh)load(column), w_high = (__m512bh)load(column + kHalf);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[row]));
      low[row] = (Vector)_mm512_dpbf16_ps((__m512)low[row], pair, w_low);
      high[row] = (Vector)_mm512_dpbf16_ps((__m512)high[row], pair, w_high);
    }
  }
#endif
};

/* Widths that a tile is compiled for: of what several tiles share out, 7 to 12 rows each, all. */
inline int64_t vector_width(int64_t num_rows) {
  for (const int64_t width : {1, 2, 4, 6, 7, 8, 9, 10, 11}) {
    if (num_rows <= width && width <= kMaxTileRows) return width;
  }
  return kMaxTileRows;
}

/* fn(std::integral_constant) of a width. */
template <class Function>
void with_width(int64_t width, Function fn) {
  switch (width) {
    case 1: return fn(std::integral_constant<int, 1>());
    case 2: return fn(std::integral_constant<int, 2>());
#if defined(__AVX512F__)
    case 4: return fn(std::integral_constant<int, 4>());
    case 6: return fn(std::integral_constant<int, 6>());
    case 7: return fn(std::integral_constant<int, 7>());
    case 8: return fn(std::integral_constant<int, 8>());
    case 9: return fn(std::integral_constant<int, 9>());
    case 10: return fn(std::integral_constant<int, 10>());
    case 11: return fn(std::integral_constant<int, 11>());
#endif
    default: return fn(std::integral_constant<int, kMaxTileRows>());
  }
}

/* x and weights as floats; x: [inputs][width]. Each output is one sum that takes its inputs in ascending order, a multiply-add each. */
template <class Columns>
struct FloatTiles {
  static constexpr int64_t kMaxRows = kMaxTileRows, kBlockRows = 256, kPartInputs = 512;
  static int64_t width(int64_t num_rows) { return vector_width(num_rows); }
  static int64_t x_bytes(int64_t width, int64_t num_inputs) { return 4 * width * num_inputs; }

  static void read(const lmi_tensor &x, int64_t first, int64_t num_rows, char *to) {
    const int64_t num_inputs = x.size[1], num = width(num_rows);
    Floats values(num_inputs);
    for (int64_t row = 0; row < num; ++row) {
      if (row < num_rows) read_row(x, first + row, values);
      else std::fill_n(static_cast<float *>(values), num_inputs, 0.0f);
      float *column = reinterpret_cast<float *>(to) + row;
      for (int64_t e = 0; e < num_inputs; ++e) column[e * num] = values[e];
    }
  }

  static void multiply(int64_t width, const char *panel, const PanelLayout &layout, Inputs inputs, const char *x, float *y, Next next) {
    with_width(width, [&](auto rows) {
      for (int lane = 0; lane < kHalf; lane += kLanes) {
        add_inputs<rows>(panel, layout, inputs, reinterpret_cast<const float *>(x), lane, y + lane, next);
      }
    });
  }

 private:
  template <int kRows>
  static void add_inputs(const char *panel, const PanelLayout &layout, Inputs inputs, const float *x, int lane, float *y, Next next) {
    Sums<kRows> sums;
    sums.start(y, inputs.first == 0);
    for (int64_t e = inputs.first, end = inputs.first + inputs.num; e < end;) {
      const char *group = panel + e / layout.group_inputs * layout.group_bytes;
      const int64_t skipped = e % layout.group_inputs, num = std::min(layout.group_inputs - skipped, end - e);
      const char *column = group + layout.scale_bytes + skipped / Columns::kInputs * (4 * Columns::kWords);
      add_group(Columns(reinterpret_cast<const float *>(group), lane), column + 4 * lane, num, x, sums, next);
      x += num * kRows;
      e += num;
    }
    sums.write(y);
  }

  template <int kRows>
  static void add_group(const Columns &columns, const char *at, int64_t num_inputs, const float *x, Sums<kRows> &sums, Next &next) {
    int64_t e = 0;
    for (; e + Columns::kInputs <= num_inputs; e += Columns::kInputs, at += 4 * Columns::kWords) {
      next.ask();
#pragma GCC unroll 4
      for (int i = 0; i < Columns::kInputs; ++i) {
        sums.add(x + (e + i) * kRows, columns.input(reinterpret_cast<const uint32_t *>(at), i));
      }
    }
    for (int i = 0; e + i < num_inputs; ++i) sums.add(x + (e + i) * kRows, columns.input(reinterpret_cast<const uint32_t *>(at), i));
  }
};

#if defined(__AVX512BF16__)
/* bf16 by dot products of two inputs; x: [pairs of inputs][width]. */
struct DotTiles {
  static constexpr int64_t kMaxRows = kMaxTileRows, kBlockRows = 1024, kPartInputs = 2048;
  static int64_t width(int64_t num_rows) { return vector_width(num_rows); }
  static int64_t x_bytes(int64_t width, int64_t num_inputs) { return 4 * width * ((num_inputs + 1) / 2); }

  static void read(const lmi_tensor &x, int64_t first, int64_t num_rows, char *to) {
    const int64_t num = width(num_rows), num_pairs = (x.size[1] + 1) / 2;
    uint32_t *words = reinterpret_cast<uint32_t *>(to);
    std::fill_n(words, num * num_pairs, 0u);
    for (int64_t row = 0; row < num_rows; ++row) {
      const char *from = static_cast<const char *>(at(x, first + row));
      uint32_t *word = words + row;
      for (int64_t pair = 0; pair < x.size[1] / 2; ++pair) std::memcpy(word + pair * num, from + 4 * pair, 4);
      if (x.size[1] % 2) std::memcpy(word + (num_pairs - 1) * num, from + 4 * (num_pairs - 1), 2);
    }
  }

  static void multiply(int64_t width, const char *panel, const PanelLayout &layout, Inputs inputs, const char *x, float *y, Next next) {
    const char *column = panel + inputs.first / 2 * layout.column_bytes;
    with_width(width, [&](auto rows) {
      Sums<rows> sums;
      sums.start(y, inputs.first == 0);
      const uint32_t *pairs = reinterpret_cast<const uint32_t *>(x);
      for (int64_t e = 0; e < inputs.num; e += 2, column += 128, pairs += rows) {
        next.ask();
        sums.add_dots(pairs, reinterpret_cast<const uint32_t *>(column));
      }
      sums.write(y);
    });
  }
};
#endif

}  // namespace
}  // namespace lmi::LMI_LEVEL
