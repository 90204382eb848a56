/* Of linear.cc: a tile of rows times one panel, in vector registers. Rows of a tile and the lanes of a panel are sums that stay in
 * registers while the inputs go by; a broadcast number of x meets two registers of weights.
 *
 * What linear.cc expects of a kind of tiles (FloatTiles, DotTiles, AmxTiles):
 *   kMaxRows, kBlockRows   rows of a tile and of a block at most
 *   kPartInputs            inputs that many tiles take at a time
 *   width(num_rows)        rows that a tile of so many takes up
 *   kInPlace               x is read where it is; otherwise
 *   x_bytes(width, num)    bytes of so many inputs of a tile, as `read` writes them
 *   read(x, first, num_rows, to)   rows first .. first+num_rows-1 of x as a tile
 *   multiply(width, panel, layout, inputs, x, y, next)   y (+)= sum over `inputs` of x w; y is taken as 0 if the first input is 0.
 *                          x points at the first of the inputs
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

/* Of a panel, the part of one group from input e on, up to input `end` at most. */
struct GroupPart {
  int64_t group, first, num; /* first: counted from the group's first input */
  const char *start, *columns;

  GroupPart(const char *panel, const PanelLayout &layout, int64_t e, int64_t end)
      : group(e / layout.group_inputs),
        first(e % layout.group_inputs),
        num(std::min(layout.group_inputs - first, end - e)),
        start(panel + group * layout.group_bytes),
        columns(start + layout.scale_bytes + first / layout.column_inputs * layout.column_bytes) {}
};

/* A tile's x, from the first of some inputs on: as `read` wrote it, or as it was given, `stride` bytes from row to row. */
struct TileInput {
  const char *data;
  int64_t stride;
};

/* Where a tile's sums with one panel lie: a row's 16 of each half, and how many floats it is to the next row's. */
struct SumsPlace {
  float *low, *high;
  int64_t stride;
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

#if defined(__AVX512BF16__)
/* Two inputs of a panel's 32 outputs. */
struct Pairs {
  __m512bh low, high;
};
#endif

template <int kRows>
struct Sums {
  Vector low[kRows], high[kRows];

  /* With the sums so far, if there are any. */
  void start(const SumsPlace &y, bool is_first) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      low[row] = is_first ? Vector{} : load(y.low + row * y.stride);
      high[row] = is_first ? Vector{} : load(y.high + row * y.stride);
    }
  }

  /* Times an output's scale, and what is in y added to it where something is. */
  void scale(const float *scales, const SumsPlace &y, bool is_more) {
    const Vector by_low = load(scales), by_high = load(scales + kHalf);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      low[row] = low[row] * by_low + (is_more ? load(y.low + row * y.stride) : Vector{});
      high[row] = high[row] * by_high + (is_more ? load(y.high + row * y.stride) : Vector{});
    }
  }

  void write(const SumsPlace &y) const {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      store(y.low + row * y.stride, low[row]);
      store(y.high + row * y.stride, high[row]);
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
  /* Two inputs, of x pair_of(row). Their products are added one after the other, rounded like a multiply-add. */
  template <class Function>
  [[gnu::always_inline]] void add_dots(const Pairs &weights, Function pair_of) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair_of(row)));
      low[row] = (Vector)_mm512_dpbf16_ps((__m512)low[row], pair, weights.low);
      high[row] = (Vector)_mm512_dpbf16_ps((__m512)high[row], pair, weights.high);
    }
  }
#endif
};

