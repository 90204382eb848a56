/* Instructions of sm_90 and sm_90a (Hopper) that C++ has no words for, as ptx.cuh has those of sm_80: barriers in shared memory, the
 * copy engine (TMA), products of four warps (wgmma). Kernels that use them are compiled where LMI_HAS_SM90A is set and chosen where
 * the device has compute capability 9.0. */
#pragma once
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.cuh"
#if defined(LMI_SIM)
#include "sim/mbarrier.h"
#include "sim/products.h"
#endif

#if defined(LMI_SIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LMI_HAS_SM90A 1
#else
#define LMI_HAS_SM90A 0 /* another GPU's pass of the compiler, or the host's: bodies are empty */
#endif

namespace lmi::ptx {

constexpr unsigned kGroupThreads = 128; /* four warps, from a multiple of four on: a warp group */

/* ---- barriers in shared memory: 8 bytes that count arrivals and landed bytes, phase by phase ---- */

__device__ __forceinline__ void init_mbarrier(uint32_t barrier, int num_arrivals) {
#if defined(LMI_SIM)
  sim::init_mbarrier(barrier, static_cast<unsigned>(num_arrivals));
#elif LMI_HAS_SM90A
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
#endif
}

/* After this thread's init_mbarrier, before __syncthreads: the copy engine knows the barriers, too. */
__device__ __forceinline__ void fence_mbarriers() {
#if defined(LMI_SIM)
  sim::fence_mbarriers();
#elif LMI_HAS_SM90A
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive_mbarrier(uint32_t barrier) {
#if defined(LMI_SIM)
  sim::arrive_mbarrier(barrier, 0);
#elif LMI_HAS_SM90A
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

/* Arrives and announces bytes that copies will bring in this phase. */
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int num_bytes) {
#if defined(LMI_SIM)
  sim::arrive_mbarrier(barrier, num_bytes);
#elif LMI_HAS_SM90A
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
#endif
}

/* Until the phase of this parity (0 for the first, then 1, 0, ...) is complete; the one before the first counts as complete. */
__device__ __forceinline__ void wait_mbarrier(uint32_t barrier, int parity) {
#if defined(LMI_SIM)
  sim::wait_mbarrier(barrier, static_cast<unsigned>(parity));
#elif LMI_HAS_SM90A
  uint32_t is_complete;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(is_complete) : "r"(barrier), "r"(parity) : "memory");
  } while (!is_complete);
#endif
}

/* What this thread wrote to shared memory is seen by the copy engine and by wgmma after the next barrier. */
__device__ __forceinline__ void fence_async() {
#if defined(LMI_SIM)
  sim::fence_written();
#elif LMI_HAS_SM90A
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* ---- copies by the copy engine; they tell an mbarrier how many bytes have landed ---- */

/* num_bytes (of 16) that lie together. */
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int num_bytes, uint32_t barrier) {
#if defined(LMI_SIM)
  sim::copy_bulk(to, from, static_cast<unsigned>(num_bytes), barrier);
#elif LMI_HAS_SM90A
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(num_bytes),
               "r"(barrier) : "memory");
#endif
}

/* The map's box from these coordinates on, the innermost first; zeros where it leaves the tensor. All of the box's bytes count. */
template <int kDims>
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap &map, const int (&at)[kDims], uint32_t barrier) {
  static_assert(kDims >= 2 && kDims <= 4, "tensors of 2 to 4 dimensions");
#if defined(LMI_SIM)
  sim::copy_box(to, map, at, kDims, barrier);
#elif LMI_HAS_SM90A
  if constexpr (kDims == 2) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1]) : "memory");
  } else if constexpr (kDims == 3) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
  }
#endif
}

/* ---- 8 x 8 matrices of 16-bit elements from registers to shared memory: load_matrices the other way ---- */

template <int kMatrices>
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&from)[kMatrices]) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "stmatrix takes 1, 2 or 4");
#if defined(LMI_SIM)
  struct Part {
    uint32_t address;
    const uint32_t *from;
  } part{address, from};
  sim::with_warp(~0u, part, "stmatrix", [](Part **lanes) {
    for (int j = 0; j < kMatrices; ++j) {
      uint32_t addresses[8];
      for (int row = 0; row < 8; ++row) {
        addresses[row] = lanes[8 * j + row]->address;
        uint32_t words[4];
        for (int t = 0; t < 4; ++t) words[t] = lanes[4 * row + t]->from[j];
        std::memcpy(sim::shared_pointer(addresses[row], 16, 16, "stmatrix"), words, 16);
        sim::mark_written(addresses[row], 16);
      }
      sim::count_rows(addresses);
    }
  });
