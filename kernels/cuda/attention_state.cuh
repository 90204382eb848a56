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

/* How the lane's two rows see a tile of keys. */
struct ScoredRows {
  int position[2], head[2], num_keys;
  Range seen_by_all; /* keys that each of some rows sees, the lane's among them */

  ScoredRows() = default;

  /* row: the lane's first one in the unit; the other is 8 further. all: the rows of seen_by_all. Rows that a unit has not do as its last
   * does. */
  __device__ ScoredRows(const Question &attention, const Unit &unit, int row, Range all) : num_keys(attention.key_lengths[unit.sequence]) {
    const auto query = [&](int r) { return query_of(attention, unit, min(r, unit.rows - 1)); };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      position[r] = attention.position(unit.sequence, query(row + 8 * r));
      head[r] = head_of(attention, unit, min(row + 8 * r, unit.rows - 1));
    }
    seen_by_all = {attention.seen(unit.sequence, query(all.last - 1)).first, attention.seen(unit.sequence, query(all.first)).last};
  }

  /* Scores of products with 64 keys from first_key on; of those that a row does not see, -infinity. */
  __device__ __forceinline__ void score(const Question &attention, const float (&products)[8][4], int first_key, float (&scores)[8][4]) const {
    if (attention.has_plain_scores()) {
      for_each([&](int n, int i, int, int) { scores[n][i] = attention.plain_score(products[n][i]); });
    } else {
      for_each([&](int n, int i, int r, int column) {
        scores[n][i] = attention.mixed_score(products[n][i], head[r], first_key + column - position[r]);
      });
    }
    if (first_key >= seen_by_all.first && first_key + kTile <= seen_by_all.last) return;
    const Range seen[2] = {attention.seen_from(position[0], num_keys), attention.seen_from(position[1], num_keys)};
    for_each([&](int n, int i, int r, int column) {
      const int key = first_key + column;
      if (key < seen[r].first || key >= seen[r].last) scores[n][i] = -INFINITY;
    });
  }

 private:
  /* fn(product, number in it, which of the lane's rows, key in the tile) */
  template <class Function>
  __device__ static __forceinline__ void for_each(Function fn) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fn(n, i, i / 2, n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2);
    }
  }
};

/* A tile's scores as the left side of products with its values, 16 keys at a time. */
template <class T>
__device__ __forceinline__ void round_weights(const float (&scores)[8][4], uint32_t (&weights)[kTile / 16][4]) {
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    const float(&low)[4] = scores[2 * k], (&high)[4] = scores[2 * k + 1];
    weights[k][0] = pair_of<T>(low[0], low[1]);
    weights[k][1] = pair_of<T>(low[2], low[3]);
    weights[k][2] = pair_of<T>(high[0], high[1]);
    weights[k][3] = pair_of<T>(high[2], high[3]);
  }
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
