#include "cpu/linear_layout.h"

namespace lmi {
namespace {

bool is_half(const LinearShape &shape) { return shape.format == LMI_DENSE && shape.dtype != LMI_F32; }

int64_t column_inputs(const LinearShape &shape) {
  if (shape.format == LMI_INT4) return 4;
  return shape.format == LMI_INT8 || is_half(shape) ? 2 : 1;
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

PanelLayout panel_layout(const LinearShape &shape) {
  PanelLayout layout;
  const int64_t outputs = shape.gated ? shape.out_features / 2 : shape.out_features;
  const int64_t outputs_a_panel = shape.gated ? kHalf : kPanel;
  layout.num_panels = round_up(outputs, outputs_a_panel) / outputs_a_panel;
  layout.group_inputs = shape.format == LMI_DENSE ? shape.in_features : shape.group;
  layout.num_groups = shape.in_features / layout.group_inputs;
  layout.column_inputs = column_inputs(shape);
  layout.column_bytes = shape.format == LMI_DENSE ? 128 : 64;
  layout.scale_bytes = shape.format == LMI_DENSE ? 0 : 2 * kPanel * static_cast<int64_t>(sizeof(float));
  const int64_t inputs = round_up(layout.group_inputs, is_half(shape) ? kTileInputs : layout.column_inputs);
  layout.group_bytes = layout.scale_bytes + inputs / layout.column_inputs * layout.column_bytes;
  layout.panel_bytes = layout.num_groups * layout.group_bytes;
  return layout;
}

int64_t packed_bytes(const LinearShape &shape) {
  if (*why_unsupported(shape)) return 0;
  const PanelLayout layout = panel_layout(shape);
  return layout.num_panels * layout.panel_bytes;
}

}  // namespace lmi
