/* Rows of logits: what penalties, draws and log probabilities share. A block owns a row. */
#pragma once
#include "cuda/memory.cuh"
#include "cuda/reduce.cuh"

namespace lmi {

constexpr unsigned kRowThreads = 256;

/* V, which the kernels count in 32 bits. Throws LMI_BAD_ARGUMENT. */
inline int vocabulary_of(const lmi_tensor &logits) {
  check_range("V", logits.size[1], 1, INT32_MAX);
  return static_cast<int>(logits.size[1]);
}

/* fn(logit, id, whether there is one) for a thread's places of a row, ascending, all lanes together. So many are read before the first
 * is looked at, since a block that has a multiprocessor to itself must keep the memory busy alone. */
template <class Function>
__device__ __forceinline__ void for_places(const float *logits, int num, Function fn) {
  constexpr int kAtOnce = 8;
  for (int begin = threadIdx.x; begin - static_cast<int>(threadIdx.x) < num; begin += kAtOnce * static_cast<int>(kRowThreads)) {
    float values[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * static_cast<int>(kRowThreads);
      values[j] = i < num ? logits[i] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = begin + j * static_cast<int>(kRowThreads);
      fn(values[j], i, i < num);
    }
  }
}

/* fn(logit, id) for a thread's places of a row, ascending. */
template <class Function>
__device__ __forceinline__ void for_logits(const float *logits, int num, Function fn) {
  for_places(logits, num, [&](float logit, int id, bool is_there) {
    if (is_there) fn(logit, id);
  });
}

/* A logit and where it stands; the greater wins, of equals the lower id. A NaN beats all. */
struct Candidate {
  float logit;
  int id;
};

__device__ __forceinline__ bool is_nan(float value) { return value != value; }

__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
  if (is_nan(a.logit) || is_nan(b.logit)) return is_nan(a.logit) ? a : b;
  return b.logit > a.logit || (b.logit == a.logit && b.id < a.id) ? b : a;
}

__device__ inline Candidate best_in_block(Candidate mine) {
  struct Parts {
    Candidate of_warp[kRowThreads / 32];
  };
  LMI_SHARED(Parts, parts);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    mine = better(mine, {__shfl_xor_sync(0xffffffffu, mine.logit, lanes), __shfl_xor_sync(0xffffffffu, mine.id, lanes)});
  }
  if (threadIdx.x % 32 == 0) parts.of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  Candidate best = parts.of_warp[0];
  for (unsigned i = 1; i < kRowThreads / 32; ++i) best = better(best, parts.of_warp[i]);
  __syncthreads(); /* parts may be used again */
  return best;
}

/* The greatest logit and the lowest id that has it; every thread of the block gets it. */
__device__ inline Candidate best_of_row(const float *logits, int num) {
  Candidate best{-INFINITY, num};
  for_logits(logits, num, [&](float logit, int id) { best = better(best, {logit, id}); });
  return best_in_block(best);
}

__device__ __forceinline__ bool can_be_drawn(float max) { return max > -INFINITY; /* false for NaN */ }

}  // namespace lmi
