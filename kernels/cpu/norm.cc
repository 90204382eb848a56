/* RMS norm and layer norm, with the residual addition before them. A row belongs to one thread; bound by memory. */
#include <cmath>

#include "common/arguments.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

/* s := x + residual, rounded to their dtype, residual := s; s := x without a residual. */
void read_sum(const lmi_tensor &x, const lmi_tensor &residual, int64_t row, float *s, float *scratch) {
  const int64_t num = x.size[1];
  read_row(x, row, s);
  if (!is_given(residual)) return;
  read_row(residual, row, scratch);
  for (int64_t e = 0; e < num; ++e) s[e] += scratch[e];
  round_floats(s, x.dtype, num);
  write_row(s, residual, row);
}

float mean_of(const float *s, int64_t num) {
  Vector sum = {};
  int64_t e = 0;
  for (; e + kLanes <= num; e += kLanes) sum += load(s + e);
  float total = sum_of_lanes(sum);
  for (; e < num; ++e) total += s[e];
  return total / static_cast<float>(num);
}

/* y += row of other, by way of scratch; an absent one is 0. */
void add_row(const lmi_tensor &other, int64_t row, int64_t num, float *y, float *scratch) {
  if (!is_given(other)) return;
  read_row(other, row, scratch);
  for (int64_t e = 0; e < num; ++e) y[e] += scratch[e];
}

/* weight + offset as floats, or 1. */
void read_weight(const lmi_tensor &weight, float offset, int64_t num, float *to) {
  if (is_given(weight)) read_vector(weight, to);
  for (int64_t e = 0; e < num; ++e) to[e] = is_given(weight) ? to[e] + offset : 1.0f;
}

}  // namespace

void rms_norm(const lmi_rms_norm_args &args) {
  check_arguments(args);
  const int64_t num = args.x.size[1];
  Floats weight(num);
  read_weight(args.weight, args.weight_offset, num, weight);
  parallel_for(args.x.size[0], rows_a_share(num), [&](int64_t begin, int64_t end) {
    Floats s(num), scratch(num);
    for (int64_t row = begin; row < end; ++row) {
      read_sum(args.x, args.residual, row, s, scratch);
      const float mean_square = dot(s, s, num) / static_cast<float>(num);
      const float inverse = 1.0f / std::sqrt(mean_square + args.eps);
      for (int64_t e = 0; e < num; ++e) scratch[e] = weight[e] * (s[e] * inverse);
      add_row(args.addend, row, num, scratch, s);
      write_row(scratch, args.out, row);
    }
  });
}

void layer_norm(const lmi_layer_norm_args &args) {
  check_arguments(args);
  const int64_t num = args.x.size[1];
  Floats weight(num), bias(num);
  read_weight(args.weight, 0.0f, num, weight);
  if (is_given(args.bias)) read_vector(args.bias, bias);
  parallel_for(args.x.size[0], rows_a_share(num), [&](int64_t begin, int64_t end) {
    Floats s(num), scratch(num);
    for (int64_t row = begin; row < end; ++row) {
      read_sum(args.x, args.residual, row, s, scratch);
      const float mean = mean_of(s, num);
      for (int64_t e = 0; e < num; ++e) s[e] -= mean;
      const float variance = dot(s, s, num) / static_cast<float>(num);
      const float inverse = 1.0f / std::sqrt(variance + args.eps);
      for (int64_t e = 0; e < num; ++e) scratch[e] = weight[e] * (s[e] * inverse);
      if (is_given(args.bias)) {
        for (int64_t e = 0; e < num; ++e) scratch[e] += bias[e];
      }
      write_row(scratch, args.out, row);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
