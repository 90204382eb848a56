/* Rotary embedding of q and k in place, and the write of k and v into their cache slots. A block owns a token: its threads turn
 * packs of pairs, then copy the token's rows of k and v; bound by memory. A row or slot out of range leaves the token as it is. */
#include "cuda/fp8.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kMaxThreads = 256;

/* [T, heads, D], or a cache [N, K, P, D] */
template <class T>
struct Heads {
  T *data;
  int64_t strides[3];
  int num;

  Heads(const lmi_tensor &x)
      : data(is_given(x) ? static_cast<T *>(x.data) : nullptr), strides{x.stride[0], x.stride[1], x.stride[2]},
        num(is_given(x) ? static_cast<int>(x.size[1]) : 0) {}
  __device__ __forceinline__ T *at(int64_t i, int head, int64_t place = 0) const {
    return data + i * strides[0] + head * strides[1] + place * strides[2];
  }
};

template <class T, class Cached>
struct Rotary {
  Heads<T> q, k, v;
  Heads<Cached> k_cache, v_cache;
  const float *cos, *sin;
  const int *rows, *slots;
  int64_t cos_stride, sin_stride, num_rows, num_blocks;
  int half, size, block_size;
  float k_scale, v_scale;
};

/* kNum pairs from pair i on: (h[i], h[i+half]), or (h[2i], h[2i+1]) if kInterleaved. */
template <class T, int kNum, bool kInterleaved>
__device__ void rotate(T *head, const float *cos, const float *sin, int i, int half) {
  T *const first = head + (kInterleaved ? 2 * i : i), *const second = first + (kInterleaved ? kNum : half);
  float x[2][kNum], y[2][kNum];
  read_floats(first, x[0]);
  read_floats(second, x[1]);
#pragma unroll
  for (int j = 0; j < kNum; ++j) {
    /* where the two of pair j lie among the 2 kNum numbers */
    constexpr int kStep = kInterleaved ? 2 : 1;
    const int a = kStep * j, b = kInterleaved ? a + 1 : a + kNum;
    const float before = x[a / kNum][a % kNum], other = x[b / kNum][b % kNum];
    y[a / kNum][a % kNum] = before * cos[i + j] - other * sin[i + j];
    y[b / kNum][b % kNum] = other * cos[i + j] + before * sin[i + j];
  }
  write_floats(first, y[0]);
  write_floats(second, y[1]);
}

template <int kNum, bool kInterleaved, class T, class Cached>
__device__ void rotate_heads(const Rotary<T, Cached> &rotary, const Heads<T> &x, int64_t token, int64_t row) {
  const int packs = rotary.half / kNum;
  const float *const cos = rotary.cos + row * rotary.cos_stride, *const sin = rotary.sin + row * rotary.sin_stride;
  for (int i = threadIdx.x; i < x.num * packs; i += blockDim.x) {
    rotate<T, kNum, kInterleaved>(x.at(token, i / packs), cos, sin, i % packs * kNum, rotary.half);
  }
}

/* x / scale if the cache is fp8, else x. */
template <int kNum, class T, class Cached>
__device__ void write_pack(Cached *to, const T *from, float scale) {
  if constexpr (std::is_same_v<T, Cached>) {
    store_pack<kNum>(to, load_pack<kNum>(from));
  } else {
    float x[kNum];
    read_floats(from, x);
#pragma unroll
    for (int i = 0; i < kNum; ++i) x[i] /= scale;
    write_floats(to, x);
  }
}

template <int kNum, class T, class Cached>
__device__ void write_slot(const Heads<T> &x, const Heads<Cached> &cache, int64_t token, int64_t block, int64_t place, int size, float scale) {
  const int packs = size / kNum;
  for (int i = threadIdx.x; i < x.num * packs; i += blockDim.x) {
    const int head = i / packs, d = i % packs * kNum;
    write_pack<kNum>(cache.at(block, head, place) + d, x.at(token, head) + d, scale);
  }
}

template <class T, class Cached, int kNum, bool kInterleaved>
__global__ void rotary_kernel(Rotary<T, Cached> rotary) {
  const int64_t token = blockIdx.x;
  const int64_t row = rotary.cos ? rotary.rows[token] : -1, slot = rotary.k.data ? rotary.slots[token] : -1;
  if (row >= 0 && row < rotary.num_rows) {
    rotate_heads<kNum, kInterleaved>(rotary, rotary.q, token, row);
    rotate_heads<kNum, kInterleaved>(rotary, rotary.k, token, row);
    __syncthreads(); /* the heads of k are copied by other threads than those that turned them */
  }
  if (slot < 0 || slot >= rotary.num_blocks * rotary.block_size) return;
  const int64_t block = slot / rotary.block_size, place = slot % rotary.block_size;
  write_slot<kNum>(rotary.k, rotary.k_cache, token, block, place, rotary.size, rotary.k_scale);
  write_slot<kNum>(rotary.v, rotary.v_cache, token, block, place, rotary.size, rotary.v_scale);
}

template <class T, class Cached>
Rotary<T, Cached> rotary_of(const lmi_rotary_args &args, const lmi_tensor &one) {
  return {args.q, args.k, args.v, args.k_cache, args.v_cache, vector_of<float>(args.cos), vector_of<float>(args.sin),
          vector_of<int>(args.rows), vector_of<int>(args.slots), args.cos.stride[0], args.sin.stride[0], args.cos.size[0],
          args.k_cache.size[0], is_given(args.cos) ? static_cast<int>(args.cos.size[1]) : 0, static_cast<int>(one.size[2]),
          is_given(args.k_cache) ? static_cast<int>(args.k_cache.size[2]) : 1, args.k_scale, args.v_scale};
}

}  // namespace

void rotary(const lmi_rotary_args &args, cudaStream_t stream) {
  check_arguments(args);
  const lmi_tensor &one = is_given(args.q) ? args.q : args.k;
  with_cached(one.dtype, args.k_cache.dtype, [&](auto zero, auto cached) {
    using T = decltype(zero);
    using Cached = decltype(cached);
    const Rotary<T, Cached> rotary = rotary_of<T, Cached>(args, one);
    const bool wide = is_wide({&args.q, &args.k, &args.v, &args.k_cache, &args.v_cache}) && rotary.half * sizeof(T) % 16 == 0;
    with_width<T>(wide, [&](auto num) {
      const int64_t heads = std::max<int64_t>(rotary.q.num, rotary.k.num);
      const Shape shape{static_cast<unsigned>(one.size[0]), threads_for(heads * rotary.size / num / 2, kMaxThreads)};
      const auto kernel = args.interleaved ? rotary_kernel<T, Cached, num, true> : rotary_kernel<T, Cached, num, false>;
      launch("rotary", kernel, shape, stream, rotary);
    });
  });
}

}  // namespace lmi::cuda
