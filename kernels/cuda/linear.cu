/* x times a packed weight, with bias, addend, activation, gate and residual at the end; for one weight or for experts. */
#include "cuda/linear_dense.cuh"
#include "cuda/linear_plain.cuh"
#include "cuda/linear_sm90.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

template <class T>
Linear<T> linear_of(const lmi_linear_args &args, const lmi_tensor &starts, int64_t expert_bytes) {
  return {args.out,
          args.addend,
          args.residual,
          args.x,
          vector_of<T>(args.bias),
          vector_of<char>(args.packed),
          vector_of<int>(starts),
          packed_layout(shape_of(args)),
          args.x.size[0],
          expert_bytes,
          is_given(starts) ? static_cast<int>(starts.size[0] - 1) : 1,
          static_cast<int>(args.in_features),
          static_cast<int>(args.out_features),
          args.format == LMI_DENSE ? static_cast<int>(args.in_features) : static_cast<int>(args.group),
          args.activation,
          args.gated != 0};
}

template <class T, int kRows>
void run_dense(const Linear<T> &linear, bool is_aligned, cudaStream_t stream) {
  const size_t bytes = size_t{kRing} * (kRows + kTileOutputs) * kTileInputs * sizeof(T);
  const Shape shape{{static_cast<unsigned>(linear.layout.num_rows / kTileOutputs), max_row_tiles(linear, kRows)}, kDenseThreads, bytes};
  launch("linear", dense_kernel<T, kRows>, shape, stream, linear, is_aligned);
}

/* On sm_90a, by how many tokens an expert has. */
template <class T>
void run_by_groups(const lmi_linear_args &args, const Linear<T> &linear, cudaStream_t stream) {
  if (linear.num_tokens <= int64_t{16} * linear.num_experts) run_groups<T, 1, 16>(args, linear, stream);
  else if (linear.num_tokens <= int64_t{64} * linear.num_experts) run_groups<T, 1, 64>(args, linear, stream);
  else run_groups<T, 2, 128>(args, linear, stream);
}

template <class T, int kFormat>
void run_plain(const Linear<T> &linear, cudaStream_t stream) {
  const int64_t outputs = linear.is_gated ? linear.out_features / 2 : linear.out_features;
  const Shape shape{{ceil_div(outputs, kPlainThreads), max_row_tiles(linear, kPlainRows)}, kPlainThreads};
  launch("linear", plain_kernel<T, kFormat>, shape, stream, linear);
}

/* Few rows an expert: small tiles, of which none is mostly empty. */
template <class T>
bool are_few(const Linear<T> &linear) {
  return linear.num_tokens <= int64_t{32} * linear.num_experts;
}

template <class T>
void run(const lmi_linear_args &args, const Linear<T> &linear, cudaStream_t stream) {
  if (args.format == LMI_INT8) return run_plain<T, LMI_INT8>(linear, stream);
  if (args.format == LMI_INT4) return run_plain<T, LMI_INT4>(linear, stream);
  if constexpr (std::is_same_v<T, float>) {
    run_plain<T, LMI_DENSE>(linear, stream);
  } else {
    if (is_for_sm90(args.x, linear)) return run_by_groups(args, linear, stream);
    const bool is_aligned = reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0 && args.x.stride[0] % 8 == 0;
    if (are_few(linear)) run_dense<T, 16>(linear, is_aligned, stream);
    else run_dense<T, 64>(linear, is_aligned, stream);
  }
}

}  // namespace

void linear(const lmi_linear_args &args, cudaStream_t stream) {
  check_arguments(args, packed_bytes(shape_of(args)));
  with_dtype(args.dtype, [&](auto zero) { run(args, linear_of<decltype(zero)>(args, {}, 0), stream); });
}

void grouped_linear(const lmi_grouped_linear_args &args, cudaStream_t stream) {
  check_arguments(args, packed_bytes(shape_of(args.linear)));
  with_dtype(args.linear.dtype, [&](auto zero) {
    run(args.linear, linear_of<decltype(zero)>(args.linear, args.starts, args.expert_bytes), stream);
  });
}

}  // namespace lmi::cuda
