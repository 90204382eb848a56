/* What a golden test of the wrappers in cuda/ptx*.cuh is (ptx_golden.cu): a kernel that reads words, calls wrappers and writes words. */
#pragma once
#include "common/status.h"
#include "cuda/ptx_sm90.cuh"

namespace {

using namespace lmi;

constexpr int kWarp = 32, kBlock = 128;

/* input: what the words of `in` are, gpu_golden.py knows the names. capability: the least that has the instructions, or with a + the
 * only one. run: puts the kernel on the default stream; both pointers are to memory of the device. */
struct Golden {
  const char *name, *wrappers, *input, *capability;
  int in_words, out_words;
  void (*run)(const uint32_t *in, uint32_t *out);
};

template <auto kKernel, int kThreads, int kSharedBytes>
void run_block(const uint32_t *in, uint32_t *out) {
  launch("golden", kKernel, {1, kThreads, kSharedBytes}, nullptr, in, out);
}

}  // namespace
