/* The sources of an operation are compiled once for each instruction level (base, avx2, avx512, avx512bf16, amx) with LMI_LEVEL as
 * the name of its namespace. Everything inline that such a source uses must be in that namespace: one symbol compiled twice would let the
 * linker run AVX-512 code on a machine that has none. (For inline code of the standard library, which we cannot rename, the
 * base objects come first on the link line, and the linker keeps the first.) */
#pragma once
#include <cstdint>

#ifndef LMI_LEVEL
#error "LMI_LEVEL must name the instruction level"
#endif

namespace lmi::LMI_LEVEL {

/* float lanes of one register */
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

/* One register, in the compilers' own vector types: + - * compare and shift work lane by lane. */
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

/* memcpy is the load and store that is allowed at any address */
inline Vector load(const float *from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline Words load(const uint32_t *from) {
  Words value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float *to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

/* Sum of the lanes, halves onto halves. */
inline float sum_of_lanes(Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

/* sum_i a[i] b[i]: one accumulator a lane, i ascending; the rest, fewer than kLanes, is added last. */
inline float dot(const float *a, const float *b, int64_t n) {
  Vector sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(a + i) * load(b + i);
  float total = sum_of_lanes(sum);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace lmi::LMI_LEVEL
