/* Kernels for tests/kernels/test_sim_sm90.py, some of them wrong on purpose, as sim_faults.cu has them. */
#include "common/status.h"
#include "cuda/ptx_sm90.cuh"
#include "cuda/tensor_map.cuh"

using namespace lmi;

extern "C" LMI_API float results[64 * 256];
float results[64 * 256];

namespace {

constexpr unsigned kThreads = 128;
constexpr int kNumbers = 1 << 14;
alignas(64) bf16 numbers[kNumbers]; /* number i is i % 251 - 125 */
alignas(64) f16 halves[kNumbers];

template <class T>
const T *source() {
  if constexpr (std::is_same_v<T, bf16>) return numbers;
  else return halves;
}

/* ---- barriers in shared memory ---- */

enum { kRight, kWrongPhase, kEarly, kLate, kNoInit, kOverwritten };

/* Warp 0 writes a number in each of four phases, in which the others read it. */
__global__ void phases_kernel(float *out, int fault) {
  float *const value = dynamic_shared<float>();
  const uint32_t full = ptx::shared_address(value + 2), empty = full + 8;
  if (threadIdx.x == 0 && fault != kNoInit) {
    ptx::init_mbarrier(full, 1);
    ptx::init_mbarrier(empty, fault == kEarly ? 32 : fault == kLate ? 97 : 96);
  }
  __syncthreads();
  if (threadIdx.x == 0 && fault == kOverwritten) value[2] = 0.0f;
  for (int phase = 0; phase < 4; ++phase) {
    if (threadIdx.x == 0) {
      ptx::wait_mbarrier(empty, phase % 2 ^ 1);
      *value = static_cast<float>(10 * phase + 1);
      ptx::arrive_mbarrier(full);
    } else if (threadIdx.x >= 32) {
      ptx::wait_mbarrier(full, phase % 2 ^ (fault == kWrongPhase));
      out[phase * kThreads + threadIdx.x] = *value;
      ptx::arrive_mbarrier(empty);
    }
  }
}

/* ---- copies ---- */

enum { kUnfenced = 10, kNoWait, kFewerBytes, kMoreBytes, kOddBytes, kUnfencedWrite, kFencedWrite, kLeft, kTwice };

/* 1024 bytes by two copies. */
__global__ void bulk_kernel(float *out, int fault) {
  bf16 *const shared = dynamic_shared<bf16>();
  const uint32_t to = ptx::shared_address(shared), barrier = to + 1024;
  if (threadIdx.x == 0) {
    ptx::init_mbarrier(barrier, 1);
    if (fault != kUnfenced) ptx::fence_mbarriers();
  }
  if (fault == kUnfencedWrite || fault == kFencedWrite) ptx::clear_shared(to + threadIdx.x % 64 * 16);
  if (fault == kFencedWrite) ptx::fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::arrive_expecting(barrier, 1024 + (fault == kMoreBytes ? 16 : fault == kFewerBytes ? -16 : 0));
    if (fault == kTwice) ptx::arrive_mbarrier(barrier);
    ptx::copy_bulk(to, numbers, fault == kOddBytes ? 520 : 512, barrier);
    ptx::copy_bulk(to + 512, numbers + 256, 512, barrier);
  }
  if (fault == kLeft) return;
  if (fault != kNoWait) ptx::wait_mbarrier(barrier, 0);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = to_float(shared[4 * threadIdx.x + i]);
  if (fault == kNoWait) ptx::wait_mbarrier(barrier, 0);
}

/* Boxes of 64 x 8 of a tensor [5, 20, 72]; corner: the numbers' index of the first element, out of bounds or not. */
__global__ void box_kernel(float *out, const __grid_constant__ TensorMap map, int column, int row, int plane) {
  bf16 *const shared = dynamic_shared<bf16>();
  const uint32_t to = ptx::shared_address(shared), barrier = to + 1024;
  if (threadIdx.x == 0) {
    ptx::init_mbarrier(barrier, 1);
    ptx::fence_mbarriers();
    const int at[] = {column, row, plane};
    ptx::arrive_expecting(barrier, 1024);
    ptx::copy_box(to, map, at, barrier);
  }
  __syncthreads();
  ptx::wait_mbarrier(barrier, 0);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = to_float(shared[4 * threadIdx.x + i]);
}

