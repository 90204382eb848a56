/* x times a packed weight, with bias, addend, activation, gate and residual at the end.
 *
 * Rows are taken in blocks, a block in tiles of rows (linear_tiles.h, linear_amx.h), most kinds of which rewrite their x in the order in
 * which they read it; threads share the panels, each the same ones at every call. One row is bound by reading the weights: a panel is one
 * run of memory. Many rows are bound by arithmetic: then the inputs are taken in parts, so that a part of a tile's x stays in a near cache
 * while a group of panels goes by, and the part of this group stays in the second-level cache while the tiles go by. The sums wait
 * as floats in between, which changes no bits: each output takes its inputs with the same instructions in the same order at any number
 * of rows. What follows the sums is done for a row of a whole group at once. */
#include <algorithm>

#include "common/memory.h"
#include "cpu/linear_amx.h"
#include "cpu/linear_finish.h"
#include "cpu/linear_integers.h"
#include "cpu/linear_tiles.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kCacheBytes = 768 * 1024; /* of the 1 or 2 MiB that a core's second-level cache has */
constexpr int64_t kBlockBytes = 6 << 20; /* of x, which goes by once a panel, in a share of the third-level cache */
constexpr int64_t kAheadBytes = 12 * 1024;  /* what a single tile asks for */
constexpr int64_t kFewTiles = 4; /* whose x may come from the second-level cache at each panel */
constexpr int64_t kFewTilesInputs = 1024, kFewTilesPanels = 2; /* then at most, of a part and of a group */

/* Up to Tiles::kBlockRows rows of x times the whole weight. */
template <class Tiles>
class Block {
 public:
  Block(const lmi_linear_args &args, const PanelLayout &layout, int64_t first_row, int64_t num_rows)
      : args_(args),
        layout_(layout),
        first_row_(first_row),
        num_rows_(num_rows),
        num_tiles_((num_rows + Tiles::kMaxRows - 1) / Tiles::kMaxRows),
        tile_rows_((num_rows + num_tiles_ - 1) / num_tiles_) {
    if constexpr (!Tiles::kInPlace) read();
  }

  void run() {
    const int64_t panel_work = num_rows_ * args_.in_features * kPanel / 8;
    parallel_for(layout_.num_panels, rows_a_share(panel_work), [&](int64_t begin, int64_t end) { multiply(begin, end); });
  }

