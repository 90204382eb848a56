/* How a weight [F,E] lies in memory once packed; the same at every instruction level.
 *
 * Panels of 32 outputs, each a run of columns, inputs ascending. A column is words of 32 bits and holds one, two or four inputs:
 *   F32:        32 words, word j: output j of one input
 *   BF16, F16:  32 words, word j: output j of two inputs, the first one in the low half. Sixteen columns are two tiles of AMX, side
 *               by side; so their number is a multiple of 16, the last ones zero
 *   INT8:       16 words, word j: outputs j and j + 16 of two inputs (bytes: input, half of the panel)
 *   INT4:       16 words, word j: outputs j and j + 16 of four inputs (nibbles: input, half of the panel)
 * INT8 and INT4 begin a new column at each group of inputs; the group's columns follow 32 scales and 32 zeros as floats.
 * The panel's outputs are f = 32 p + 16 half + j; with gated, f = half * F/2 + 16 p + j, so that gate and up meet in one lane.
 * Outputs beyond F are zero. */
#pragma once
#include "common/arguments.h"

namespace lmi {

constexpr int64_t kPanel = 32, kHalf = 16;
constexpr int64_t kTileInputs = 32; /* of a 16-bit weight, that a tile of AMX takes */

struct PanelLayout {
  int64_t num_panels, num_groups;
  int64_t group_inputs;               /* inputs that share a scale; all of them for dense weights */
  int64_t column_inputs, column_bytes;
  int64_t scale_bytes;                /* before a group's columns: 0 for dense weights */
  int64_t group_bytes;                /* scales and columns of one group */
  int64_t panel_bytes;
};

PanelLayout panel_layout(const LinearShape &shape);
int64_t packed_bytes(const LinearShape &shape);

}  // namespace lmi
