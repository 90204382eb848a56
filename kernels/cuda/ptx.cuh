/* Instructions that C++ has no words for, sm_80 and later. Inline PTX stands in ptx*.cuh and nowhere else, each instruction beside
 * its twin for the CPU; a golden test on a GPU compares the two bit by bit. */
#pragma once
#include "cuda/device.cuh"
#if defined(LMI_SIM)
#include "sim/counters.h"
#include "sim/fragments.h"
#endif

namespace lmi::ptx {

/* Shared-memory address of a pointer into shared memory. */
__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
#if defined(LMI_SIM)
  return sim::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

/* ---- asynchronous copies of 16 bytes, global to shared ---- */

/* num_read bytes (0 to 16) are read, the rest becomes 0; `from` must be a valid address even for 0. Visible after wait and a
 * barrier. */
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, int num_read = 16) {
#if defined(LMI_SIM)
  if (reinterpret_cast<uintptr_t>(from) % 16) sim::fail("cp.async: a global address that is not a multiple of 16");
  if (num_read < 0 || num_read > 16) sim::fail("cp.async of %d bytes", num_read);
  if (num_read > 0) sim::count_access(from, static_cast<size_t>(num_read));
  sim::current->copies.add({sim::shared_pointer(to, 16, 16, "cp.async"), static_cast<const char *>(from), 16, static_cast<unsigned>(num_read)});
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(num_read) : "memory");
#endif
}

/* Ends a group of this thread's copies. */
__device__ __forceinline__ void commit_copies() {
#if defined(LMI_SIM)
  sim::current->copies.commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Until at most kLeft of this thread's groups are on their way. */
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
#if defined(LMI_SIM)
  sim::current->copies.wait(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

/* ---- 8 x 8 matrices of 16-bit elements between shared memory and registers ---- */

/* Register j of lane (g, t) becomes row g, columns 2t and 2t+1 of matrix j, whose row i lies at the address of lane 8 j + i; with
 * kTransposed, column g, rows 2t and 2t+1. */
template <int kMatrices, bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[kMatrices], uint32_t address) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "ldmatrix takes 1, 2 or 4");
#if defined(LMI_SIM)
  struct Part {
    uint32_t address, *to;
  } part{address, to};
  sim::with_warp(~0u, part, "ldmatrix", [](Part **lanes) {
    for (int j = 0; j < kMatrices; ++j) {
      uint32_t addresses[8];
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        addresses[row] = lanes[8 * j + row]->address;
        std::memcpy(matrix[row], sim::shared_pointer(addresses[row], 16, 16, "ldmatrix"), 16);
      }
      sim::count_rows(addresses);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint16_t low = kTransposed ? matrix[t][g] : matrix[g][t], high = kTransposed ? matrix[t + 1][g] : matrix[g][t + 1];
        lanes[lane]->to[j] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
#else
  if constexpr (kMatrices == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(address) : "memory");
  } else if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(address) : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address) : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address) : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  }
#endif
}

/* ---- matrix products of a warp: D[16,8] += A[16,K] B[K,8] (layouts in sim/fragments.h) ---- */

#if defined(LMI_SIM)
template <class Element, class Sum>
inline void multiply_in_warp(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  sim::ProductPart<Sum> part{a, b, d};
  sim::with_warp(~0u, part, "mma", [](sim::ProductPart<Sum> **lanes) { sim::multiply_fragments<Element>(lanes); });
}
#endif

/* K = 16, bf16 or f16 */
template <class Element>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(LMI_SIM)
  multiply_in_warp<sim::Bf16>(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <>
__device__ __forceinline__ void multiply<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(LMI_SIM)
  multiply_in_warp<sim::F16>(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* K = 32, int8; sums in int32 */
__device__ __forceinline__ void multiply_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(LMI_SIM)
  multiply_in_warp<sim::S8>(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* K = 32, fp8 (e4m3); sm_89 and later */
__device__ __forceinline__ void multiply_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(LMI_SIM)
  multiply_in_warp<sim::E4m3>(d, a, b);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap(); /* no such instruction: callers choose by compute capability */
#endif
}

/* ---- named barriers: whole warps, num_threads of them in all ---- */

__device__ __forceinline__ void sync_barrier(int id, int num_threads) {
#if defined(LMI_SIM)
  sim::sync_barrier(static_cast<unsigned>(id), static_cast<unsigned>(num_threads));
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#endif
}

__device__ __forceinline__ void arrive_barrier(int id, int num_threads) {
#if defined(LMI_SIM)
  sim::arrive_barrier(static_cast<unsigned>(id), static_cast<unsigned>(num_threads));
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#endif
}

/* ---- between GPUs ---- */

/* *place := value, which lies in memory that several GPUs have mapped. Who sees it there sees what this thread has stored before, and
 * before a barrier its block. */
__device__ __forceinline__ void release_system(uint32_t *place, uint32_t value) {
#if defined(LMI_SIM)
  sim::release(place, value);
#else
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(place), "r"(value) : "memory");
#endif
}

/* Until *place, which another GPU releases, has come to value or gone past it. */
__device__ __forceinline__ void await_system(const uint32_t *place, uint32_t value) {
#if defined(LMI_SIM)
  sim::await(place, value);
#else
  uint32_t seen;
  do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(place) : "memory");
  while (static_cast<int32_t>(seen - value) < 0);
#endif
}

/* ---- arithmetic ---- */

/* 2^x within 2 units in the last place; 0 for -infinity. */
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(LMI_SIM)
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

/* ---- two numbers of a register times two others, subnormal ones too, each rounded ---- */

template <class Element>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);

#if defined(LMI_SIM)
template <class Element>
inline uint32_t multiply_each(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int half = 0; half < 32; half += 16) {
    const Element left{static_cast<uint16_t>(a >> half)}, right{static_cast<uint16_t>(b >> half)};
    product |= static_cast<uint32_t>(from_float<Element>(to_float(left) * to_float(right)).bits) << half;
  }
  return product;
}
#endif

template <>
__device__ __forceinline__ uint32_t multiply_pairs<bf16>(uint32_t a, uint32_t b) {
#if defined(LMI_SIM)
  return multiply_each<bf16>(a, b);
#else
  uint32_t product; /* plus -0, for a product alone asks for sm_90 */
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
#endif
}

template <>
__device__ __forceinline__ uint32_t multiply_pairs<f16>(uint32_t a, uint32_t b) {
#if defined(LMI_SIM)
  return multiply_each<f16>(a, b);
#else
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
#endif
}

}  // namespace lmi::ptx
