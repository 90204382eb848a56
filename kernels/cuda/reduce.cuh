/* What all threads of a block make of their values, in an order that depends on the number of threads alone. Every thread of the
 * block must call, and gets the result. */
#pragma once
#include "cuda/device.cuh"

namespace lmi {

constexpr int kMaxWarps = 32;

/* join(a, b) over a warp's lanes, a tree; associative enough for the caller. */
template <class T, class Join>
__device__ __forceinline__ T join_warp(T value, Join join) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

template <class T, class Join>
__device__ __forceinline__ T join_block(T value, Join join) {
  struct Parts {
    T of_warp[kMaxWarps];
  };
  LMI_SHARED(Parts, parts);
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  value = join_warp(value, join);
  if (threadIdx.x % 32 == 0) parts.of_warp[warp] = value;
  __syncthreads();
  T result = parts.of_warp[0];
  for (int i = 1; i < num_warps; ++i) result = join(result, parts.of_warp[i]);
  __syncthreads(); /* parts may be used again */
  return result;
}

template <class T>
__device__ __forceinline__ T sum_in_block(T value) {
  return join_block(value, [](T a, T b) { return a + b; });
}

/* What the threads before this one have, and all. A barrier must come before the next call. */
template <class T>
struct Prefix {
  T before, total;
};

template <class T>
__device__ __forceinline__ Prefix<T> prefix_in_block(T value) {
  struct Parts {
    T of_warp[kMaxWarps];
  };
  LMI_SHARED(Parts, parts);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  T upto = value;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, upto, lanes);
    if (lane >= lanes) upto += other;
  }
  if (lane == 31) parts.of_warp[warp] = upto;
  __syncthreads();
  Prefix<T> prefix{upto - value, T()};
  for (int i = 0; i < num_warps; ++i) {
    if (i < warp) prefix.before += parts.of_warp[i];
    prefix.total += parts.of_warp[i];
  }
  return prefix;
}

}  // namespace lmi
