/* Activation of a matrix, alone or as the gate of its other half. A thread owns a few packs of one row, all of which it asks for before it
 * waits for the first; rows without gaps are one long row, so that no thread of a block is idle. Bound by memory. */
#include "cuda/activate.cuh"
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kPacks = 2; /* of a thread */

template <class T, int kNum, int kKind>
__global__ void __launch_bounds__(kThreads) activation_kernel(Rows<T> out, Rows<T> x, int64_t num_rows, int64_t width, float parameter,
                                                              bool is_gated) {
  const int64_t first = (int64_t{blockIdx.x} * kPacks * kThreads + threadIdx.x) * kNum;
  for (int64_t t = blockIdx.y; t < num_rows; t += gridDim.y) {
    Pack<T, kNum> gate[kPacks] = {}, up[kPacks] = {};
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t column = first + j * int64_t{kThreads} * kNum;
      if (column < width) gate[j] = load_pack<kNum>(x.row(t) + column);
      if (column < width && is_gated) up[j] = load_pack<kNum>(x.row(t) + width + column);
    }
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t column = first + j * int64_t{kThreads} * kNum;
      if (column >= width) return;
      float y[kNum];
#pragma unroll
      for (int i = 0; i < kNum; ++i) {
        y[i] = activate(to_float(gate[j].at[i]), kKind, parameter) * (is_gated ? to_float(up[j].at[i]) : 1.0f);
      }
      write_floats(out.row(t) + column, y);
    }
  }
}

/* fn(integral_constant) for an activation of the header. */
template <int kKind = LMI_SCALE, class Function>
void with_kind(int32_t kind, Function fn) {
  if constexpr (kKind > LMI_IDENTITY) {
    if (kind != kKind) return with_kind<kKind - 1>(kind, fn);
  }
  fn(std::integral_constant<int, kKind>());
}

bool is_one_run(const lmi_tensor &matrix) { return matrix.stride[0] == matrix.size[1]; }

}  // namespace

void activation(const lmi_activation_args &args, cudaStream_t stream) {
  check_arguments(args);
  const bool is_run = !args.gated && is_one_run(args.out) && is_one_run(args.x);
  const int64_t num_rows = is_run ? 1 : args.out.size[0], width = is_run ? args.out.size[0] * args.out.size[1] : args.out.size[1];
  with_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(is_wide({&args.out, &args.x}), [&](auto num) {
      with_kind(args.activation, [&](auto kind) {
        const Shape shape{{ceil_div(width, int64_t{kThreads} * kPacks * num), ceil_div(std::min(num_rows, kMaxGridRows), 1)}, kThreads};
        launch("activation", activation_kernel<T, num, kind>, shape, stream, args.out, args.x, num_rows, width, args.parameter,
               args.gated != 0);
      });
    });
  });
}

}  // namespace lmi::cuda
