/* Of linear.cc: what comes after the sums of a panel: bias, addend, activation, gate, residual, rounding. */
#pragma once
#include "common/activate.h"
#include "common/rows.h"
#include "cpu/linear_layout.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kMostPanels = 8, kMostOutputs = kMostPanels * kPanel; /* that are finished at a time */

inline void *element(const lmi_tensor &tensor, int64_t row, int64_t column) {
  return static_cast<char *>(at(tensor, row)) + column * bytes_of(tensor.dtype);
}

/* y += the numbers at `from`, at most kMostOutputs */
inline void add_floats(float *y, const void *from, int32_t dtype, int64_t num) {
  if (dtype == LMI_BF16) {
    const uint16_t *halves = static_cast<const uint16_t *>(from);
    for (int64_t i = 0; i < num; ++i) y[i] += float_of_bf16(halves[i]);
    return;
  }
  float values[kMostOutputs];
  read_floats(from, dtype, num, values);
  for (int64_t i = 0; i < num; ++i) y[i] += values[i];
}

/* y += bias[first..] + addend[row, first..] */
inline void add_terms(const lmi_linear_args &args, float *y, int64_t row, int64_t first, int64_t num) {
  if (is_given(args.bias)) add_floats(y, element(args.bias, 0, first), args.bias.dtype, num);
  if (is_given(args.addend)) add_floats(y, element(args.addend, row, first), args.addend.dtype, num);
}

/* Writes out[row, first .. first + num). y: the sums, changed; up: those of a gated weight's other half. */
inline void finish_row(const lmi_linear_args &args, float *y, float *up, int64_t row, int64_t first, int64_t num) {
  add_terms(args, y, row, first, num);
  activate(y, num, args.activation);
  if (args.gated) {
    add_terms(args, up, row, first + args.out_features / 2, num);
    for (int64_t i = 0; i < num; ++i) y[i] *= up[i];
  }
  if (is_given(args.residual)) add_floats(y, element(args.residual, row, first), args.residual.dtype, num);
  write_floats(y, args.out.dtype, num, element(args.out, row, first));
}

}  // namespace
}  // namespace lmi::LMI_LEVEL
