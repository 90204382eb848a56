/* T5's relative bias as a table by distance, made at each call: 2 * max_distance + 1 floats a head. */
#pragma once
#include "cuda/memory.cuh"

namespace lmi::cuda {

constexpr int kMaxFarBuckets = 256; /* buckets of more than one distance, in one direction */

/* Which bucket a distance has (Raffel et al. 2020, as Mesh TensorFlow computes it in float). The borders are worked out on the
 * host, so that a device's own logarithm cannot move one. */
struct Buckets {
  int exact, half, num_far;
  bool is_causal;
  int from[kMaxFarBuckets]; /* least distance of bucket exact + i */

  __device__ int of(int distance) const {
    const int base = !is_causal && distance > 0 ? half : 0;
    const int size = is_causal ? max(-distance, 0) : abs(distance);
    if (size < exact) return base + size;
    int far = 0;
    while (far + 1 < num_far && size >= from[far + 1]) ++far;
    return base + exact + far;
  }
};

__global__ void bias_kernel(float *table, Rows<const float> bias, Buckets buckets, int num_heads, int max_distance) {
  const int distance = static_cast<int>(blockIdx.x) - max_distance, bucket = buckets.of(distance);
  for (int head = threadIdx.x; head < num_heads; head += blockDim.x) {
    table[int64_t{head} * (2 * max_distance + 1) + max_distance + distance] = bias.row(bucket)[head];
  }
}

}  // namespace lmi::cuda