#elif LMI_HAS_SM90A
  if constexpr (kMatrices == 1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(address), "r"(from[0]) : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(from[0]), "r"(from[1]) : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(from[0]), "r"(from[1]), "r"(from[2]),
                 "r"(from[3]) : "memory");
  }
#endif
}

/* 16 bytes of zeros, which fence_async covers as what other wrappers write. */
__device__ __forceinline__ void clear_shared(uint32_t address) {
#if defined(LMI_SIM)
  std::memset(sim::shared_pointer(address, 16, 16, "st.shared"), 0, 16);
  sim::mark_written(address, 16);
#elif LMI_HAS_SM90A
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
#endif
}

/* ---- registers of a warp group: some give what others take; all four warps, in one branch of an if ---- */

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if defined(LMI_SIM)
  sim::set_registers(kRegisters);
#elif LMI_HAS_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if defined(LMI_SIM)
  sim::set_registers(kRegisters);
#elif LMI_HAS_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

/* ---- products of a warp group: D[64,N] += A[64,16] B[16,N], bf16 or f16, sums in float (layouts in sim/products.h) ---- */

/* A matrix in shared memory, from a border of 1024 bytes on: rows of 128 bytes one behind the other, as copy_box lays them down
 * with a swizzled map; `address` may be further on in its first row, by multiples of 32 bytes, or by whole eights of rows. Of a
 * transposed B (whose rows run along N), the next 64 columns lie `leading` bytes further. */
__device__ __forceinline__ uint64_t matrix_at(uint32_t address, uint32_t leading = 16) {
  constexpr uint64_t kStride = 1024 / 16, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | kStride << 32 | kSwizzle128 << 62;
}

/* The one so many bytes further. */
__device__ __forceinline__ uint64_t matrix_beyond(uint64_t matrix, uint32_t num_bytes) { return matrix + (num_bytes >> 4); }

/* The compiler knows nothing of products on their way: it must not move what reads or writes these registers across this point,
 * which stands behind a wait, or before a fence where they were written. */
template <class Register, int kNum>
__device__ __forceinline__ void hold_registers(Register (&registers)[kNum][4]) {
#if defined(LMI_SIM)
  (void)registers;
#elif LMI_HAS_SM90A
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
    if constexpr (std::is_same_v<Register, float>) {
      asm volatile("" : "+f"(registers[i][0]), "+f"(registers[i][1]), "+f"(registers[i][2]), "+f"(registers[i][3])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i][0]), "+r"(registers[i][1]), "+r"(registers[i][2]), "+r"(registers[i][3])::"memory");
    }
  }
#endif
}

