/* What every kernel starts from: CUDA's own headers, or the stand-in for them (LMI_SIM); numbers, launches, shared memory and
 * memory for one call. Kernels keep to what both know. */
#pragma once
#include <cstdint>
#include <utility>

#if defined(LMI_SIM)
#include "sim/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "common/check.h"

namespace lmi {

using bf16 = __nv_bfloat16;
using f16 = __half;

/* ---- numbers ---- */

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(f16 value) { return __half2float(value); }

/* Rounded to nearest, ties to even. */
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float value) {
  return __float2half(value);
}

/* ---- shared memory ---- */

/* The part whose size the launch gives, on a border of 1024 bytes. */
template <class T>
__device__ __forceinline__ T *dynamic_shared() {
#if defined(LMI_SIM)
  return reinterpret_cast<T *>(sim::dynamic_shared_memory());
#else
  extern __shared__ __align__(1024) unsigned char lmi_dynamic_shared[];
  return reinterpret_cast<T *>(lmi_dynamic_shared);
#endif
}

/* LMI_SHARED(Type, name): one `Type &name` for the block, uninitialised. */
#if defined(LMI_SIM)
#define LMI_SHARED(Type, name)      \
  static const char name##_key = 0; \
  Type &name = *static_cast<Type *>(::lmi::sim::static_shared_memory(&name##_key, sizeof(Type), alignof(Type) < 16 ? 16 : alignof(Type)))
#else
#define LMI_SHARED(Type, name)                \
  __shared__ __align__(16) Type name##_shared; \
  Type &name = name##_shared
#endif

/* ---- launches ---- */

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
};

#if !defined(LMI_SIM)
/* Throws LMI_DEVICE_ERROR with CUDA's sentence. */
void check_cuda(cudaError_t error, const char *what);
#endif

/* Puts the kernel on the stream; a grid without blocks does nothing. Throws LMI_DEVICE_ERROR. name: for messages. */
template <class... Parameters, class... Arguments>
void launch(const char *name, void (*kernel)(Parameters...), const Shape &shape, cudaStream_t stream, Arguments &&...arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
#if defined(LMI_SIM)
  (void)stream;
  sim::launch({name, shape.grid, shape.block, shape.shared_bytes}, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  if (shape.shared_bytes > 48 << 10) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)), name);
  }
  kernel<<<shape.grid, shape.block, shape.shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError(), name);
#endif
}

/* Multiprocessors of the device in use; on the stand-in a few, so that blocks take several pieces of work. */
int num_processors();

/* Kernels for a GPU of its own kind beside those that run on all, as far as the caller allows: "sm_80" none, "sm_90a" those for
 * compute capability 9.0. */
enum class Architecture { kSm80, kSm90a };
void allow_architecture(Architecture most);
/* Whether kernels for sm_90a are in this library, run on the device in use, and are allowed. */
bool has_sm90a();

/* Device memory for the rest of a call, freed in the order of the stream. */
class Scratch {
 public:
  Scratch(size_t num_bytes, cudaStream_t stream);
  ~Scratch();
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  template <class T>
  T *as() const {
    return static_cast<T *>(data_);
  }

 private:
  void *data_ = nullptr;
  cudaStream_t stream_;
};

}  // namespace lmi
