/* bf16 and fp16 weights on tensor cores (mma.sync, sm_80 and later). A block owns a tile of rows and 64 outputs; tiles of 64 inputs
 * of x and of the weight come through a ring in shared memory, several on their way at a time. Each output takes its inputs in
 * ascending order, 16 at a time, into one accumulator, the same instructions for every number of rows. */
#pragma once
#include "cuda/linear_problem.cuh"
#include "cuda/ptx.cuh"

namespace lmi::cuda {

constexpr unsigned kDenseThreads = 128;
constexpr int kRing = 4, kChunk = 8, kChunks = kTileInputs / kChunk; /* elements of 16 bytes; of a row */

/* Where chunk c of row r lies in a tile: exchanged within the row so that eight rows of a column of chunks lie in different banks.
 * */
__device__ __forceinline__ int tile_offset(int row, int chunk) { return row * kTileInputs + (chunk ^ (row & 7)) * kChunk; }

/* Eight elements to shared memory: those that exist, then zeros. */
template <class T>
__device__ __forceinline__ void stage_chunk(T *to, const T *from, int num, bool is_aligned) {
  num = max(0, min(num, kChunk));
  if (is_aligned) {
    ptx::copy_async(ptx::shared_address(to), from, num * static_cast<int>(sizeof(T)));
    return;
  }
  for (int i = 0; i < kChunk; ++i) to[i] = i < num ? from[i] : from_float<T>(0.0f);
}

/* Rows of a tile that a block has: 16 or 64. 64: four warps of 32 x 32; 16: four of 16 x 16. */
template <int kRows>
struct WarpTile {
  static constexpr int kM = kRows == 64 ? 2 : 1, kN = kRows == 64 ? 4 : 2; /* products of 16 x 8 */
  int row, column;
  __device__ WarpTile() {
    const int warp = threadIdx.x / 32;
    row = kRows == 64 ? warp / 2 * 32 : 0;
    column = kRows == 64 ? warp % 2 * 32 : warp * 16;
  }
};

template <class T, int kRows>
__device__ void stage_tile(const Linear<T> &linear, const RowTile &rows, const T *weight, int tile, T *stage, bool is_aligned) {
  const int first_input = tile * static_cast<int>(kTileInputs);
  for (int i = threadIdx.x; i < (kRows + kTileOutputs) * kChunks; i += kDenseThreads) {
    const int row = i / kChunks, chunk = i % kChunks, input = first_input + chunk * kChunk;
    if (row < kRows) {
      const bool exists = rows.first + row < rows.last && input < linear.in_features;
      const T *const from = exists ? linear.x.row(rows.first + row) + input : linear.x.data;
      stage_chunk(stage + tile_offset(row, chunk), from, exists ? linear.in_features - input : 0, is_aligned);
    } else {
      const T *const from = weight + (row - kRows) * (linear.layout.row_bytes / static_cast<int>(sizeof(T))) + input;
      ptx::copy_async(ptx::shared_address(stage + kRows * kTileInputs + tile_offset(row - kRows, chunk)), from);
    }
  }
}

template <class T, int kRows>
__device__ void multiply_tile(const T *stage, const WarpTile<kRows> &warp, float (&sums)[WarpTile<kRows>::kM][WarpTile<kRows>::kN][4]) {
  constexpr int kM = WarpTile<kRows>::kM, kN = WarpTile<kRows>::kN;
  const int lane = threadIdx.x % 32;
  const T *const weights = stage + kRows * kTileInputs;
#pragma unroll
  for (int k = 0; k < kChunks; k += 2) {
    uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int row = warp.row + m * 16 + lane % 16;
      ptx::load_matrices<4>(a[m], ptx::shared_address(stage + tile_offset(row, k + lane / 16)));
    }
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      const int row = warp.column + n * 16 + lane / 16 * 8 + lane % 8;
      ptx::load_matrices<4>(b[n], ptx::shared_address(weights + tile_offset(row, k + lane / 8 % 2)));
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
        ptx::multiply<T>(sums[m][n], a[m], pair);
      }
    }
  }
}

template <class T, int kRows>
__device__ void finish_tile(const Linear<T> &linear, const RowTile &rows, int64_t first_row, const WarpTile<kRows> &warp,
                            const float (&sums)[WarpTile<kRows>::kM][WarpTile<kRows>::kN][4]) {
  constexpr int kM = WarpTile<kRows>::kM, kN = WarpTile<kRows>::kN;
  const int lane = threadIdx.x % 32, step = linear.is_gated ? 2 : 1; /* gated: every second product is the other's `up` */
  const int64_t outputs = linear.is_gated ? linear.out_features / 2 : linear.out_features;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (n % step) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t token = rows.first + warp.row + m * 16 + lane / 4 + i / 2 * 8;
        const int64_t f = (first_row + warp.column + n * 8) / step + lane % 4 * 2 + i % 2;
        if (token >= rows.last || f >= outputs) continue;
        finish(linear, rows.expert, token, f, sums[m][n][i], n + 1 < kN ? sums[m][n + 1][i] : 0.0f);
      }
    }
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kDenseThreads) dense_kernel(Linear<T> linear, bool is_aligned) {
  T *const ring = dynamic_shared<T>();
  constexpr int kStage = (kRows + kTileOutputs) * kTileInputs;
  const RowTile rows = row_tile(linear, blockIdx.y, kRows);
  if (rows.first >= rows.last) return;
  const int64_t first_row = int64_t{blockIdx.x} * kTileOutputs;
  const T *const weight = reinterpret_cast<const T *>(linear.packed + rows.expert * linear.expert_bytes + first_row * linear.layout.row_bytes);
  const int num_tiles = (linear.in_features + static_cast<int>(kTileInputs) - 1) / static_cast<int>(kTileInputs);
  const WarpTile<kRows> warp;
  float sums[WarpTile<kRows>::kM][WarpTile<kRows>::kN][4] = {};
  const auto stage = [&](int tile) {
    if (tile < num_tiles) stage_tile<T, kRows>(linear, rows, weight, tile, ring + tile % kRing * kStage, is_aligned);
    ptx::commit_copies(); /* of nothing beyond the last tile, so that a group is a tile */
  };
  for (int tile = 0; tile < kRing - 1; ++tile) stage(tile);
  for (int tile = 0; tile < num_tiles; ++tile) {
    ptx::wait_copies<kRing - 2>();
    __syncthreads(); /* this tile is there for all, and nobody reads the one before it any more */
    stage(tile + kRing - 1);
    multiply_tile<T, kRows>(ring + tile % kRing * kStage, warp, sums);
  }
  finish_tile<T, kRows>(linear, rows, first_row, warp, sums);
}

}  // namespace lmi::cuda
