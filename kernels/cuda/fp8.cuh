/* fp8 (E4M3, see the header) on a GPU, in integers: the same on every one, since those before sm_89 have no instruction for it. */
#pragma once
#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

namespace lmi {

struct e4m3 {
  uint8_t bits;
};

__device__ __forceinline__ float to_float(e4m3 value) {
  const uint32_t size = value.bits & 0x7fu, sign = (value.bits & 0x80u) << 24;
  const uint32_t normal = (size << 20) + (120u << 23), small = __float_as_uint(static_cast<float>(size) * 0x1p-9f);
  return __uint_as_float(sign | (size == 0x7f ? 0x7fc00000u : size < 8 ? small : normal));
}

template <>
__device__ __forceinline__ e4m3 from_float<e4m3>(float value) {
  const uint32_t bits = __float_as_uint(value), sign = (bits >> 24) & 0x80u, size = bits & 0x7fffffffu;
  const uint32_t normal = (size - (120u << 23) + 0x7ffffu + ((size >> 20) & 1u)) >> 20;
  /* one unit of 2^14 is the smallest number, so the addition rounds as wanted */
  const uint32_t small = __float_as_uint(__uint_as_float(size) + 0x1p14f) - __float_as_uint(0x1p14f);
  const uint32_t finite = size < (121u << 23) ? small : normal, large = size > 0x7f800000u ? 0x7fu : 0x7eu;
  return {static_cast<uint8_t>(sign | (finite > 0x7eu ? large : finite))};
}

/* fn(T(), Cached()) for the types behind a float dtype and that of caches, the same or F8E4M3. */
template <class Function>
void with_cached(int32_t dtype, int32_t cached, Function fn) {
  with_dtype(dtype, [&](auto zero) {
    if (cached == LMI_F8E4M3) fn(zero, e4m3());
    else fn(zero, zero);
  });
}

/* How T's bits follow from fp8's: the mantissa starts at bit kShift, and a product with kBase moves the exponent's base. Exact, since
 * these products take and give subnormal numbers. */
template <class T>
struct Widening;
template <>
struct Widening<bf16> {
  static constexpr int kShift = 4;
  static constexpr uint32_t kBase = 0x7b807b80; /* 2^120, twice */
};
template <>
struct Widening<f16> {
  static constexpr int kShift = 7;
  static constexpr uint32_t kBase = 0x5c005c00; /* 2^8, twice */
};

/* Two fp8 numbers, each in the upper half of 16 bits, as two of T. */
template <class T>
__device__ __forceinline__ uint32_t widen_pair(uint32_t bytes, uint32_t nans) {
  const uint32_t sign = bytes & 0x80008000u, size = (bytes & 0x7f007f00u) >> (8 - Widening<T>::kShift);
  return ptx::multiply_pairs<T>(sign | size, Widening<T>::kBase) | (nans >> 15) * 0x7fffu;
}

/* Four fp8 numbers, the first in the low byte, as four of T. */
template <class T>
__device__ __forceinline__ void widen(uint32_t bytes, uint32_t (&to)[2]) {
  const uint32_t nans = ((bytes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
  to[0] = widen_pair<T>(__byte_perm(bytes, 0, 0x1404), __byte_perm(nans, 0, 0x1404));
  to[1] = widen_pair<T>(__byte_perm(bytes, 0, 0x3424), __byte_perm(nans, 0, 0x3424));
}

}  // namespace lmi