 private:
  /* Rewrites x, tile after tile. */
  void read() {
    tile_bytes_ = Tiles::x_bytes(Tiles::width(tile_rows_), args_.in_features);
    x_ = reinterpret_cast<char *>(kept_floats(Purpose::kInputs, num_tiles_ * tile_bytes_ / 4));
    parallel_for(num_tiles_, rows_a_share(tile_bytes_ / 4), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) Tiles::read(args_.x, row_of(tile), rows_of(tile), x_ + tile * tile_bytes_);
    });
  }

  TileInput x_of(int64_t tile, int64_t first_input) const {
    if constexpr (Tiles::kInPlace) {
      const int64_t number_bytes = bytes_of(args_.x.dtype);
      const char *row = static_cast<const char *>(at(args_.x, row_of(tile)));
      return {row + first_input * number_bytes, args_.x.stride[0] * number_bytes};
    } else {
      return {x_ + tile * tile_bytes_ + Tiles::x_bytes(Tiles::width(rows_of(tile)), first_input), 0};
    }
  }

  /* Panels [begin, end): in groups, a group part by part. */
  void multiply(int64_t begin, int64_t end) const {
    Tiles tiles;
    const int64_t part = part_inputs(), group = panels_a_group(part);
    float *y = kept_floats(Purpose::kSums, group * num_waiting(part) * kTileFloats);
    for (int64_t first = begin; first < end; first += group) {
      const int64_t last = std::min(end, first + group);
      for (int64_t e = 0; e < args_.in_features; e += part) {
        multiply_part(tiles, first, last, {e, std::min(part, args_.in_features - e)}, y);
      }
    }
  }

  /* One part of the inputs of panels [first, last), in all tiles; the last part finishes them. */
  void multiply_part(Tiles &tiles, int64_t first, int64_t last, Inputs inputs, float *y) const {
    const bool is_last = inputs.first + inputs.num == args_.in_features;
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      const int64_t width = Tiles::width(rows_of(tile));
      const TileInput x = x_of(tile, inputs.first);
      float *sums = y + (inputs.num < args_.in_features ? tile : 0) * (last - first) * kTileFloats;
      for (int64_t panel = first; panel < last; ++panel) {
        const Next next = next_of(tile, panel, is_last ? panel + last - first : panel, inputs);
        tiles.multiply(width, weights_of(panel), layout_, inputs, x, place_of(sums, panel - first, last - first), next);
      }
      if (is_last) finish(tile, first, last, sums);
    }
  }

  /* Of a tile's sums with so many panels, [row][panel][32], the one panel's. Gates come before what they meet. */
  SumsPlace place_of(float *sums, int64_t panel, int64_t num_panels) const {
    float *low = sums + panel * outputs_a_panel();
    return {low, low + (args_.gated ? num_panels : 1) * kHalf, num_panels * kPanel};
  }

  void finish(int64_t tile, int64_t first_panel, int64_t last_panel, float *sums) const {
    const int64_t first = first_panel * outputs_a_panel(), num = std::min(last_panel * outputs_a_panel(), args_.out.size[1]) - first;
    const int64_t num_panels = last_panel - first_panel;
    for (int64_t row = 0; row < rows_of(tile); ++row, sums += num_panels * kPanel) {
      finish_row(args_, sums, sums + num_panels * kHalf, row_of(tile) + row, first, num);
    }
  }

  int64_t outputs_a_panel() const { return args_.gated ? kHalf : kPanel; }

  /* What a tile asks for while it multiplies: of what is next in the panel's place, be it its next part or the first part of another
   * panel, a slice each. A single tile reads on and on: it asks for what stands a little further, across the 4 KiB where hardware
   * stops to look ahead. */
  Next next_of(int64_t tile, int64_t panel, int64_t next_panel, Inputs inputs) const {
    if (num_tiles_ == 1) return {weights_of(panel) + kAheadBytes, layout_.column_bytes};
    const char *next = weights_of(next_panel) + (next_panel == panel ? bytes_before(inputs.first + inputs.num) : 0);
    return {next + bytes_before(inputs.num) / num_tiles_ * tile, layout_.column_bytes / num_tiles_};
  }

  /* Of a panel, about, before an input. */
  int64_t bytes_before(int64_t input) const { return layout_.panel_bytes * input / args_.in_features; }

  int64_t part_inputs() const {
    if (num_tiles_ == 1) return args_.in_features;
    const int64_t most = Tiles::kPartInputs, part = num_tiles_ <= kFewTiles ? std::min(kFewTilesInputs, most) : most;
    return layout_.num_groups == 1 ? part : std::max<int64_t>(1, part / layout_.group_inputs) * layout_.group_inputs;
  }

  /* Tiles whose sums are there at a time: of parts all wait for the next one. */
  int64_t num_waiting(int64_t part) const { return part < args_.in_features ? num_tiles_ : 1; }

  int64_t panels_a_group(int64_t part) const {
    if (num_tiles_ == 1) return kMostPanels;
    if (num_tiles_ <= kFewTiles) return kFewTilesPanels;
    const int64_t sums_bytes = num_waiting(part) * kTileFloats * 4, part_bytes = bytes_before(std::min(part, args_.in_features));
    return std::clamp<int64_t>(kCacheBytes / (2 * part_bytes + sums_bytes), 1, kMostPanels);
  }

  int64_t row_of(int64_t tile) const { return first_row_ + tile * tile_rows_; }
  int64_t rows_of(int64_t tile) const { return std::min(tile_rows_, num_rows_ - tile * tile_rows_); }
  const char *weights_of(int64_t panel) const { return static_cast<const char *>(args_.packed.data) + panel * layout_.panel_bytes; }

  static constexpr int64_t kTileFloats = Tiles::kMaxRows * kPanel;
  const lmi_linear_args &args_;
  const PanelLayout &layout_;
  const int64_t first_row_, num_rows_, num_tiles_, tile_rows_;
  int64_t tile_bytes_ = 0;
  char *x_ = nullptr; /* rewritten, tile after tile */
};

template <class Tiles>
void multiply_with(const lmi_linear_args &args, const PanelLayout &layout) {
  const int64_t num_rows = args.x.size[0], most = std::min(Tiles::kBlockRows, kBlockBytes / (2 * args.in_features) + 1);
  const int64_t num_blocks = std::max<int64_t>(1, (num_rows + most - 1) / most), rows = (num_rows + num_blocks - 1) / num_blocks;
  for (int64_t first = 0; first < num_rows; first += rows) {
    Block<Tiles>(args, layout, first, std::min(rows, num_rows - first)).run();
  }
}

void multiply(const lmi_linear_args &args) {
  const PanelLayout layout = panel_layout({args.out_features, args.in_features, args.group, args.dtype, args.format, args.gated});
#if defined(__AVX512BF16__)
  const bool is_whole = layout.num_groups == 1 || layout.group_inputs % 2 == 0; /* else pairs of inputs cross groups */
  if (args.format == LMI_INT8 && args.dtype == LMI_BF16 && is_whole) return multiply_with<IntegerTiles<8>>(args, layout);
  if (args.format == LMI_INT4 && args.dtype == LMI_BF16 && is_whole) return multiply_with<IntegerTiles<4>>(args, layout);
#endif
  if (args.format == LMI_INT8) return multiply_with<FloatTiles<IntegerColumns<8>>>(args, layout);
  if (args.format == LMI_INT4) return multiply_with<FloatTiles<IntegerColumns<4>>>(args, layout);
  if (args.dtype == LMI_F32) return multiply_with<FloatTiles<F32Columns>>(args, layout);
  if (args.dtype == LMI_F16) return multiply_with<FloatTiles<F16Columns>>(args, layout);
  return multiply_with<BF16Tiles>(args, layout);
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
  check_arguments(args, packed_bytes(shape_of(args)));
  multiply(args);
}

void grouped_linear(const lmi_grouped_linear_args &args) {
  check_arguments(args, packed_bytes(shape_of(args.linear)));
  check_starts("starts", args.starts, args.linear.x.size[0]);
  for (int64_t expert = 0; expert < args.starts.size[0] - 1; ++expert) {
    if (integers(args.starts)[expert] < integers(args.starts)[expert + 1]) multiply(expert_args(args, expert));
  }
}

}  // namespace lmi::LMI_LEVEL
