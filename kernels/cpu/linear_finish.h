/* Of linear.cc: what comes after the sums of a panel: bias, addend, activation, gate, residual, rounding. */
#pragma once
#include <type_traits>

#include "common/activate.h"
#include "common/rows.h"
#include "cpu/linear_layout.h"

namespace lmi::LMI_LEVEL {
namespace {

inline void *element(const lmi_tensor &tensor, int64_t row, int64_t column) {
  return static_cast<char *>(at(tensor, row)) + column * bytes_of(tensor.dtype);
}

template <class Count>
void add_floats(float *y, const void *from, int32_t dtype, Count num) {
  float values[kPanel];
  read_floats(from, dtype, num, values);
  for (int64_t i = 0; i < num; ++i) y[i] += values[i];
}

/* y += bias[first..] + addend[row, first..] */
template <class Count>
void add_terms(const lmi_linear_args &args, float *y, int64_t row, int64_t first, Count num) {
  if (is_given(args.bias)) add_floats(y, element(args.bias, 0, first), args.bias.dtype, num);
  if (is_given(args.addend)) add_floats(y, element(args.addend, row, first), args.addend.dtype, num);
}

/* Writes out[row, first .. first + num). y: the panel's 32 sums, changed; a gated panel's upper half is `up`. */
template <class Count>
void finish_row(const lmi_linear_args &args, float *y, int64_t row, int64_t first, Count num) {
  add_terms(args, y, row, first, num);
  activate(y, num, args.activation);
  if (args.gated) {
    float *up = y + kHalf;
    add_terms(args, up, row, first + args.out_features / 2, num);
    for (int64_t i = 0; i < num; ++i) y[i] *= up[i];
  }
  if (is_given(args.residual)) add_floats(y, element(args.residual, row, first), args.residual.dtype, num);
  write_floats(y, args.out.dtype, num, element(args.out, row, first));
}

/* Rows first_row .. first_row+num_rows-1 of a panel; y: [num_rows][32]. A whole panel is compiled apart, without remainders. */
inline void finish_panel(const lmi_linear_args &args, float *y, int64_t first_row, int64_t num_rows, int64_t panel) {
  const int64_t width = args.gated ? kHalf : kPanel, first = panel * width, num = std::min(width, args.out.size[1] - first);
  for (int64_t row = 0; row < num_rows; ++row, y += kPanel) {
    if (num == kPanel) finish_row(args, y, first_row + row, first, std::integral_constant<int64_t, kPanel>());
    else if (num == kHalf) finish_row(args, y, first_row + row, first, std::integral_constant<int64_t, kHalf>());
    else finish_row(args, y, first_row + row, first, num);
  }
}

}  // namespace
}  // namespace lmi::LMI_LEVEL
