/* Low-rank adapters, each token with its own. A block owns a token: its warps share the ranks of the way down, its threads the
 * outputs of the way up. A token whose adapter does not exist is left as it is. */
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"
#include "cuda/reduce.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kThreads = 128;
constexpr int64_t kMaxRank = 4096;

/* [A, rows, columns] */
template <class T>
struct Weights {
  const T *data;
  int64_t strides[2];
  Weights(const lmi_tensor &w) : data(static_cast<const T *>(w.data)), strides{w.stride[0], w.stride[1]} {}
  __device__ __forceinline__ const T *row(int64_t adapter, int row) const { return data + adapter * strides[0] + row * strides[1]; }
};

template <class T, class Out>
__global__ void lora_kernel(Rows<Out> out, Rows<const T> x, Weights<T> a, Weights<T> b, const float *scales, const int *adapters,
                            int num_adapters, int num_inputs, int rank, int num_outputs) {
  float *const inner = dynamic_shared<float>();
  const int64_t t = blockIdx.x;
  const int adapter = adapters[t], lane = threadIdx.x % 32;
  if (adapter < 0 || adapter >= num_adapters) return;
  for (int r = threadIdx.x / 32; r < rank; r += kThreads / 32) {
    float sum = 0.0f;
    for (int e = lane; e < num_inputs; e += 32) sum += to_float(a.row(adapter, r)[e]) * to_float(x.row(t)[e]);
    sum = join_warp(sum, [](float left, float right) { return left + right; });
    if (lane == 0) inner[r] = to_float(from_float<T>(sum));
  }
  __syncthreads();
  for (int f = threadIdx.x; f < num_outputs; f += kThreads) {
    float sum = 0.0f;
    for (int r = 0; r < rank; ++r) sum += to_float(b.row(adapter, f)[r]) * inner[r];
    out.row(t)[f] = from_float<Out>(to_float(out.row(t)[f]) + scales[adapter] * sum);
  }
}

template <class T, class Out>
void run_lora(const lmi_lora_args &args, cudaStream_t stream) {
  const Shape shape{static_cast<unsigned>(args.x.size[0]), kThreads, args.a.size[1] * sizeof(float)};
  launch("lora", lora_kernel<T, Out>, shape, stream, args.out, args.x, args.a, args.b, vector_of<float>(args.scales),
         vector_of<int>(args.adapters), static_cast<int>(args.a.size[0]), static_cast<int>(args.x.size[1]),
         static_cast<int>(args.a.size[1]), static_cast<int>(args.out.size[1]));
}

}  // namespace

void lora(const lmi_lora_args &args, cudaStream_t stream) {
  check_arguments(args);
  check_range("rank", args.a.size[1], 0, kMaxRank);
  with_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.out.dtype == LMI_F32) run_lora<T, float>(args, stream);
    else run_lora<T, T>(args, stream);
  });
}

}  // namespace lmi::cuda