/* ---- matrices ---- */

/* Four matrices from registers to shared memory and back, transposed by the way. */
__global__ void matrices_kernel(float *out, int) {
  bf16 *const shared = dynamic_shared<bf16>();
  const int lane = threadIdx.x;
  uint32_t there[4], back[4];
  for (int j = 0; j < 4; ++j) there[j] = static_cast<uint32_t>(lane * 8 + j * 2) | static_cast<uint32_t>(lane * 8 + j * 2 + 1) << 16;
  ptx::store_matrices(ptx::shared_address(shared + lane * 8), there);
  __syncwarp();
  ptx::load_matrices<4, true>(back, ptx::shared_address(shared + lane * 8));
  for (int j = 0; j < 4; ++j) {
    out[lane * 8 + j * 2] = static_cast<float>(back[j] & 0xffff);
    out[lane * 8 + j * 2 + 1] = static_cast<float>(back[j] >> 16);
  }
}

/* ---- products: A[64,32] is numbers 0 .. and B [N,32], or [32,N] if it is transposed, numbers 2048 .. ---- */

enum { kNoFence = 20, kNoProxyFence, kNoCommit, kEarlyRead, kEarlyWrite, kLateLeft, kFewLanes, kOneWait, kDifferent };

template <class T>
__device__ T *swizzled(T *matrix, int row, int column) { /* rows of 64 elements */
  return matrix + row * 64 + ((column / 8) ^ (row & 7)) * 8 + column % 8;
}

template <class T, int kN, bool kIsTransposed, bool kInRegisters>
__global__ void products_kernel(float *out, int fault) {
  T *const a = dynamic_shared<T>(), *const b = a + 64 * 64;
  constexpr int kPanel = 32 * 64; /* elements of 64 transposed columns */
  if (threadIdx.x == 0) ptx::clear_shared(ptx::shared_address(swizzled(a, 63, 0))); /* of plain writes the stand-in does not know */
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * 32; i += kThreads) *swizzled(a, i / 32, i % 32) = source<T>()[i];
  for (int i = threadIdx.x; i < kN * 32; i += kThreads) {
    const T value = source<T>()[2048 + i];
    if (kIsTransposed) *swizzled(b + i % kN / 64 * kPanel, i / kN, i % kN % 64) = value;
    else *swizzled(b, i / 32, i % 32) = value;
  }
  if (fault != kNoProxyFence) ptx::fence_async();
  __syncthreads();
  if (fault == kFewLanes && threadIdx.x == 77) return;
  float d[kN / 8][4];
  for (int i = 0; i < kN / 8; ++i) d[i][0] = d[i][1] = d[i][2] = d[i][3] = 1000.0f;
  uint32_t left[2][4];
  const int g = threadIdx.x % 32 / 4 + threadIdx.x / 32 * 16, t = threadIdx.x % 4 * 2;
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < 4; ++r) memcpy(&left[k][r], swizzled(a, g + r % 2 * 8, k * 16 + r / 2 * 8 + t), 4);
  }
  if (fault != kNoFence) ptx::fence_products();
  for (int k = 0; k < 2; ++k) {
    const uint32_t shift = fault == kDifferent && threadIdx.x >= 96 ? 64 : 0;
    const uint64_t right = kIsTransposed ? ptx::matrix_at(ptx::shared_address(b) + k * 2048, kPanel * 2) : ptx::matrix_at(ptx::shared_address(b) + k * 32 + shift);
    const bool is_added = k > 0;
    if constexpr (kInRegisters) ptx::multiply_async<T, kN, kIsTransposed>(d, left[k], right, is_added);
    else ptx::multiply_async<T, kN, kIsTransposed>(d, ptx::matrix_at(ptx::shared_address(a) + k * 32), right, is_added);
    if (fault != kNoCommit && (k == 1 || fault == kOneWait)) ptx::commit_products();
  }
  if (fault == kEarlyRead) out[0] = d[0][0];
  if (fault == kEarlyWrite) d[0][0] = 1.0f;
  if (fault == kLateLeft) left[1][0] ^= 1;
  if (fault == kOneWait) ptx::wait_products<1>();
  else ptx::wait_products<0>();
  for (int i = 0; i < kN / 2; ++i) {
    const int row = g + i / 2 % 2 * 8, column = i / 4 * 8 + t + i % 2;
    out[row * kN + column] = fault == kEarlyRead ? out[0] : d[i / 4][i % 4];
  }
  ptx::wait_products<0>();
}

