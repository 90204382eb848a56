/* x times a packed weight, with bias, addend, activation, gate and residual at the end.
 *
 * Rows are taken in blocks (their x, as floats, is scratch), a block in tiles of up to kTileRows rows that stay in registers
 * over all inputs, and threads share the panels. Each output is one accumulator that takes its inputs in ascending order with
 * the same multiply-add at every number of rows. One row is bound by reading the weights, many by arithmetic: then a group of panels
 * stays in the second-level cache while the tiles go by. */
#include <algorithm>

#include "common/activate.h"
#include "common/rows.h"
#include "cpu/linear_layout.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kBlockRows = 256, kCacheBytes = 512 * 1024;
#if defined(__AVX512F__)
constexpr int kTileRows = 12; /* 24 accumulators of 32 registers */
#else
constexpr int kTileRows = 4; /* 8 of 16 */
#endif

/* ---- weight formats: how a column becomes `kInputs` inputs of two vectors, low and high half of the panel ---- */

struct Pair {
  Vector low, high;
};

inline Vector as_floats(Words words) {
  Vector value;
  __builtin_memcpy(&value, &words, sizeof value);
  return value;
}

struct F32Columns {
  static constexpr int kInputs = 1, kWords = 32;
  explicit F32Columns(const float *, int) {}
  Pair input(const uint32_t *column, int) const { return {as_floats(load(column)), as_floats(load(column + kHalf))}; }
};

struct BF16Columns {
  static constexpr int kInputs = 1, kWords = 16;
  explicit BF16Columns(const float *, int) {}
  Pair input(const uint32_t *column, int) const {
    const Words words = load(column);
    return {as_floats(words << 16), as_floats(words & 0xffff0000u)};
  }
};

struct F16Columns {
  static constexpr int kInputs = 1, kWords = 16;
  explicit F16Columns(const float *, int) {}
  Pair input(const uint32_t *column, int) const {
    const Words words = load(column);
    return {widen(words & 0xffffu), widen(words >> 16)};
  }

 private:
  /* float_of_f16, lane by lane */
  static Vector widen(Words halves) {
    const Words shifted = (halves & 0x7fffu) << 13, sign = (halves & 0x8000u) << 16;
    const Vector finite = as_floats(shifted) * 0x1p112f;
    const Words bits = (Words)finite | ((Words)(shifted >= 0x0f800000u) & 0x7f800000u);
    return as_floats(bits | sign);
  }
};

/* Small integers of kBits with a scale and a zero an output and group: (w - zero) * scale. */
template <int kBits>
struct IntegerColumns {
  static constexpr int kInputs = 16 / kBits, kWords = 16;
  explicit IntegerColumns(const float *scales, int lane)
      : scale_{load(scales + lane), load(scales + lane + kHalf)},
        zero_{load(scales + kPanel + lane), load(scales + kPanel + lane + kHalf)} {}
  Pair input(const uint32_t *column, int i) const {
    const Words words = load(column) >> (2 * kBits * i);
    return {(number(words) - zero_.low) * scale_.low, (number(words >> kBits) - zero_.high) * scale_.high};
  }

 private:
  static Vector number(Words words) { return __builtin_convertvector((Integers)(words & ((1u << kBits) - 1)), Vector); }
  Pair scale_, zero_;
};

/* ---- one tile of rows times one panel ---- */

template <int kRows>
struct Sums {
  Vector low[kRows] = {}, high[kRows] = {};

  void add(const float *x, const Pair &weights) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      low[row] += x[row] * weights.low;
      high[row] += x[row] * weights.high;
    }
  }
};

/* One group of inputs; x: [inputs][kRows]. */
template <class Columns, int kRows>
inline void add_group(const Columns &columns, const uint32_t *at, int64_t num_inputs, const float *x, Sums<kRows> &sums) {
  int64_t e = 0;
  for (; e + Columns::kInputs <= num_inputs; e += Columns::kInputs, at += Columns::kWords) {
#pragma GCC unroll 4
    for (int i = 0; i < Columns::kInputs; ++i) sums.add(x + (e + i) * kRows, columns.input(at, i));
  }
  for (int i = 0; e + i < num_inputs; ++i) sums.add(x + (e + i) * kRows, columns.input(at, i));
}

/* y[row][0..31] = sum_e x[e][row] * w[e][0..31] */
template <class Columns, int kRows>
void multiply_tile(const char *panel, const PanelLayout &layout, const float *x, float *y) {
  for (int lane = 0; lane < kHalf; lane += kLanes) {
    Sums<kRows> sums;
    for (int64_t group = 0; group < layout.num_groups; ++group) {
      const char *scales = panel + group * layout.group_bytes;
      const Columns columns(reinterpret_cast<const float *>(scales), lane);
      const uint32_t *at = reinterpret_cast<const uint32_t *>(scales + layout.scale_bytes) + lane;
      add_group<Columns, kRows>(columns, at, layout.group_inputs, x + group * layout.group_inputs * kRows, sums);
    }
    for (int row = 0; row < kRows; ++row) {
      store(y + row * kPanel + lane, sums.low[row]);
      store(y + row * kPanel + kHalf + lane, sums.high[row]);
    }
  }
}

