/* RMS norm and layer norm, with the residual addition before them. A block owns a row and keeps its sum s in shared memory, in x's
 * dtype, as a separate addition would leave it; bound by memory: x, residual and weight are read once, out and residual written. */
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"
#include "cuda/reduce.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kMaxThreads = 512;
constexpr int64_t kMaxRowBytes = 96 << 10; /* what every GPU has for a block */

template <class T>
struct Norm {
  Rows<T> out, x, residual;
  const T *weight, *bias;
  int num_columns;
  float eps, weight_offset;
};

/* s := x + residual into shared memory, and residual := s; s := x without one. Returns the sum of this thread's s. */
template <class T, int kNum>
__device__ float read_sum(const Norm<T> &norm, int64_t row, T *s) {
  float sum = 0.0f;
  for (int e = threadIdx.x * kNum; e < norm.num_columns; e += blockDim.x * kNum) {
    float value[kNum], other[kNum];
    read_floats(norm.x.row(row) + e, value);
    if (norm.residual.data) {
      read_floats(norm.residual.row(row) + e, other);
#pragma unroll
      for (int i = 0; i < kNum; ++i) value[i] = to_float(from_float<T>(value[i] + other[i]));
      write_floats(norm.residual.row(row) + e, value);
    }
    write_floats(s + e, value);
#pragma unroll
    for (int i = 0; i < kNum; ++i) sum += value[i];
  }
  return sum;
}

/* sum_e (s[e] - mean)^2, of this thread's s. */
template <class T, int kNum>
__device__ float sum_squares(const T *s, int num_columns, float mean) {
  float sum = 0.0f;
  for (int e = threadIdx.x * kNum; e < num_columns; e += blockDim.x * kNum) {
    float value[kNum];
    read_floats(s + e, value);
#pragma unroll
    for (int i = 0; i < kNum; ++i) sum += (value[i] - mean) * (value[i] - mean);
  }
  return sum;
}

template <class T, int kNum>
__device__ void write_normed(const Norm<T> &norm, int64_t row, const T *s, float mean, float inverse) {
  for (int e = threadIdx.x * kNum; e < norm.num_columns; e += blockDim.x * kNum) {
    float value[kNum], weight[kNum] = {}, bias[kNum] = {};
    read_floats(s + e, value);
    if (norm.weight) read_floats(norm.weight + e, weight);
    if (norm.bias) read_floats(norm.bias + e, bias);
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const float scaled = (value[i] - mean) * inverse;
      value[i] = (norm.weight ? weight[i] + norm.weight_offset : 1.0f) * scaled + (norm.bias ? bias[i] : 0.0f);
    }
    write_floats(norm.out.row(row) + e, value);
  }
}

/* kCentred: layer norm. A thread works on the same elements throughout, so that s needs no barrier. */
template <class T, int kNum, bool kCentred>
__global__ void norm_kernel(Norm<T> norm) {
  T *const s = dynamic_shared<T>();
  const int64_t row = blockIdx.x;
  const float num = static_cast<float>(norm.num_columns), sum = read_sum<T, kNum>(norm, row, s);
  const float mean = kCentred ? sum_in_block(sum) / num : 0.0f;
  const float variance = sum_in_block(sum_squares<T, kNum>(s, norm.num_columns, mean)) / num;
  write_normed<T, kNum>(norm, row, s, mean, 1.0f / sqrtf(variance + norm.eps));
}

template <bool kCentred, class Args>
void run_norm(const char *name, const Args &args, const lmi_tensor &bias, float weight_offset, cudaStream_t stream) {
  check_arguments(args);
  const int64_t num_rows = args.x.size[0], width = args.x.size[1];
  check_range("E", width, 1, kMaxRowBytes / bytes_of(args.x.dtype));
  with_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(is_wide({&args.out, &args.x, &args.residual, &args.weight, &bias}), [&](auto num) {
      const Norm<T> norm{args.out, args.x, args.residual, vector_of<T>(args.weight), vector_of<T>(bias), static_cast<int>(width),
                         args.eps, weight_offset};
      const Shape shape{static_cast<unsigned>(num_rows), threads_for(width / num, kMaxThreads), width * sizeof(T)};
      launch(name, norm_kernel<T, num, kCentred>, shape, stream, norm);
    });
  });
}

}  // namespace

void rms_norm(const lmi_rms_norm_args &args, cudaStream_t stream) { run_norm<false>("rms_norm", args, {}, args.weight_offset, stream); }

void layer_norm(const lmi_layer_norm_args &args, cudaStream_t stream) { run_norm<true>("layer_norm", args, args.bias, 0.0f, stream); }

}  // namespace lmi::cuda
