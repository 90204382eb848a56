/* Golden tests of the wrappers in cuda/ptx*.cuh: kernels that read words, call wrappers and write words. tests/benchmarks/
 * gpu_golden.py builds this file twice, by nvcc for the GPU at hand and for the stand-in, and compares what the two write on the
 * same random input. A wrapper that no row of the table names fails tests/benchmarks' test. */
#include <string>

#include "cuda/fp8.cuh"
#include "ptx_golden_sm90.cuh"

namespace {

/* ---- asynchronous copies: what a thread waited for is its own; after a barrier, what its neighbour waited for ---- */

__global__ void copies_kernel(const uint32_t *in, uint32_t *out) {
  char *const shared = dynamic_shared<char>();
  const int t = threadIdx.x, next = (t + 1) % kBlock;
  for (int group = 0; group < 2; ++group) {
    const int place = group * kBlock + t;
    ptx::copy_async(ptx::shared_address(shared + 16 * place), in + 4 * place, group == 0 ? 16 : t % 17);
    ptx::commit_copies();
  }
  ptx::wait_copies<1>();
  memcpy(out + 4 * t, shared + 16 * t, 16);
  ptx::wait_copies<0>();
  __syncthreads();
  memcpy(out + 4 * (kBlock + t), shared + 16 * (kBlock + next), 16);
}

/* ---- matrices of 8 x 8: 32 rows of 16 bytes, each lane names one ---- */

template <int kMatrices, bool kTransposed>
__device__ uint32_t *load_into(uint32_t *out, uint32_t address) {
  uint32_t matrices[kMatrices];
  ptx::load_matrices<kMatrices, kTransposed>(matrices, address);
  for (int j = 0; j < kMatrices; ++j) out[j * kWarp + threadIdx.x] = matrices[j];
  return out + kMatrices * kWarp;
}

__global__ void matrices_kernel(const uint32_t *in, uint32_t *out) {
  uint32_t *const shared = dynamic_shared<uint32_t>();
  for (int i = threadIdx.x; i < 4 * kWarp; i += kWarp) shared[i] = in[i];
  __syncthreads();
  const uint32_t address = ptx::shared_address(shared + (5 * threadIdx.x + 3) % kWarp * 4);
  out = load_into<1, false>(out, address);
  out = load_into<1, true>(out, address);
  out = load_into<2, false>(out, address);
  out = load_into<2, true>(out, address);
  out = load_into<4, false>(out, address);
  load_into<4, true>(out, address);
}

/* ---- products: four words of A, two of B, four of D for each lane, word by word ---- */

struct Bf16Product {
  using Sum = float;
  static __device__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::multiply<bf16>(d, a, b); }
};
struct F16Product {
  using Sum = float;
  static __device__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::multiply<f16>(d, a, b); }
};
struct E4m3Product {
  using Sum = float;
  static __device__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::multiply_e4m3(d, a, b); }
};
struct Int8Product {
  using Sum = int32_t;
  static __device__ void run(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::multiply_int8(d, a, b); }
};

template <class Product>
__global__ void product_kernel(const uint32_t *in, uint32_t *out) {
  uint32_t a[4], b[2];
  typename Product::Sum d[4];
  for (int r = 0; r < 4; ++r) a[r] = in[r * kWarp + threadIdx.x];
  for (int r = 0; r < 2; ++r) b[r] = in[(4 + r) * kWarp + threadIdx.x];
  for (int r = 0; r < 4; ++r) memcpy(&d[r], in + (6 + r) * kWarp + threadIdx.x, sizeof d[r]);
  Product::run(d, a, b);
  for (int r = 0; r < 4; ++r) memcpy(out + r * kWarp + threadIdx.x, &d[r], sizeof d[r]);
}

/* ---- named barriers: warp 0 fills twice, the others read; it waits for them in between, they never wait for each other ---- */

__global__ void barriers_kernel(const uint32_t *in, uint32_t *out) {
  uint32_t *const shared = dynamic_shared<uint32_t>();
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x < kWarp) {
      if (turn > 0) ptx::sync_barrier(2, kBlock); /* all have read the turn before */
      shared[threadIdx.x] = in[turn * kWarp + threadIdx.x];
      ptx::arrive_barrier(1, kBlock);
    } else {
      ptx::sync_barrier(1, kBlock);
      out[turn * kBlock + threadIdx.x] = shared[(threadIdx.x + 1) % kWarp];
      if (turn == 0) ptx::arrive_barrier(2, kBlock);
    }
  }
  if (threadIdx.x < kWarp) out[threadIdx.x] = out[kBlock + threadIdx.x] = 0;
}

/* ---- release and await: warp 0 stores and tells, warp 1 waits for it and reads; `out` begins as -1 ---- */

