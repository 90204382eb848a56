/* Golden tests of the wrappers in cuda/ptx_sm90.cuh. */
#pragma once
#include "cuda/tensor_map.cuh"
#include "ptx_golden.cuh"

namespace {

/* ---- barriers in shared memory, bulk copies: two buffers, filled by thread 0 four times and read by the others ---- */

constexpr int kBulkWords = 256, kPhases = 4;

__global__ void mbarriers_kernel(const uint32_t *in, uint32_t *out) {
  uint32_t *const shared = dynamic_shared<uint32_t>();
  const uint32_t buffers = ptx::shared_address(shared), full = buffers + 2 * 4 * kBulkWords, empty = full + 16;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < 2; ++slot) {
      ptx::init_mbarrier(full + 8 * slot, 1);
      ptx::init_mbarrier(empty + 8 * slot, kBlock - kWarp);
    }
    ptx::fence_mbarriers();
  }
  __syncthreads();
  for (int phase = 0; phase < kPhases; ++phase) {
    const int slot = phase % 2, turn = phase / 2;
    if (threadIdx.x == 0) {
      ptx::wait_mbarrier(empty + 8 * slot, turn % 2 ^ 1);
      ptx::arrive_expecting(full + 8 * slot, 4 * kBulkWords);
      for (int half = 0; half < 2; ++half) {
        ptx::copy_bulk(buffers + 4 * kBulkWords * slot + 2 * kBulkWords * half, in + kBulkWords * phase + kBulkWords / 2 * half, 2 * kBulkWords,
                       full + 8 * slot);
      }
    } else if (threadIdx.x >= kWarp) {
      ptx::wait_mbarrier(full + 8 * slot, turn % 2);
      for (int i = threadIdx.x - kWarp; i < kBulkWords; i += kBlock - kWarp) out[kBulkWords * phase + i] = shared[kBulkWords * slot + i];
      ptx::arrive_mbarrier(empty + 8 * slot);
    }
  }
}

/* ---- boxes of 64 x 8 of a tensor [5, 20, 72] of 16-bit numbers, inside and over its ends; and of the same as [100, 72] ---- */

constexpr int kBoxWords = 256, kBoxes = 4;
constexpr int64_t kPlanes = 5, kRows = 20, kColumns = 72;

__global__ void boxes_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap flat, uint32_t *out) {
  uint32_t *const shared = dynamic_shared<uint32_t>();
  const uint32_t to = ptx::shared_address(shared), barrier = to + 4 * kBoxWords * kBoxes;
  if (threadIdx.x == 0) {
    ptx::init_mbarrier(barrier, 1);
    ptx::fence_mbarriers();
    const int inside[] = {0, 3, 1}, over[] = {40, 16, 4}, before[] = {-8, -2, 0}, plain[] = {8, 50};
    ptx::arrive_expecting(barrier, 4 * kBoxWords * kBoxes);
    ptx::copy_box(to, map, inside, barrier);
    ptx::copy_box(to + 4 * kBoxWords, map, over, barrier);
    ptx::copy_box(to + 2 * 4 * kBoxWords, map, before, barrier);
    ptx::copy_box(to + 3 * 4 * kBoxWords, flat, plain, barrier);
  }
  __syncthreads();
  ptx::wait_mbarrier(barrier, 0);
  for (int i = threadIdx.x; i < kBoxWords * kBoxes; i += kBlock) out[i] = shared[i];
}

void run_boxes(const uint32_t *in, uint32_t *out) {
  void *const data = const_cast<uint32_t *>(in);
  const lmi_tensor tensor{data, {kPlanes, kRows, kColumns}, {kRows * kColumns, kColumns, 1}, 3, LMI_BF16};
  const lmi_tensor flat{data, {kPlanes * kRows, kColumns}, {kColumns, 1}, 2, LMI_BF16};
  launch("golden", boxes_kernel, {1, kBlock, 4 * kBoxWords * kBoxes + 8}, nullptr, tensor_map(tensor, {1, 8, 64}), tensor_map(flat, {8, 64}), out);
}

