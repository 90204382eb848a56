/* Activation of a matrix, alone or as the gate of its other half. A thread owns a pack of one row; bound by memory. */
#include "cuda/activate.cuh"
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kThreads = 256;

template <class T, int kNum>
__global__ void activation_kernel(Rows<T> out, Rows<T> x, int64_t num_rows, int64_t width, int kind, bool is_gated) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kNum;
  if (column >= width) return;
  for (int64_t t = blockIdx.y; t < num_rows; t += gridDim.y) {
    float y[kNum], up[kNum] = {};
    read_floats(x.row(t) + column, y);
    if (is_gated) read_floats(x.row(t) + width + column, up);
#pragma unroll
    for (int i = 0; i < kNum; ++i) y[i] = activate(y[i], kind) * (is_gated ? up[i] : 1.0f);
    write_floats(out.row(t) + column, y);
  }
}

}  // namespace

void activation(const lmi_activation_args &args, cudaStream_t stream) {
  check_arguments(args);
  const int64_t num_rows = args.x.size[0], width = args.gated ? args.x.size[1] / 2 : args.x.size[1];
  with_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(is_wide({&args.out, &args.x}), [&](auto num) {
      const Shape shape{{ceil_div(width, int64_t{kThreads} * num), ceil_div(std::min(num_rows, kMaxGridRows), 1)}, kThreads};
      launch("activation", activation_kernel<T, num>, shape, stream, args.out, args.x, num_rows, width, args.activation, args.gated != 0);
    });
  });
}

}  // namespace lmi::cuda
