/* What the linears share: their arguments as a kernel sees them, which rows and which expert a block works on, and what comes after
 * the sums. */
#pragma once
#include "cuda/activate.cuh"
#include "cuda/linear_layout.h"
#include "cuda/memory.cuh"

namespace lmi::cuda {

/* A matrix of T or of float; data is null if the tensor is absent. */
template <class T>
struct Terms {
  void *data;
  int64_t stride;
  bool is_float;

  Terms(const lmi_tensor &x) : data(is_given(x) ? x.data : nullptr), stride(x.stride[0]), is_float(x.dtype == LMI_F32) {}
  __device__ __forceinline__ float get(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    return is_float ? static_cast<const float *>(data)[i] : to_float(static_cast<const T *>(data)[i]);
  }
  __device__ __forceinline__ void set(int64_t row, int64_t column, float value) const {
    const int64_t i = row * stride + column;
    if (is_float) static_cast<float *>(data)[i] = value;
    else static_cast<T *>(data)[i] = from_float<T>(value);
  }
};

template <class T>
struct Linear {
  Terms<T> out, addend, residual;
  Rows<const T> x;
  const T *bias;
  const char *packed;
  const int *starts; /* of each expert's rows, or null: one weight */
  PackedLayout layout;
  int64_t num_tokens, expert_bytes;
  int num_experts, in_features, out_features, group, activation;
  bool is_gated;
};

/* Rows [first, last) of x, and the expert whose they are. */
struct RowTile {
  int expert;
  int64_t first, last;
};

/* The index-th tile of `height` rows: an expert's tiles begin with its first row. Empty (first == last) beyond the last one. */
template <class T>
__device__ RowTile row_tile(const Linear<T> &linear, int64_t index, int height) {
  if (!linear.starts) {
    const int64_t first = index * height;
    return {0, first, min(first + height, linear.num_tokens)};
  }
  for (int expert = 0; expert < linear.num_experts; ++expert) {
    const int64_t begin = linear.starts[expert], end = linear.starts[expert + 1], tiles = (end - begin + height - 1) / height;
    if (index < tiles) return {expert, begin + index * height, min(begin + (index + 1) * height, end)};
    index -= tiles;
  }
  return {0, 0, 0};
}

/* As many as there can be, whatever the experts' shares are. */
template <class T>
unsigned max_row_tiles(const Linear<T> &linear, int height) {
  return ceil_div(linear.num_tokens, height) + (linear.starts ? static_cast<unsigned>(linear.num_experts) : 0);
}

/* y: sum of output f of a token; up: that of output f + F/2 if gated, else unused. */
template <class T>
__device__ void finish(const Linear<T> &linear, int expert, int64_t token, int64_t f, float y, float up) {
  const int64_t half = linear.out_features / 2;
  const T *const bias = linear.bias ? linear.bias + int64_t{expert} * linear.out_features : nullptr;
  if (bias) y += to_float(bias[f]);
  if (linear.addend.data) y += linear.addend.get(token, f);
  y = activate(y, linear.activation);
  if (linear.is_gated) {
    if (bias) up += to_float(bias[f + half]);
    if (linear.addend.data) up += linear.addend.get(token, f + half);
    y *= up;
  }
  if (linear.residual.data) y += linear.residual.get(token, f);
  linear.out.set(token, f, y);
}

}  // namespace lmi::cuda
