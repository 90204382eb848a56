/* Tensors as kernels see them: rows of one dtype, read and written in packs of up to 16 bytes as floats. */
#pragma once
#include <initializer_list>
#include <type_traits>

#include "cuda/device.cuh"
#if defined(LMI_SIM)
#include "sim/counters.h"
#endif

namespace lmi {

/* ---- host: the choice of a kernel ---- */

/* fn(T()) for the type behind a float dtype. */
template <class Function>
void with_dtype(int32_t dtype, Function fn) {
  if (dtype == LMI_F32) fn(float());
  else if (dtype == LMI_BF16) fn(bf16());
  else fn(f16());
}

/* fn(integral_constant): how many numbers of T are read at once, 16 bytes or one. */
template <class T, class Function>
void with_width(bool is_wide, Function fn) {
  if (is_wide) fn(std::integral_constant<int, 16 / sizeof(T)>());
  else fn(std::integral_constant<int, 1>());
}

/* Whether all rows (of those that are given) start at a multiple of 16 bytes and are made of whole packs. */
inline bool is_wide(std::initializer_list<const lmi_tensor *> tensors) {
  for (const lmi_tensor *tensor : tensors) {
    if (!is_given(*tensor)) continue;
    const int64_t bytes = bytes_of(tensor->dtype);
    if (reinterpret_cast<uintptr_t>(tensor->data) % 16 || tensor->size[tensor->dims - 1] * bytes % 16) return false;
    for (int i = 0; i + 1 < tensor->dims; ++i) {
      if (tensor->stride[i] * bytes % 16) return false;
    }
  }
  return true;
}

/* A matrix [rows, columns] of T; data is null if the tensor is absent. */
template <class T>
struct Rows {
  T *data;
  int64_t stride;

  Rows(const lmi_tensor &tensor) : data(is_given(tensor) ? static_cast<T *>(tensor.data) : nullptr), stride(tensor.stride[0]) {}
  __device__ __forceinline__ T *row(int64_t i) const { return data + i * stride; }
};

template <class T>
T *vector_of(const lmi_tensor &tensor) {
  return is_given(tensor) ? static_cast<T *>(tensor.data) : nullptr;
}

inline unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

/* Threads for a row of so many packs: whole warps, at most `most`. */
inline unsigned threads_for(int64_t num_packs, unsigned most) {
  const int64_t threads = (num_packs + 31) / 32 * 32;
  return static_cast<unsigned>(threads < 32 ? 32 : threads > most ? most : threads);
}

constexpr int64_t kMaxGridRows = 65535; /* of a grid's y: kernels take their rows in steps of gridDim.y */

/* ---- device: packs ---- */

template <class T, int kNum>
struct alignas(sizeof(T) * kNum) Pack {
  T at[kNum];
};

template <int kNum, class T>
__device__ __forceinline__ Pack<T, kNum> load_pack(const T *from) {
#if defined(LMI_SIM)
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, kNum>)) sim::fail("a pack of %d is read from an odd address", kNum);
  sim::count_access(from, sizeof(Pack<T, kNum>));
#endif
  return *reinterpret_cast<const Pack<T, kNum> *>(from);
}

template <int kNum, class T>
__device__ __forceinline__ void store_pack(T *to, const Pack<T, kNum> &pack) {
#if defined(LMI_SIM)
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Pack<T, kNum>)) sim::fail("a pack of %d is written to an odd address", kNum);
  sim::count_access(to, sizeof(Pack<T, kNum>));
#endif
  *reinterpret_cast<Pack<T, kNum> *>(to) = pack;
}

template <int kNum, class T>
__device__ __forceinline__ void read_floats(const T *from, float (&to)[kNum]) {
  const Pack<T, kNum> pack = load_pack<kNum>(from);
#pragma unroll
  for (int i = 0; i < kNum; ++i) to[i] = to_float(pack.at[i]);
}

template <int kNum, class T>
__device__ __forceinline__ void write_floats(T *to, const float (&from)[kNum]) {
  Pack<T, kNum> pack;
#pragma unroll
  for (int i = 0; i < kNum; ++i) pack.at[i] = from_float<T>(from[i]);
  store_pack<kNum>(to, pack);
}

}  // namespace lmi