/* ---- matrices from registers to shared memory, zeros over some of them ---- */

template <int kMatrices>
__device__ uint32_t *store_from(const uint32_t *in, uint32_t *shared, uint32_t *out) {
  uint32_t matrices[kMatrices];
  for (int j = 0; j < kMatrices; ++j) matrices[j] = in[j * kWarp + threadIdx.x];
  const int row = (5 * threadIdx.x + 3) % (8 * kMatrices); /* of lanes whose addresses count, each another one */
  ptx::store_matrices(ptx::shared_address(shared + 4 * row), matrices);
  __syncwarp();
  for (int i = threadIdx.x; i < kWarp * kMatrices; i += kWarp) out[i] = shared[i];
  __syncwarp();
  return out + kWarp * kMatrices;
}

__global__ void stores_kernel(const uint32_t *in, uint32_t *out) {
  uint32_t *const shared = dynamic_shared<uint32_t>();
  out = store_from<1>(in, shared, out);
  out = store_from<2>(in, shared, out);
  out = store_from<4>(in, shared, out);
  if (threadIdx.x % 3 == 0) ptx::clear_shared(ptx::shared_address(shared + 4 * threadIdx.x));
  __syncwarp();
  for (int i = threadIdx.x; i < 4 * kWarp; i += kWarp) out[i] = shared[i];
}

/* ---- registers from one warp group to another ---- */

__global__ void __launch_bounds__(3 * kBlock, 1) registers_kernel(const uint32_t *in, uint32_t *out) {
  if (threadIdx.x < kBlock) {
    ptx::give_registers<24>();
    out[threadIdx.x] = in[threadIdx.x];
  } else {
    ptx::take_registers<240>();
    out[threadIdx.x] = in[threadIdx.x] ^ 0x5a5a5a5au;
  }
}

/* ---- products: A[64,32], then B[N,32], or B[32,N] if it is transposed, to D[64,N] row by row ---- */

template <class T, int kN>
constexpr int kProductWords = (64 + kN) * 16;

template <class T>
__device__ T *swizzled(T *matrix, int row, int column) { /* rows of 64 elements */
  return matrix + row * 64 + ((column / 8) ^ (row & 7)) * 8 + column % 8;
}

template <class T, int kN, bool kIsTransposed, bool kInRegisters>
__global__ void __launch_bounds__(kBlock, 1) async_product_kernel(const uint32_t *in, uint32_t *out) {
  T *const a = dynamic_shared<T>(), *const b = a + 64 * 64;
  const T *const from = reinterpret_cast<const T *>(in);
  constexpr int kPanel = 32 * 64; /* elements of 64 transposed columns */
  for (int i = threadIdx.x; i < 64 * 32; i += kBlock) *swizzled(a, i / 32, i % 32) = from[i];
  for (int i = threadIdx.x; i < kN * 32; i += kBlock) {
    if (kIsTransposed) *swizzled(b + i % kN / 64 * kPanel, i / kN, i % kN % 64) = from[64 * 32 + i];
    else *swizzled(b, i / 32, i % 32) = from[64 * 32 + i];
  }
  ptx::fence_async();
  __syncthreads();
  float d[kN / 8][4];
  for (int i = 0; i < kN / 2; ++i) d[i / 4][i % 4] = 1000.0f; /* not added to */
  uint32_t left[2][4];
  const int g = threadIdx.x % 32 / 4 + threadIdx.x / 32 * 16, t = threadIdx.x % 4 * 2;
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < 4; ++r) memcpy(&left[k][r], swizzled(a, g + r % 2 * 8, k * 16 + r / 2 * 8 + t), 4);
  }
  ptx::hold_registers(d);
  ptx::hold_registers(left);
  ptx::fence_products();
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint64_t first = ptx::matrix_at(ptx::shared_address(b), kIsTransposed ? kPanel * 2 : 16);
    const uint64_t right = ptx::matrix_beyond(first, k * (kIsTransposed ? 2048 : 32));
    if constexpr (kInRegisters) ptx::multiply_async<T, kN, kIsTransposed>(d, left[k], right, k > 0);
    else ptx::multiply_async<T, kN, kIsTransposed>(d, ptx::matrix_at(ptx::shared_address(a) + k * 32), right, k > 0);
    ptx::commit_products();
  }
  ptx::wait_products<1>();
  ptx::wait_products<0>();
  ptx::hold_registers(d);
  for (int i = 0; i < kN / 2; ++i) {
    memcpy(out + (g + i / 2 % 2 * 8) * kN + i / 4 * 8 + t + i % 2, &d[i / 4][i % 4], 4);
  }
}