/* fn(std::integral_constant) of a width. */
template <class Function>
void with_width(int64_t width, Function fn) {
  switch (width) {
    case 1: return fn(std::integral_constant<int, 1>());
    case 2: return fn(std::integral_constant<int, 2>());
    case 3: return fn(std::integral_constant<int, 3>());
#if defined(__AVX512F__)
    case 4: return fn(std::integral_constant<int, 4>());
    case 5: return fn(std::integral_constant<int, 5>());
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
  static constexpr bool kInPlace = false;
  static constexpr int64_t kMaxRows = kMaxTileRows, kBlockRows = 256, kPartInputs = 512;
  static int64_t width(int64_t num_rows) { return num_rows; }
  static int64_t x_bytes(int64_t width, int64_t num_inputs) { return 4 * width * num_inputs; }

  static void read(const lmi_tensor &x, int64_t first, int64_t num_rows, char *to) {
    const int64_t num_inputs = x.size[1];
    Floats values(num_inputs);
    for (int64_t row = 0; row < num_rows; ++row) {
      read_row(x, first + row, values);
      float *column = reinterpret_cast<float *>(to) + row;
      for (int64_t e = 0; e < num_inputs; ++e) column[e * num_rows] = values[e];
    }
  }

  static void multiply(int64_t width, const char *panel, const PanelLayout &layout, Inputs inputs, const TileInput &x,
                       const SumsPlace &y, Next next) {
    with_width(width, [&](auto rows) {
      for (int lane = 0; lane < kHalf; lane += kLanes) {
        const SumsPlace lanes = {y.low + lane, y.high + lane, y.stride};
        add_inputs<rows>(panel, layout, inputs, reinterpret_cast<const float *>(x.data), lane, lanes, next);
      }
    });
  }

 private:
  template <int kRows>
  static void add_inputs(const char *panel, const PanelLayout &layout, Inputs inputs, const float *x, int lane, const SumsPlace &y,
                         Next next) {
    Sums<kRows> sums;
    sums.start(y, inputs.first == 0);
    for (int64_t e = inputs.first, end = inputs.first + inputs.num; e < end;) {
      const GroupPart part(panel, layout, e, end);
      add_group(Columns(reinterpret_cast<const float *>(part.start), lane), part.columns + 4 * lane, part.num, x, sums, next);
      x += part.num * kRows;
      e += part.num;
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
/* Rows of x where they lie, two inputs at a time, by a pointer to each third: more would not have a register each. */
template <int kRows>
class RowPairs {
 public:
  explicit RowPairs(const TileInput &x) : stride_(x.stride) {
    for (int i = 0; i < (kRows + 2) / 3; ++i) thirds_[i] = x.data + 3 * i * stride_;
  }

  uint32_t at(int row, int64_t input) const { return number<uint32_t>(row, input); }
  /* An input without a second one. */
  uint32_t last(int row, int64_t input) const { return number<uint16_t>(row, input); }

 private:
  template <class Number>
  Number number(int row, int64_t input) const {
    Number number;
    std::memcpy(&number, thirds_[row / 3] + row % 3 * stride_ + 2 * input, sizeof number);
    return number;
  }

  const char *thirds_[(kRows + 2) / 3];
  const int64_t stride_;
};

/* sums += so many inputs of x times columns, which hold kInputs each and give pairs of them. */
template <class Columns, int kRows>
[[gnu::always_inline]] inline void add_dots(const Columns &columns, int64_t num_inputs, const TileInput &x, Sums<kRows> &sums, Next &next) {
  const RowPairs<kRows> pairs(x);
  int64_t e = 0;
  const auto add_pair = [&](int64_t input) __attribute__((always_inline)) {
    sums.add_dots(columns.pair(input), [&](int row) { return pairs.at(row, input); });
  };
  for (; e + Columns::kInputs <= num_inputs; e += Columns::kInputs) {
    next.ask();
#pragma GCC unroll 2
    for (int64_t i = 0; i < Columns::kInputs; i += 2) add_pair(e + i);
  }
  for (; e + 2 <= num_inputs; e += 2) add_pair(e);
  if (e < num_inputs) sums.add_dots(columns.pair(e), [&](int row) { return pairs.last(row, e); });
}

struct DensePairs {
  static constexpr int kInputs = 2;
  const char *columns;

  Pairs pair(int64_t input) const {
    const char *at = columns + 64 * input;
    return {(__m512bh)_mm512_loadu_si512(at), (__m512bh)_mm512_loadu_si512(at + 64)};
  }
};

/* Dense weights by dot products of two inputs. */
struct DotTiles {
  static constexpr bool kInPlace = true;
  static constexpr int64_t kMaxRows = kMaxTileRows, kBlockRows = 1024, kPartInputs = 4096;
  static int64_t width(int64_t num_rows) { return num_rows; }

  static void multiply(int64_t width, const char *panel, const PanelLayout &, Inputs inputs, const TileInput &x, const SumsPlace &y,
                       Next next) {
    with_width(width, [&](auto rows) {
      Sums<rows> sums;
      sums.start(y, inputs.first == 0);
      add_dots(DensePairs{panel + 64 * inputs.first}, inputs.num, x, sums, next);
      sums.write(y);
    });
  }
};
#endif

}  // namespace
}  // namespace lmi::LMI_LEVEL