/* ---- registers ---- */

__global__ void registers_kernel(float *, int fault) {
  if (threadIdx.x < 128) ptx::give_registers<24>();
  else if (fault == 0) ptx::take_registers<240>();
  else if (fault == 1) ptx::take_registers<256>();
  else if (threadIdx.x != 200) ptx::take_registers<240>();
}

template <class Launch>
lmi_status run(const char *name, Launch launch) {
  for (int i = 0; i < kNumbers; ++i) {
    numbers[i] = from_float<bf16>(static_cast<float>(i % 251 - 125));
    halves[i] = from_float<f16>(static_cast<float>(i % 251 - 125));
  }
  return guard(name, launch);
}

template <class T, int kN>
void products(int fault, bool is_transposed, bool in_registers) {
  const Shape shape{1, kThreads, 64 * 64 * 2 + kN * 64 * 2};
  if constexpr (kN >= 64) {
    if (is_transposed && in_registers) return launch("products", products_kernel<T, kN, true, true>, shape, nullptr, results, fault);
    if (is_transposed) return launch("products", products_kernel<T, kN, true, false>, shape, nullptr, results, fault);
  }
  if (in_registers) return launch("products", products_kernel<T, kN, false, true>, shape, nullptr, results, fault);
  launch("products", products_kernel<T, kN, false, false>, shape, nullptr, results, fault);
}

template <class T>
void products_of(int columns, int fault, bool is_transposed, bool in_registers) {
  if (columns == 8) products<T, 8>(fault, is_transposed, in_registers);
  else if (columns == 16) products<T, 16>(fault, is_transposed, in_registers);
  else if (columns == 32) products<T, 32>(fault, is_transposed, in_registers);
  else if (columns == 64) products<T, 64>(fault, is_transposed, in_registers);
  else if (columns == 128) products<T, 128>(fault, is_transposed, in_registers);
  else products<T, 256>(fault, is_transposed, in_registers);
}

}  // namespace

#define LMI_TEST(name, threads, shared_bytes)                                                                               \
  extern "C" LMI_API lmi_status name(int32_t argument) {                                                                    \
    return run(#name, [&] { launch(#name, name##_kernel, {1, threads, shared_bytes}, nullptr, results, argument); });       \
  }
LMI_TEST(phases, kThreads, 24)
LMI_TEST(bulk, kThreads, 1032)
LMI_TEST(matrices, 32, 512)
LMI_TEST(registers, 3 * kThreads, 0)

/* argument: column + 1000 row + 1000000 plane, each by 100 more than it is */
extern "C" LMI_API lmi_status box(int32_t argument) {
  return run("box", [&] {
    const lmi_tensor tensor{numbers, {5, 20, 72}, {20 * 72, 72, 1}, 3, LMI_BF16};
    launch("box", box_kernel, {1, kThreads, 1032}, nullptr, results, tensor_map(tensor, {1, 8, 64}), argument % 1000 - 100,
           argument / 1000 % 1000 - 100, argument / 1000000 - 100);
  });
}

/* argument: N + 1000 fault + 100000 (1: transposed + 2: in registers + 4: fp16) */
extern "C" LMI_API lmi_status products(int32_t argument) {
  return run("products", [&] {
    const int kind = argument / 100000, fault = argument / 1000 % 100, columns = argument % 1000;
    if (kind & 4) products_of<f16>(columns, fault, kind & 1, kind & 2);
    else products_of<bf16>(columns, fault, kind & 1, kind & 2);
  });
}

extern "C" LMI_API lmi_status refused_map(int32_t stride) {
  return run("refused_map", [&] { tensor_map({numbers, {20, 72}, {stride, 1}, 2, LMI_BF16}, {8, 64}); });
}

extern "C" LMI_API const char *message() { return last_message().c_str(); }
extern "C" LMI_API int32_t set_order(const char *name) { return sim::set_order(name); }
