/* RMS norm and layer norm, with a residual added before them and an addend behind. A block owns a row and keeps its sum s in registers,
 * in x's dtype, as a separate addition would leave it. Bound by memory: each number is read and written once, and a thread asks for all of
 * its numbers before it waits for the first. */
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"
#include "cuda/reduce.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kMaxThreads = 512;
/* What a thread holds of a row: 32 numbers, or 16 where they come one by one and each has an address of its own. */
template <int kNum>
constexpr int kPacks = kNum == 1 ? 16 : 32 / kNum;

template <class T>
struct Norm {
  Rows<T> out, x, residual, addend;
  const T *weight, *bias;
  int num_columns;
  float eps, weight_offset;
};

template <class T, int kNum>
using Packs = Pack<T, kNum>[kPacks<kNum>];

/* First column of a thread's pack j; beyond the row's end there is none. */
template <int kNum>
__device__ __forceinline__ int column_of(int j) {
  return static_cast<int>(threadIdx.x + j * blockDim.x) * kNum;
}

template <int kNum, class T>
__device__ __forceinline__ void read_packs(const T *row, int num_columns, Packs<T, kNum> &to) {
#pragma unroll
  for (int j = 0; j < kPacks<kNum>; ++j) {
    if (column_of<kNum>(j) < num_columns) to[j] = load_pack<kNum>(row + column_of<kNum>(j));
  }
}

/* s := x + residual, and residual := s; s := x without one. */
template <class T, int kNum>
__device__ __forceinline__ void read_sum(const Norm<T> &norm, int64_t row, Packs<T, kNum> &s) {
  read_packs<kNum>(norm.x.row(row), norm.num_columns, s);
  if (!norm.residual.data) return;
  T *const residual = norm.residual.row(row);
  Packs<T, kNum> other = {};
  read_packs<kNum>(residual, norm.num_columns, other);
#pragma unroll
  for (int j = 0; j < kPacks<kNum>; ++j) {
#pragma unroll
    for (int i = 0; i < kNum; ++i) s[j].at[i] = from_float<T>(to_float(s[j].at[i]) + to_float(other[j].at[i]));
    if (column_of<kNum>(j) < norm.num_columns) store_pack<kNum>(residual + column_of<kNum>(j), s[j]);
  }
}

/* sum of (s[e] - mean)^power over the row */
template <class T, int kNum, int kPower>
__device__ __forceinline__ float sum_row(const Packs<T, kNum> &s, int num_columns, float mean) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPacks<kNum>; ++j) {
    if (column_of<kNum>(j) >= num_columns) continue;
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const float term = to_float(s[j].at[i]) - mean;
      sum += kPower == 2 ? term * term : term;
    }
  }
  return sum_in_block(sum);
}

template <int kNum, class T>
__device__ __forceinline__ void add_pack(const T *from, float (&to)[kNum]) {
  float term[kNum];
  read_floats(from, term);
#pragma unroll
  for (int i = 0; i < kNum; ++i) to[i] += term[i];
}

template <class T, int kNum>
__device__ __forceinline__ void write_normed(const Norm<T> &norm, int64_t row, const Packs<T, kNum> &s, float mean, float inverse) {
  Packs<T, kNum> weight = {};
  if (norm.weight) read_packs<kNum>(norm.weight, norm.num_columns, weight);
#pragma unroll
  for (int j = 0; j < kPacks<kNum>; ++j) {
    const int e = column_of<kNum>(j);
    if (e >= norm.num_columns) continue;
    float value[kNum];
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const float factor = norm.weight ? to_float(weight[j].at[i]) + norm.weight_offset : 1.0f;
      value[i] = factor * ((to_float(s[j].at[i]) - mean) * inverse);
    }
    if (norm.bias) add_pack(norm.bias + e, value);
    if (norm.addend.data) add_pack(norm.addend.row(row) + e, value);
    write_floats(norm.out.row(row) + e, value);
  }
}

/* kCentred: layer norm. */
template <class T, int kNum, bool kCentred>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(Norm<T> norm) {
  const int64_t row = blockIdx.x;
  const float num = static_cast<float>(norm.num_columns);
  Packs<T, kNum> s = {};
  read_sum<T, kNum>(norm, row, s);
  const float mean = kCentred ? sum_row<T, kNum, 1>(s, norm.num_columns, 0.0f) / num : 0.0f;
  const float squares = sum_row<T, kNum, 2>(s, norm.num_columns, mean);
  write_normed<T, kNum>(norm, row, s, mean, 1.0f / sqrtf(squares / num + norm.eps));
}

template <bool kCentred, class Args>
void run_norm(const char *name, const Args &args, const lmi_tensor &bias, const lmi_tensor &addend, float weight_offset,
              cudaStream_t stream) {
  check_arguments(args);
  const int64_t num_rows = args.x.size[0], width = args.x.size[1];
  with_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(is_wide({&args.out, &args.x, &args.residual, &args.weight, &bias, &addend}), [&](auto num) {
      constexpr int kHeld = num * kPacks<num>;
      check_range("E", width, 1, kHeld * kMaxThreads);
      const Norm<T> norm{args.out, args.x, args.residual, addend, vector_of<T>(args.weight), vector_of<T>(bias), static_cast<int>(width),
                         args.eps, weight_offset};
      const Shape shape{static_cast<unsigned>(num_rows), threads_for(ceil_div(width, kHeld), kMaxThreads)};
      launch(name, norm_kernel<T, num, kCentred>, shape, stream, norm);
    });
  });
}

}  // namespace

void rms_norm(const lmi_rms_norm_args &args, cudaStream_t stream) {
  run_norm<false>("rms_norm", args, {}, args.addend, args.weight_offset, stream);
}

void layer_norm(const lmi_layer_norm_args &args, cudaStream_t stream) {
  run_norm<true>("layer_norm", args, args.bias, {}, 0.0f, stream);
}

}  // namespace lmi::cuda