__global__ void release_kernel(const uint32_t *in, uint32_t *out) {
  const int lane = threadIdx.x % kWarp;
  uint32_t *const flag = out, *const stored = out + kWarp, *const read = out + 2 * kWarp;
  if (threadIdx.x < kWarp) {
    stored[lane] = in[lane];
    __syncwarp();
    if (lane == 0) ptx::release_system(flag, 7);
    else flag[lane] = 0;
  } else {
    if (lane == 0) ptx::await_system(flag, 7);
    __syncwarp();
    read[lane] = stored[(lane + 1) % kWarp];
  }
}

__global__ void exp2_kernel(const uint32_t *in, uint32_t *out) {
  float x;
  memcpy(&x, in + threadIdx.x, sizeof x);
  x = ptx::exp2_fast(x);
  memcpy(out + threadIdx.x, &x, sizeof x);
}

/* Four fp8 numbers of each word, all that a byte can be, as bf16 and as f16. */
__global__ void widen_kernel(const uint32_t *in, uint32_t *out) {
  uint32_t to[2];
  widen<bf16>(in[threadIdx.x], to);
  memcpy(out + 4 * threadIdx.x, to, sizeof to);
  widen<f16>(in[threadIdx.x], to);
  memcpy(out + 4 * threadIdx.x + 2, to, sizeof to);
}

/* ---- the table ---- */

const Golden kGoldens[] = {
    {"copies", "shared_address copy_async commit_copies wait_copies", "words", "80", 8 * kBlock, 8 * kBlock,
     run_block<copies_kernel, kBlock, 32 * kBlock>},
    {"ldmatrix", "shared_address load_matrices", "words", "80", 4 * kWarp, 14 * kWarp, run_block<matrices_kernel, kWarp, 16 * kWarp>},
    {"mma bf16", "multiply", "bf16 product", "80", 10 * kWarp, 4 * kWarp, run_block<product_kernel<Bf16Product>, kWarp, 0>},
    {"mma f16", "multiply", "f16 product", "80", 10 * kWarp, 4 * kWarp, run_block<product_kernel<F16Product>, kWarp, 0>},
    {"mma e4m3", "multiply_e4m3", "e4m3 product", "89", 10 * kWarp, 4 * kWarp, run_block<product_kernel<E4m3Product>, kWarp, 0>},
    {"mma int8", "multiply_int8", "int8 product", "80", 10 * kWarp, 4 * kWarp, run_block<product_kernel<Int8Product>, kWarp, 0>},
    {"named barriers", "sync_barrier arrive_barrier", "words", "80", 2 * kWarp, 2 * kBlock, run_block<barriers_kernel, kBlock, 4 * kWarp>},
    {"release and await", "release_system await_system", "words", "80", kWarp, 3 * kWarp, run_block<release_kernel, 2 * kWarp, 0>},
    {"exp2", "exp2_fast", "exponents", "80", kBlock, kBlock, run_block<exp2_kernel, kBlock, 0>},
    {"fp8 widened", "multiply_pairs", "words", "80", kBlock, 4 * kBlock, run_block<widen_kernel, kBlock, 0>},
    LMI_GOLDENS_SM90,
};

#if defined(LMI_SIM)

void run(const Golden &golden, const uint32_t *in, uint32_t *out) { golden.run(in, out); }

#else

void run(const Golden &golden, const uint32_t *in, uint32_t *out) {
  const size_t in_bytes = 4 * static_cast<size_t>(golden.in_words), out_bytes = 4 * static_cast<size_t>(golden.out_words);
  const Scratch device_in(in_bytes, nullptr), device_out(out_bytes, nullptr);
  check_cuda(cudaMemcpy(device_in.as<void>(), in, in_bytes, cudaMemcpyHostToDevice), "input");
  check_cuda(cudaMemset(device_out.as<void>(), 0xff, out_bytes), "output");
  golden.run(device_in.as<uint32_t>(), device_out.as<uint32_t>());
  check_cuda(cudaDeviceSynchronize(), "kernel");
  check_cuda(cudaMemcpy(out, device_out.as<void>(), out_bytes, cudaMemcpyDeviceToHost), "output");
}

#endif

}  // namespace

extern "C" LMI_API int32_t golden_count() { return sizeof kGoldens / sizeof *kGoldens; }

/* name|wrappers|input|capability|in_words|out_words */
extern "C" LMI_API const char *golden_describe(int32_t i) {
  static std::string text;
  const Golden &golden = kGoldens[i];
  text = std::string(golden.name) + "|" + golden.wrappers + "|" + golden.input + "|" + golden.capability + "|" +
         std::to_string(golden.in_words) + "|" + std::to_string(golden.out_words);
  return text.c_str();
}

extern "C" LMI_API lmi_status golden_run(int32_t i, const uint32_t *in, uint32_t *out) {
  return guard(kGoldens[i].name, [&] { run(kGoldens[i], in, out); });
}

extern "C" LMI_API const char *golden_message() { return last_message().c_str(); }

#if defined(LMI_SIM)
extern "C" LMI_API int32_t golden_order(const char *name) { return sim::set_order(name); }
#endif
