/* Softmax in registers, laid out as products of tensor cores leave their sums: lane (g, t) of a warp has rows g and g + 8 of 16. One
 * order of roundings for every kernel that attends with tensor cores. */
#pragma once
#include "cuda/attention_problem.cuh"
#include "cuda/ptx.cuh"

namespace lmi::cuda {

/* Two numbers in a register, the first in the low half. */
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  const Pack<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

/* Of the lane's two rows: greatest score and sum of weights so far. */
struct Softmax {
  float max[2], sum[2];

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  /* A tile of 64 scores a row, eight products of 8 keys, becomes weights relative to the row's greatest so far; keep: what the
   * values summed before must be multiplied by. */
  __device__ __forceinline__ void weigh(float (&scores)[8][4], float (&keep)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float greatest = max[r], part = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) greatest = fmaxf(greatest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 1));
      greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 2));
      const float base = greatest == -INFINITY ? 0.0f : greatest; /* no key seen yet: all weights are 0 */
      keep[r] = ptx::exp2_fast(max[r] - base);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        scores[n][2 * r] = ptx::exp2_fast(scores[n][2 * r] - base);
        scores[n][2 * r + 1] = ptx::exp2_fast(scores[n][2 * r + 1] - base);
        part += scores[n][2 * r] + scores[n][2 * r + 1];
      }
      part += __shfl_xor_sync(0xffffffffu, part, 1);
      part += __shfl_xor_sync(0xffffffffu, part, 2);
      sum[r] = fmaf(keep[r], sum[r], part);
      max[r] = greatest;
    }
  }
};

/* And the weighted values of some products' columns. */
template <int kProducts>
struct RowState : Softmax {
  float values[kProducts][4];

  __device__ __forceinline__ void clear() {
    Softmax::clear();
#pragma unroll
    for (int n = 0; n < kProducts; ++n) values[n][0] = values[n][1] = values[n][2] = values[n][3] = 0.0f;
  }

  __device__ __forceinline__ void scale(const float (&keep)[2]) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[n][i] *= keep[i / 2];
    }
  }

  /* Takes the state of the following keys in. */
  __device__ __forceinline__ void merge(const RowState &part) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Merge both(max[r], sum[r], part.max[r], part.sum[r]);
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        values[n][2 * r] = both(values[n][2 * r], part.values[n][2 * r]);
        values[n][2 * r + 1] = both(values[n][2 * r + 1], part.values[n][2 * r + 1]);
      }
      sum[r] = both(sum[r], part.sum[r]);
      max[r] = both.max;
    }
  }
};

}  // namespace lmi::cuda
