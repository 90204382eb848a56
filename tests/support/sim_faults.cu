/* Kernels for tests/kernels/test_sim.py, some of them wrong on purpose. Each is `lmi_status name(stream's int32 argument)`: what the
 * argument means stands at the kernel. Results go to `results`. */
#include "common/status.h"
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

using namespace lmi;

extern "C" LMI_API float results[1024];
float results[1024];

namespace {

constexpr unsigned kThreads = 128;
alignas(16) float numbers[1024];

/* ---- barriers ---- */

/* Thread t passes t on to thread t + 1; without the barrier it depends on the order. */
__global__ void rotate_kernel(float *out, int has_barrier) {
  using Values = float[kThreads];
  LMI_SHARED(Values, values);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (has_barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

/* Threads below `limit` alone meet at the barrier while the others wait for them in another. */
__global__ void divergent_kernel(float *, int limit) {
  if (static_cast<int>(threadIdx.x) < limit) __syncthreads();
  else ptx::sync_barrier(1, kThreads);
}

/* Warp 0 fills, the others wait for it by name; a count of half the threads lets them go early. */
__global__ void named_kernel(float *out, int count) {
  float *const value = dynamic_shared<float>();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) *value = 7.0f;
    ptx::arrive_barrier(1, count);
  } else {
    ptx::sync_barrier(1, count);
    out[threadIdx.x] = *value;
  }
}

/* ---- warps ---- */

__global__ void shuffle_kernel(float *out, int) {
  const float own = static_cast<float>(threadIdx.x % 32);
  const bool is_even = threadIdx.x % 2 == 0;
  const unsigned mask = is_even ? 0x55555555u : 0xaaaaaaaau; /* two meetings at a time */
  out[threadIdx.x] = __shfl_xor_sync(mask, own, 2) + 100.0f * __popc(__ballot_sync(mask, own > 9.0f));
  if (is_even) out[threadIdx.x] += __shfl_down_sync(mask, own, 4, 16) * 10000.0f;
  else out[threadIdx.x] += __shfl_up_sync(mask, own, 4, 16) * 10000.0f;
}

__global__ void missing_lane_kernel(float *out, int missing) {
  if (static_cast<int>(threadIdx.x) == missing) return;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}

__global__ void atomic_kernel(float *out, int) {
  using Sums = unsigned[4];
  LMI_SHARED(Sums, sums);
  if (threadIdx.x < 4) sums[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&sums[threadIdx.x % 4], threadIdx.x);
  __syncthreads();
  if (threadIdx.x < 4) out[threadIdx.x] = static_cast<float>(sums[threadIdx.x]);
}

/* ---- shared memory ---- */

/* Reads what nobody wrote. */
__global__ void poison_kernel(float *out, int) { out[threadIdx.x] = dynamic_shared<float>()[threadIdx.x]; }

/* Writes `distance` floats beyond the end. */
__global__ void overrun_kernel(float *, int distance) {
  if (threadIdx.x == 0) dynamic_shared<float>()[kThreads + distance - 1] = 1.0f;
}

/* Reads a matrix that begins `offset` bytes into shared memory. */
__global__ void out_of_bounds_kernel(float *, int offset) {
  uint32_t matrices[1];
  ptx::load_matrices<1>(matrices, ptx::shared_address(dynamic_shared<char>()) + offset);
}

/* Rows `stride` bytes apart. */
__global__ void conflict_kernel(float *, int stride) {
  uint32_t matrices[1];
  ptx::load_matrices<1>(matrices, ptx::shared_address(dynamic_shared<char>()) + threadIdx.x % 8 * stride);
}

/* ---- global memory: lanes `stride` floats apart ---- */

__global__ void stride_kernel(float *out, int stride) {
  float value[1];
  read_floats(numbers + threadIdx.x % 32 * stride, value);
  out[threadIdx.x] = value[0];
}

/* ---- asynchronous copies: two groups, of which `left` may be on their way when the first is read ---- */

__global__ void copy_kernel(float *out, int left) {
  float *const shared = dynamic_shared<float>();
  for (int group = 0; group < 2; ++group) {
    ptx::copy_async(ptx::shared_address(shared + group * 4 * kThreads + 4 * threadIdx.x), numbers + 4 * threadIdx.x, 12);
    ptx::commit_copies();
  }
  if (left == 0) ptx::wait_copies<0>();
  if (left == 1) ptx::wait_copies<1>();
  if (left == 2) ptx::wait_copies<2>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
}

}  // namespace

#define LMI_TEST(name, threads, shared_bytes)                                                                            \
  extern "C" LMI_API lmi_status name(int32_t argument) {                                                                 \
    for (int i = 0; i < 1024; ++i) numbers[i] = static_cast<float>(i);                                                   \
    return guard(#name, [&] { launch(#name, name##_kernel, {1, threads, shared_bytes}, nullptr, results, argument); });  \
  }
LMI_TEST(rotate, kThreads, 0)
LMI_TEST(divergent, kThreads, 0)
LMI_TEST(named, kThreads, 4)
LMI_TEST(shuffle, kThreads, 0)
LMI_TEST(missing_lane, 32, 0)
LMI_TEST(atomic, kThreads, 0)
LMI_TEST(poison, kThreads, 4 * kThreads)
LMI_TEST(overrun, kThreads, 4 * kThreads)
LMI_TEST(out_of_bounds, 32, 128)
LMI_TEST(conflict, 32, 2048)
LMI_TEST(stride, 32, 0)
LMI_TEST(copy, kThreads, 8 * kThreads * 4)

extern "C" LMI_API const char *message() { return last_message().c_str(); }
extern "C" LMI_API int32_t set_order(const char *name) { return sim::set_order(name); }
extern "C" LMI_API void count(uint64_t *counted) {
  counted[0] = sim::counters.bank_conflicts;
  counted[1] = sim::counters.sectors_touched;
  counted[2] = sim::counters.sectors_needed;
  sim::counters = {};
  sim::is_counting = true;
}
