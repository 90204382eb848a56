/* How a weight [F,E] lies in device memory once packed: rows of outputs, each with its inputs side by side, filled up with zeros to
 * whole tiles (64 rows; 64 inputs, so that a row is whole 16-byte pieces in every dtype and a tile of inputs needs no border).
 *   DENSE: inputs in dtype      INT8: a byte each      INT4: two a byte, the first in the low half
 * INT8 and INT4 are followed by a scale and then a zero a row and group, as floats. Row p belongs to output p; with gated, rows
 * come in sixteens, 8 of the gate and the 8 of up that belong to the same outputs, so that both meet in one thread's registers. */
#pragma once
#include "common/arguments.h"
#include "cuda/device.cuh"

namespace lmi::cuda {

constexpr int64_t kTileOutputs = 64, kTileInputs = 64;

struct PackedLayout {
  int64_t num_rows;    /* with those that only fill tiles */
  int64_t row_bytes;
  int64_t num_groups;  /* 0 for dense weights */
  int64_t scale_offset, zero_offset, num_bytes;
};

PackedLayout packed_layout(const LinearShape &shape);
int64_t packed_bytes(const LinearShape &shape);

/* The output whose weights stand in a row; F or more: none. */
__host__ __device__ __forceinline__ int64_t output_of_row(int64_t row, int64_t out_features, bool is_gated) {
  if (!is_gated) return row;
  const int64_t half = out_features / 2, output = row / 16 * 8 + row % 8;
  if (output >= half) return out_features;
  return row % 16 < 8 ? output : output + half;
}

}  // namespace lmi::cuda