typedef void (*TileFunction)(const char *panel, const PanelLayout &layout, const float *x, float *y);

/* How many rows of accumulators a tile with so many rows uses. */
int tile_width(int64_t num_rows) {
  for (const int width : {1, 2, 4, 8}) {
    if (num_rows <= width && width <= kTileRows) return width;
  }
  return kTileRows;
}

template <class Columns>
TileFunction tile_function(int width) {
  switch (width) {
    case 1: return multiply_tile<Columns, 1>;
    case 2: return multiply_tile<Columns, 2>;
    case 4: return multiply_tile<Columns, 4>;
#if defined(__AVX512F__)
    case 8: return multiply_tile<Columns, 8>;
#endif
    default: return multiply_tile<Columns, kTileRows>;
  }
}

TileFunction tile_function(const lmi_linear_args &args, int width) {
  if (args.format == LMI_INT8) return tile_function<IntegerColumns<8>>(width);
  if (args.format == LMI_INT4) return tile_function<IntegerColumns<4>>(width);
  if (args.dtype == LMI_F32) return tile_function<F32Columns>(width);
  if (args.dtype == LMI_BF16) return tile_function<BF16Columns>(width);
  return tile_function<F16Columns>(width);
}

/* ---- what comes after the sums ---- */

void add_floats(float *y, const void *from, int32_t dtype, int64_t num) {
  float values[kPanel];
  read_floats(from, dtype, num, values);
  for (int64_t i = 0; i < num; ++i) y[i] += values[i];
}

/* y += bias[first..] + addend[row, first..] */
void add_terms(const lmi_linear_args &args, float *y, int64_t row, int64_t first, int64_t num) {
  if (is_given(args.bias)) add_floats(y, static_cast<char *>(args.bias.data) + first * bytes_of(args.bias.dtype), args.bias.dtype, num);
  if (is_given(args.addend)) {
    add_floats(y, static_cast<char *>(at(args.addend, row)) + first * bytes_of(args.addend.dtype), args.addend.dtype, num);
  }
}

/* Writes out[row, first .. first + num). y: the panel's 32 sums, changed; a gated panel's upper half is `up`. */
void finish_row(const lmi_linear_args &args, float *y, int64_t row, int64_t first, int64_t num) {
  add_terms(args, y, row, first, num);
  activate(y, num, args.activation);
  if (args.gated) {
    float *up = y + kHalf;
    add_terms(args, up, row, first + args.out_features / 2, num);
    for (int64_t i = 0; i < num; ++i) y[i] *= up[i];
  }
  if (is_given(args.residual)) {
    add_floats(y, static_cast<char *>(at(args.residual, row)) + first * bytes_of(args.residual.dtype), args.residual.dtype, num);
  }
  write_floats(y, args.out.dtype, num, static_cast<char *>(at(args.out, row)) + first * bytes_of(args.out.dtype));
}

/* ---- a block of rows ---- */

struct Block {
  const lmi_linear_args &args;
  PanelLayout layout;
  int64_t first_row, num_rows;
  float *x; /* tile after tile, each [inputs][width] */

  int64_t num_tiles() const { return (num_rows + kTileRows - 1) / kTileRows; }
  int64_t rows_of(int64_t tile) const { return std::min<int64_t>(kTileRows, num_rows - tile * kTileRows); }
  float *x_of(int64_t tile) const { return x + tile * kTileRows * args.in_features; }
};

/* x of one tile as floats, input by input; rows that only fill the tile are zero. */
void read_tile(const Block &block, int64_t tile, float *row_scratch) {
  const int64_t num_inputs = block.args.in_features, num_rows = block.rows_of(tile);
  const int width = tile_width(num_rows);
  float *to = block.x_of(tile);
  for (int row = 0; row < width; ++row) {
    if (row < num_rows) read_row(block.args.x, block.first_row + tile * kTileRows + row, row_scratch);
    else std::fill_n(row_scratch, num_inputs, 0.0f);
    for (int64_t e = 0; e < num_inputs; ++e) to[e * width + row] = row_scratch[e];
  }
}

void multiply_panel(const Block &block, int64_t tile, int64_t panel) {
  const lmi_linear_args &args = block.args;
  const int64_t num_rows = block.rows_of(tile), width = args.gated ? kHalf : kPanel, first = panel * width;
  const int64_t num = std::min(width, args.out.size[1] - first);
  alignas(64) float y[kTileRows * kPanel];
  const char *weights = static_cast<const char *>(args.packed.data) + panel * block.layout.panel_bytes;
  tile_function(args, tile_width(num_rows))(weights, block.layout, block.x_of(tile), y);
  for (int64_t row = 0; row < num_rows; ++row) {
    finish_row(args, y + row * kPanel, block.first_row + tile * kTileRows + row, first, num);
  }
}