#define LMI_GOLDEN_WGMMA(name, T, N, is_transposed, in_registers)                                                                      \
  {"wgmma " name, "fence_async matrix_at matrix_beyond hold_registers fence_products multiply_async commit_products wait_products", #T, "90+", kProductWords<T, N>, \
   64 * N, run_block<async_product_kernel<T, N, is_transposed, in_registers>, kBlock, 64 * 64 * 2 + N * 64 * 2>}

#define LMI_GOLDENS_SM90                                                                                                      \
  {"mbarriers", "init_mbarrier fence_mbarriers arrive_mbarrier arrive_expecting wait_mbarrier copy_bulk", "words", "90+",     \
   kPhases * kBulkWords, kPhases * kBulkWords, run_block<mbarriers_kernel, kBlock, 2 * 4 * kBulkWords + 32>},                 \
  {"boxes", "init_mbarrier arrive_expecting copy_box wait_mbarrier", "words", "90+", kPlanes * kRows * kColumns / 2,          \
   kBoxWords * kBoxes, run_boxes},                                                                                            \
  {"stmatrix", "store_matrices clear_shared", "words", "90+", 4 * kWarp, 11 * kWarp, run_block<stores_kernel, kWarp, 16 * kWarp>}, \
  {"setmaxnreg", "give_registers take_registers", "words", "90+", 3 * kBlock, 3 * kBlock,                                     \
   run_block<registers_kernel, 3 * kBlock, 0>},                                                                               \
  LMI_GOLDEN_WGMMA("bf16 n8", bf16, 8, false, false), LMI_GOLDEN_WGMMA("bf16 n8, A in registers", bf16, 8, false, true),      \
  LMI_GOLDEN_WGMMA("bf16 n16", bf16, 16, false, false), LMI_GOLDEN_WGMMA("bf16 n16, A in registers", bf16, 16, false, true),  \
  LMI_GOLDEN_WGMMA("bf16 n32", bf16, 32, false, false), LMI_GOLDEN_WGMMA("bf16 n32, A in registers", bf16, 32, false, true),  \
  LMI_GOLDEN_WGMMA("bf16 n64", bf16, 64, false, false), LMI_GOLDEN_WGMMA("bf16 n64, A in registers", bf16, 64, false, true),  \
  LMI_GOLDEN_WGMMA("bf16 n128", bf16, 128, false, false), LMI_GOLDEN_WGMMA("bf16 n128, A in registers", bf16, 128, false, true), \
  LMI_GOLDEN_WGMMA("bf16 n256", bf16, 256, false, false),                                                                     \
  LMI_GOLDEN_WGMMA("bf16 n64, B transposed", bf16, 64, true, false),                                                          \
  LMI_GOLDEN_WGMMA("bf16 n128, B transposed", bf16, 128, true, false),                                                        \
  LMI_GOLDEN_WGMMA("bf16 n128, B transposed, A in registers", bf16, 128, true, true),                                         \
  LMI_GOLDEN_WGMMA("bf16 n256, B transposed", bf16, 256, true, false),                                                        \
  LMI_GOLDEN_WGMMA("f16 n64", f16, 64, false, false),                                                                         \
  LMI_GOLDEN_WGMMA("f16 n64, B transposed, A in registers", f16, 64, true, true)

}  // namespace
