/* fp32 and integer weights without tensor cores: a thread owns an output (and, gated, its up) of four rows and takes the inputs in
 * ascending order into one accumulator each. Right before fast: the weight-only kernels for decoding come with quantization. */
#pragma once
#include "cuda/linear_problem.cuh"

namespace lmi::cuda {

constexpr unsigned kPlainThreads = 64;
constexpr int kPlainRows = 4;

/* Weights of one packed row, by format (0: dense floats). */
template <int kFormat>
struct WeightRow {
  const char *inputs;
  const float *scales, *zeros;
  int group;

  template <class T>
  __device__ WeightRow(const Linear<T> &linear, const char *packed, int64_t row)
      : inputs(packed + row * linear.layout.row_bytes),
        scales(reinterpret_cast<const float *>(packed + linear.layout.scale_offset) + row * linear.layout.num_groups),
        zeros(reinterpret_cast<const float *>(packed + linear.layout.zero_offset) + row * linear.layout.num_groups),
        group(linear.group) {}

  __device__ float operator[](int e) const {
    if constexpr (kFormat == LMI_DENSE) {
      return reinterpret_cast<const float *>(inputs)[e];
    } else {
      const int byte = reinterpret_cast<const uint8_t *>(inputs)[kFormat == LMI_INT8 ? e : e / 2];
      const int number = kFormat == LMI_INT8 ? byte : byte >> (e % 2 * 4) & 15;
      return (static_cast<float>(number) - zeros[e / group]) * scales[e / group];
    }
  }
};

template <class T, int kFormat>
__device__ void multiply_row(const Linear<T> &linear, const RowTile &rows, const char *packed, int64_t row, float (&sums)[kPlainRows]) {
  const WeightRow<kFormat> weights(linear, packed, row);
  for (int e = 0; e < linear.in_features; ++e) {
    const float weight = weights[e];
#pragma unroll
    for (int i = 0; i < kPlainRows; ++i) {
      const int64_t token = min(rows.first + i, rows.last - 1); /* rows that only fill the tile repeat its last */
      sums[i] = fmaf(to_float(linear.x.row(token)[e]), weight, sums[i]);
    }
  }
}

template <class T, int kFormat>
__global__ void plain_kernel(Linear<T> linear) {
  const RowTile rows = row_tile(linear, blockIdx.y, kPlainRows);
  const int64_t f = int64_t{blockIdx.x} * kPlainThreads + threadIdx.x;
  const int64_t outputs = linear.is_gated ? linear.out_features / 2 : linear.out_features;
  if (rows.first >= rows.last || f >= outputs) return;
  const char *const packed = linear.packed + rows.expert * linear.expert_bytes;
  const int64_t row = linear.is_gated ? f / 8 * 16 + f % 8 : f;
  float sums[kPlainRows] = {}, ups[kPlainRows] = {};
  multiply_row<T, kFormat>(linear, rows, packed, row, sums);
  if (linear.is_gated) multiply_row<T, kFormat>(linear, rows, packed, row + 8, ups);
#pragma unroll
  for (int i = 0; i < kPlainRows; ++i) {
    if (rows.first + i < rows.last) finish(linear, rows.expert, rows.first + i, f, sums[i], ups[i]);
  }
}

}  // namespace lmi::cuda