void multiply_block(const Block &block) {
  const int64_t tile_work = kTileRows * block.args.in_features, panels_in_cache = std::max<int64_t>(1, kCacheBytes / block.layout.panel_bytes);
  parallel_for(block.num_tiles(), rows_a_share(tile_work), [&](int64_t begin, int64_t end) {
    Floats row_scratch(block.args.in_features);
    for (int64_t tile = begin; tile < end; ++tile) read_tile(block, tile, row_scratch);
  });
  const int64_t panel_work = block.num_rows * block.args.in_features * kPanel / 8;
  parallel_for(block.layout.num_panels, rows_a_share(panel_work), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group += panels_in_cache) {
      for (int64_t tile = 0; tile < block.num_tiles(); ++tile) {
        for (int64_t panel = group; panel < std::min(end, group + panels_in_cache); ++panel) multiply_panel(block, tile, panel);
      }
    }
  });
}

void multiply(const lmi_linear_args &args) {
  const PanelLayout layout = panel_layout({args.out_features, args.in_features, args.group, args.dtype, args.format, args.gated});
  const int64_t num_rows = args.x.size[0], block_rows = std::min(num_rows, kBlockRows);
  Floats x((block_rows + kTileRows) * args.in_features);
  for (int64_t first = 0; first < num_rows; first += kBlockRows) {
    multiply_block({args, layout, first, std::min(kBlockRows, num_rows - first), x});
  }
}

/* ---- checks ---- */

void check_like_x(const char *name, const lmi_tensor &tensor, const lmi_tensor &x, const Size &tokens, const Size &outputs) {
  check_shape(name, tensor, {tokens, outputs});
  if (tensor.dtype != LMI_F32) check_dtype(name, tensor, x.dtype);
}

void check_linear(const lmi_linear_args &args, int64_t expected_bytes) {
  const LinearShape shape{args.out_features, args.in_features, args.group, args.dtype, args.format, args.gated};
  require(!*why_unsupported(shape), why_unsupported(shape));
  check_range("activation", args.activation, LMI_IDENTITY, LMI_QUICK_GELU);
  check_dims("x", args.x, 2);
  const Size tokens{"T", args.x.size[0]}, all{"F", args.out_features}, half{"F/2", args.out_features / 2};
  check("x", args.x, args.dtype, {tokens, {"E", args.in_features}});
  check_like_x("out", args.out, args.x, tokens, args.gated ? half : all);
  if (is_given(args.addend)) check_like_x("addend", args.addend, args.x, tokens, all);
  if (is_given(args.residual)) check_like_x("residual", args.residual, args.x, tokens, args.gated ? half : all);
  check("packed", args.packed, LMI_U8, {{"packed_bytes", expected_bytes}});
}

int64_t packed_bytes_of(const lmi_linear_args &args) {
  return packed_bytes({args.out_features, args.in_features, args.group, args.dtype, args.format, args.gated});
}

/* Rows begin .. end - 1 of a matrix that may be absent. */
lmi_tensor rows_between(lmi_tensor tensor, int64_t begin, int64_t end) {
  if (!is_given(tensor)) return tensor;
  tensor.data = at(tensor, begin);
  tensor.size[0] = end - begin;
  return tensor;
}

lmi_linear_args expert_args(const lmi_grouped_linear_args &args, int64_t expert) {
  const int32_t *starts = integers(args.starts);
  lmi_linear_args one = args.linear;
  for (lmi_tensor *tensor : {&one.x, &one.out, &one.addend, &one.residual}) {
    *tensor = rows_between(*tensor, starts[expert], starts[expert + 1]);
  }
  if (is_given(one.bias)) {
    one.bias = rows_between(one.bias, expert, expert + 1);
    one.bias.dims = 1;
    one.bias.size[0] = args.linear.bias.size[1];
  }
  one.packed.data = static_cast<char *>(one.packed.data) + expert * args.expert_bytes;
  return one;
}

}  // namespace

void linear(const lmi_linear_args &args) {
  check_linear(args, packed_bytes_of(args));
  check_optional("bias", args.bias, args.dtype, {{"F", args.out_features}});
  multiply(args);
}

void grouped_linear(const lmi_grouped_linear_args &args) {
  check_dims("starts", args.starts, 1);
  check_dtype("starts", args.starts, LMI_I32);
  const int64_t num_experts = args.starts.size[0] - 1;
  require(args.expert_bytes >= packed_bytes_of(args.linear), "expert_bytes must be at least the packed bytes of one weight");
  check_linear(args.linear, num_experts * args.expert_bytes);
  check_optional("bias", args.linear.bias, args.linear.dtype, {{"X", num_experts}, {"F", args.linear.out_features}});
  check_starts("starts", args.starts, args.linear.x.size[0]);
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (integers(args.starts)[expert] < integers(args.starts)[expert + 1]) multiply(expert_args(args, expert));
  }
}

}  // namespace lmi::LMI_LEVEL
