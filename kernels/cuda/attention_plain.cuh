/* Attention in fp32 without tensor cores: a warp owns a row (a query in a head) and walks over its splits and tiles in ascending
 * order; a lane owns the scores of two keys of a tile, then columns of D. For checkpoints in fp32 and for tests; right before fast.
 * */
#pragma once
#include "cuda/attention_problem.cuh"
#include "cuda/fp8.cuh"
#include "cuda/reduce.cuh"

namespace lmi::cuda {

constexpr int kMaxColumns = 256 / 32; /* of D that a lane owns */

struct PlainState {
  float max = -INFINITY, sum = 0.0f, values[kMaxColumns] = {};

  __device__ void merge(const PlainState &part) {
    const Merge both(max, sum, part.max, part.sum);
#pragma unroll
    for (int d = 0; d < kMaxColumns; ++d) values[d] = both(values[d], part.values[d]);
    sum = both(sum, part.sum);
    max = both.max;
  }
};

struct PlainRow {
  int sequence, query, head, token;
};

/* Score of one key, or -infinity if the row does not see it. */
template <class Cached>
__device__ float plain_score(const Attention<float, Cached> &attention, const PlainRow &row, int key, Range seen) {
  if (key < seen.first || key >= seen.last) return -INFINITY;
  const float *const q = attention.q.at(row.token, row.head);
  const Cached *const k = attention.cached(attention.k_cache, row.sequence, attention.group.quotient(row.head), key);
  float product = 0.0f;
  for (int d = 0; d < attention.size; ++d) product = fmaf(q[d], to_float(k[d]), product);
  return attention.score(product, row.head, key - attention.position(row.sequence, row.query));
}

/* One tile of keys into the state. */
template <class Cached>
__device__ void plain_tile(const Attention<float, Cached> &attention, const PlainRow &row, int first_key, Range seen, PlainState &state) {
  using Weights = float[kAttentionThreads / 32][kTile];
  LMI_SHARED(Weights, of_warps);
  float(&weights)[kTile] = of_warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  float own[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) own[i] = plain_score(attention, row, first_key + i * 32 + lane, seen);
  const float greatest = join_warp(fmaxf(own[0], own[1]), [](float a, float b) { return fmaxf(a, b); });
  const float before = state.max;
  state.max = fmaxf(before, greatest);
  const float base = state.max == -INFINITY ? 0.0f : state.max, keep = exp2f(before - base);
#pragma unroll
  for (int i = 0; i < 2; ++i) weights[i * 32 + lane] = own[i] = exp2f(own[i] - base);
  state.sum = fmaf(keep, state.sum, join_warp(own[0] + own[1], [](float a, float b) { return a + b; }));
#pragma unroll
  for (int d = 0; d < kMaxColumns; ++d) state.values[d] *= keep;
  __syncwarp();
  /* keys that the row does not see are not added at all: what lies there may be anything */
  const Range keys = common(seen, {first_key, first_key + kTile});
  for (int key = keys.first; key < keys.last; ++key) {
    const Cached *const v = attention.cached(attention.v_cache, row.sequence, attention.group.quotient(row.head), key);
#pragma unroll
    for (int d = 0; d < kMaxColumns; ++d) {
      if (d * 32 + lane < attention.size) state.values[d] = fmaf(weights[key - first_key], to_float(v[d * 32 + lane]), state.values[d]);
    }
  }
  __syncwarp(); /* the weights have been read */
}

template <class Cached>
__global__ void __launch_bounds__(kAttentionThreads) plain_attend_kernel(Attention<float, Cached> attention) {
  const int lane = threadIdx.x % 32, warp = blockIdx.x * kAttentionThreads / 32 + threadIdx.x / 32;
  const int first = attention.starts[0], num_rows = (attention.starts[attention.num_sequences] - first) * attention.num_heads;
  for (int i = warp; i < num_rows; i += gridDim.x * kAttentionThreads / 32) {
    const int token = first + i / attention.num_heads, b = sequence_of(attention.starts, attention.num_sequences, token);
    const PlainRow row{b, token - attention.starts[b], i % attention.num_heads, token};
    const Range seen = attention.seen(b, row.query);
    PlainState total, part;
    for (int key = seen.first / kTile * kTile; key < seen.last; key += kTile) {
      if (key % kSplit == 0) {
        total.merge(part);
        part = PlainState();
      }
      plain_tile(attention, row, key, seen, part);
    }
    total.merge(part);
    float *const out = attention.out.at(token, row.head);
#pragma unroll
    for (int d = 0; d < kMaxColumns; ++d) {
      if (d * 32 + lane < attention.size) out[d * 32 + lane] = attention.result(total.values[d], total.sum);
    }
  }
}

}  // namespace lmi::cuda
