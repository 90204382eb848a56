/* How a weight [F,E] lies in memory once packed; the same at every instruction level.
 *
 * Panels of 32 outputs, each: for every input, ascending, 16 words of 32 bits ("a column"). Word j of a column belongs to outputs
 * j and j + 16 of the panel, low half and high half, so that one load gives 16 lanes of each after a shift or a mask:
 *   F32:       two columns an input, one for each half of the panel          BF16, F16:  one column an input
 *   INT8:      one column for two inputs (bytes: input, half)                INT4:       one column for four (nibbles: input, half)
 * INT8 and INT4 begin a new column at each group of inputs; the group's columns follow 32 scales and 32 zeros as floats.
 * The panel's outputs are f = 32 p + 16 half + j; with gated, f = half * F/2 + 16 p + j, so that gate and up meet in one lane.
 * Outputs beyond F are zero. */
#pragma once
#include <cstdint>

namespace lmi {

constexpr int64_t kPanel = 32, kHalf = 16, kColumnBytes = 64;

struct LinearShape {
  int64_t out_features, in_features, group;
  int32_t dtype, format, gated;
};

struct PanelLayout {
  int64_t num_panels, num_groups;
  int64_t group_inputs;  /* inputs that share a scale; all of them for dense weights */
  int64_t scale_bytes;   /* before a group's columns: 0 for dense weights */
  int64_t group_bytes;   /* scales and columns of one group */
  int64_t panel_bytes;
};

/* Empty if it can be packed, else what stands against it. */
const char *why_unsupported(const LinearShape &shape);
PanelLayout panel_layout(const LinearShape &shape);
int64_t packed_bytes(const LinearShape &shape);

}  // namespace lmi
