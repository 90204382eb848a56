/* bf16 and fp16 weights on sm_90a. A block owns 64 outputs for each of its groups of four warps, and a tile of tokens; one thread has
 * the copy engine bring tiles of 64 inputs of both through a ring in shared memory. Outputs are the rows of a product (wgmma) and
 * tokens its columns, so that a few tokens cost a few columns. Each output takes its inputs in ascending order, 16 at a time, into
 * one accumulator, the same instructions for every number of tokens. */
#pragma once
#include "cuda/linear_problem.cuh"
#include "cuda/ring_sm90.cuh"

namespace lmi::cuda {

template <int kGroups, int kTokens>
struct GroupShape {
  static constexpr int kOutputs = kGroups * static_cast<int>(kTileOutputs);
  static constexpr int kRowBytes = static_cast<int>(kTileInputs) * 2; /* of a tile: 128, as a swizzle has them */
  static constexpr int kWeightBytes = kOutputs * kRowBytes, kStepBytes = kWeightBytes + kTokens * kRowBytes;
  static constexpr int kSlots = kStepBytes > 25 << 10 ? 6 : 8;
  static constexpr unsigned kThreads = ptx::kGroupThreads * (1 + kGroups);
};

/* What the copy engine brings: 64 inputs of a block's outputs, of the experts one by one, and of its tokens. */
struct LinearMaps {
  TensorMap weights, tokens;
};

template <class T, int kGroups, int kTokens>
__device__ void finish_tokens(const Linear<T> &linear, const RowTile &rows, int64_t first_row, const float (&sums)[kTokens / 8][4]) {
  const int lane = threadIdx.x % 32, step = linear.is_gated ? 2 : 1; /* gated: row g + 8 is the `up` of row g */
  const int64_t outputs = linear.is_gated ? linear.out_features / 2 : linear.out_features;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = rows.first + n * 8 + lane % 4 * 2 + i % 2, f = first_row / step + lane / 4 + i / 2 * 8;
      if (i / 2 >= 2 / step || token >= rows.last || f >= outputs) continue;
      finish(linear, rows.expert, token, f, sums[n][i], sums[n][i % 2 + 2]);
    }
  }
}

template <class T, int kGroups, int kTokens>
__global__ void __launch_bounds__(ptx::kGroupThreads *(1 + kGroups), 1)
    group_linear_kernel(Linear<T> linear, const __grid_constant__ LinearMaps maps) {
#if LMI_HAS_SM90A
  using Tiles = GroupShape<kGroups, kTokens>;
  const RowTile rows = row_tile(linear, blockIdx.y, kTokens);
  if (rows.first >= rows.last) return;
  LMI_SHARED(RingBarriers<Tiles::kSlots>, barriers);
  const Ring<Tiles::kSlots> ring(ptx::shared_address(dynamic_shared<char>()), Tiles::kStepBytes, barriers);
  if (threadIdx.x == 0) ring.init(4 * kGroups);
  __syncthreads();
  constexpr int kInputs = static_cast<int>(kTileInputs);
  const int num_steps = (linear.in_features + kInputs - 1) / kInputs, group = static_cast<int>(threadIdx.x / ptx::kGroupThreads) - 1;
  const int first_row = static_cast<int>(blockIdx.x) * Tiles::kOutputs;
  if (group < 0) {
    if (threadIdx.x > 0) return;
    for (int step = 0; step < num_steps; ++step) {
      const int from_weights[] = {step * kInputs, first_row, rows.expert}, from_tokens[] = {step * kInputs, static_cast<int>(rows.first)};
      ring.await_empty(step);
      ptx::arrive_expecting(ring.full(step), Tiles::kStepBytes);
      ptx::copy_box(ring.place(step), maps.weights, from_weights, ring.full(step));
      ptx::copy_box(ring.place(step) + Tiles::kWeightBytes, maps.tokens, from_tokens, ring.full(step));
    }
  } else {
    float sums[kTokens / 8][4] = {};
    for (int step = 0; step < num_steps; ++step) {
      ring.await_full(step);
      const uint32_t weights = ring.place(step) + group * static_cast<int>(kTileOutputs) * Tiles::kRowBytes;
      const uint32_t tokens = ring.place(step) + Tiles::kWeightBytes;
      ptx::hold_registers(sums);
      ptx::fence_products();
#pragma unroll
      for (int k = 0; k < kInputs / 16; ++k) {
        ptx::multiply_async<T, kTokens>(sums, ptx::matrix_at(weights + k * 32), ptx::matrix_at(tokens + k * 32), true);
      }
      ptx::commit_products();
      ptx::wait_products<1>(); /* of the step before */
      if (step > 0) ring.release(step - 1);
    }
    ptx::wait_products<0>();
    ptx::hold_registers(sums);
    const int64_t first_of_warp = first_row + group * kTileOutputs + threadIdx.x % ptx::kGroupThreads / 32 * 16;
    finish_tokens<T, kGroups, kTokens>(linear, rows, first_of_warp, sums);
  }
#endif
}

/* Whether dense weights of this shape are multiplied here: a device that has it, and rows of x on borders of 16 bytes. */
template <class T>
bool is_for_sm90(const lmi_tensor &x, const Linear<T> &linear) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[0] % 8 == 0;
  return has_sm90a() && is_aligned && linear.expert_bytes % 16 == 0 && linear.num_tokens > 0;
}

template <class T, int kGroups, int kTokens>
void run_groups(const lmi_linear_args &args, const Linear<T> &linear, cudaStream_t stream) {
  using Tiles = GroupShape<kGroups, kTokens>;
  const int64_t row_elements = linear.layout.row_bytes / 2;
  const lmi_tensor weights{args.packed.data, {linear.num_experts, linear.layout.num_rows, row_elements},
                           {std::max(linear.expert_bytes, linear.layout.num_bytes) / 2, row_elements, 1}, 3, args.dtype};
  const LinearMaps maps{tensor_map(weights, {1, Tiles::kOutputs, 64}), tensor_map(args.x, {kTokens, 64})};
  const Shape shape{{ceil_div(linear.layout.num_rows, Tiles::kOutputs), max_row_tiles(linear, kTokens)}, Tiles::kThreads,
                    size_t{Tiles::kSlots} * Tiles::kStepBytes};
  launch("linear by groups", group_linear_kernel<T, kGroups, kTokens>, shape, stream, linear, maps);
}

}  // namespace lmi::cuda