/* Before the first product, and between any other use of D's or A's registers and the next one. */
__device__ __forceinline__ void fence_products() {
#if defined(LMI_SIM)
  sim::current->products.fence();
#elif LMI_HAS_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void commit_products() {
#if defined(LMI_SIM)
  sim::current->products.commit();
#elif LMI_HAS_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/* Until at most kLeft groups of products are on their way. Of others neither D nor A, in registers or in shared memory, may be
 * touched. */
template <int kLeft>
__device__ __forceinline__ void wait_products() {
#if defined(LMI_SIM)
  sim::current->products.wait(kLeft);
#elif LMI_HAS_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

#if defined(LMI_SIM)
template <class T, int kN>
inline void add_product(float (&d)[kN / 8][4], uint64_t a, const uint32_t *a_registers, uint64_t b, bool is_added, bool is_b_transposed) {
  using Element = std::conditional_t<std::is_same_v<T, bf16>, sim::Bf16, sim::F16>;
  sim::Product product{a, b, a_registers, &d[0][0], kN, is_b_transposed, is_added, [](uint32_t bits) { return Element::number(bits); }};
  sim::current->products.add(std::move(product));
}
#elif LMI_HAS_SM90A
/* Operands %0 to %(N/2 - 1) are D; what follows is numbered from N/2 on. */
#define LMI_NAMES_4 "%0, %1, %2, %3"
#define LMI_NAMES_8 LMI_NAMES_4 ", %4, %5, %6, %7"
#define LMI_NAMES_16 LMI_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LMI_NAMES_32 LMI_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LMI_NAMES_64                                                                                                   \
  LMI_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
               "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LMI_NAMES_128                                                                                                     \
  LMI_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "   \
               "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
               "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "   \
               "%121, %122, %123, %124, %125, %126, %127"
#define LMI_SUMS_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define LMI_SUMS_8(i) LMI_SUMS_4(i), LMI_SUMS_4(i + 1)
#define LMI_SUMS_16(i) LMI_SUMS_8(i), LMI_SUMS_8(i + 2)
#define LMI_SUMS_32(i) LMI_SUMS_16(i), LMI_SUMS_16(i + 4)
#define LMI_SUMS_64(i) LMI_SUMS_32(i), LMI_SUMS_32(i + 8)
#define LMI_SUMS_128(i) LMI_SUMS_64(i), LMI_SUMS_64(i + 16)

/* kind: of elements; columns: N; sums: N/2; p: of D's operands on, by number */
#define LMI_WGMMA_SHARED(kind, columns, sums, p, q, r, is_transposed)                                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" r ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." kind "." kind    \
               " {" LMI_NAMES_##sums "}, %" p ", %" q ", p, 1, 1, 0, " is_transposed ";\n}"                                         \
               : LMI_SUMS_##sums(0) : "l"(a), "l"(b), "r"(static_cast<int>(is_added)))
#define LMI_WGMMA_REGISTERS(kind, columns, sums, p, q, r, s, t, u, is_transposed)                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" u ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." kind "." kind    \
               " {" LMI_NAMES_##sums "}, {%" p ", %" q ", %" r ", %" s "}, %" t ", p, 1, 1, " is_transposed ";\n}"                  \
               : LMI_SUMS_##sums(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(is_added)))
#define LMI_BY_KIND(wgmma, ...)                                                \
  if constexpr (std::is_same_v<T, bf16> && !kIsTransposed) {                   \
    wgmma("bf16", __VA_ARGS__, "0");                                           \
  } else if constexpr (std::is_same_v<T, bf16>) {                              \
    wgmma("bf16", __VA_ARGS__, "1");                                           \
  } else if constexpr (!kIsTransposed) {                                       \
    wgmma("f16", __VA_ARGS__, "0");                                            \
  } else {                                                                     \
    wgmma("f16", __VA_ARGS__, "1");                                            \
  }
#endif

template <int kN>
constexpr bool is_product_width = kN == 8 || kN == 16 || kN == 32 || kN == 64 || kN == 128 || kN == 256;

/* A and B in shared memory, matrix_at: rows of A and of B run along K; of B with kIsTransposed along N. is_added: onto D, else in
 * its place; the same for all threads. */
template <class T, int kN, bool kIsTransposed = false>
__device__ __forceinline__ void multiply_async(float (&d)[kN / 8][4], uint64_t a, uint64_t b, bool is_added) {
  static_assert(is_product_width<kN>, "8 to 256, powers of two");
#if defined(LMI_SIM)
  add_product<T, kN>(d, a, nullptr, b, is_added, kIsTransposed);
#elif LMI_HAS_SM90A
  if constexpr (kN == 8) {
    LMI_BY_KIND(LMI_WGMMA_SHARED, "8", 4, "4", "5", "6")
  } else if constexpr (kN == 16) {
    LMI_BY_KIND(LMI_WGMMA_SHARED, "16", 8, "8", "9", "10")
  } else if constexpr (kN == 32) {
    LMI_BY_KIND(LMI_WGMMA_SHARED, "32", 16, "16", "17", "18")
  } else if constexpr (kN == 64) {
    LMI_BY_KIND(LMI_WGMMA_SHARED, "64", 32, "32", "33", "34")
  } else if constexpr (kN == 128) {
    LMI_BY_KIND(LMI_WGMMA_SHARED, "128", 64, "64", "65", "66")
  } else {
    LMI_BY_KIND(LMI_WGMMA_SHARED, "256", 128, "128", "129", "130")
  }
#endif
}

/* A in registers: those of mma.sync for each warp's 16 rows. They must stay as they are until the wait. */
template <class T, int kN, bool kIsTransposed = false>
__device__ __forceinline__ void multiply_async(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool is_added) {
  static_assert(is_product_width<kN>, "8 to 256, powers of two");
#if defined(LMI_SIM)
  add_product<T, kN>(d, 0, a, b, is_added, kIsTransposed);
#elif LMI_HAS_SM90A
  if constexpr (kN == 8) {
    LMI_BY_KIND(LMI_WGMMA_REGISTERS, "8", 4, "4", "5", "6", "7", "8", "9")
  } else if constexpr (kN == 16) {
    LMI_BY_KIND(LMI_WGMMA_REGISTERS, "16", 8, "8", "9", "10", "11", "12", "13")
  } else if constexpr (kN == 32) {
    LMI_BY_KIND(LMI_WGMMA_REGISTERS, "32", 16, "16", "17", "18", "19", "20", "21")
  } else if constexpr (kN == 64) {
    LMI_BY_KIND(LMI_WGMMA_REGISTERS, "64", 32, "32", "33", "34", "35", "36", "37")
  } else if constexpr (kN == 128) {
    LMI_BY_KIND(LMI_WGMMA_REGISTERS, "128", 64, "64", "65", "66", "67", "68", "69")
  } else {
    LMI_BY_KIND(LMI_WGMMA_REGISTERS, "256", 128, "128", "129", "130", "131", "132", "133")
  }
#endif
}

}  // namespace lmi::ptx
