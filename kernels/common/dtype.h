/* bf16, fp16 and fp8 (E4M3) to float and back, in integer operations that are the same on every platform and that compilers vectorize.
 * Back is rounded to nearest, ties to even; what is too large becomes infinite, in fp8 its greatest number; NaN stays NaN (quiet). */
#pragma once
#include <cstring>

#include "common/level.h"
#include "lmi_kernels.h"

namespace lmi::LMI_LEVEL {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of_bf16(uint16_t value) { return float_of_bits(static_cast<uint32_t>(value) << 16); }

inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

/* A register at a time: of a few numbers compilers make neither a loop nor vectors. */
inline void bf16_of_floats(const float *from, int64_t n, uint16_t *to) {
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Words bits;
    __builtin_memcpy(&bits, from + i, sizeof bits);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
    const Halves halves = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Halves);
    __builtin_memcpy(to + i, &halves, sizeof halves);
  }
  for (int64_t i = whole; i < n; ++i) to[i] = bf16_of_float(from[i]);
}

inline float float_of_f16(uint16_t value) {
  const uint32_t shifted = (value & 0x7fffu) << 13; /* exponent 15 too small by 112, which the product adds */
  const uint32_t finite = bits_of_float(float_of_bits(shifted) * 0x1p112f);
  const uint32_t bits = shifted >= 0x0f800000u ? shifted | 0x7f800000u : finite;
  return float_of_bits(bits | (static_cast<uint32_t>(value & 0x8000u) << 16));
}

inline uint16_t f16_of_float(float value) {
  const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  /* one unit of 0.5 is the smallest fp16 number, so the addition rounds as wanted */
  const uint32_t small = bits_of_float(float_of_bits(size) + 0.5f) - bits_of_float(0.5f);
  const uint32_t nan = 0x7e00u | ((size >> 13) & 0x3ffu);
  const uint32_t finite = size < (113u << 23) ? small : normal;
  const uint32_t large = size > 0x7f800000u ? nan : 0x7c00u;
  return static_cast<uint16_t>(sign | (size >= 0x477ff000u ? large : finite)); /* 65520 rounds to infinity */
}

inline float float_of_e4m3(uint8_t value) {
  const uint32_t size = value & 0x7fu, sign = static_cast<uint32_t>(value & 0x80u) << 24;
  const uint32_t normal = (size << 20) + (120u << 23);
  /* the mantissa behind 2^-6, which goes away again: no subnormal float, with which some CPUs are slow */
  const uint32_t small = bits_of_float(float_of_bits(121u << 23 | size << 20) - 0x1p-6f);
  const uint32_t finite = size < 8 ? small : normal;
  return float_of_bits(sign | (size == 0x7f ? 0x7fc00000u : finite));
}

inline uint8_t e4m3_of_float(float value) {
  const uint32_t bits = bits_of_float(value), sign = (bits >> 24) & 0x80u, size = bits & 0x7fffffffu;
  const uint32_t normal = (size - (120u << 23) + 0x7ffffu + ((size >> 20) & 1u)) >> 20;
  /* one unit of 2^14 is the smallest number, so the addition rounds as wanted */
  const uint32_t small = bits_of_float(float_of_bits(size) + 0x1p14f) - bits_of_float(0x1p14f);
  const uint32_t finite = size < (121u << 23) ? small : normal;
  const uint32_t large = size > 0x7f800000u ? 0x7fu : 0x7eu;
  return static_cast<uint8_t>(sign | (finite > 0x7eu ? large : finite));
}

/* n numbers of a float dtype to float and back. */
inline void read_floats(const void *from, int32_t dtype, int64_t n, float *to) {
  const uint16_t *halves = static_cast<const uint16_t *>(from);
  const uint8_t *bytes = static_cast<const uint8_t *>(from);
  if (dtype == LMI_F32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == LMI_BF16) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of_bf16(halves[i]);
  } else if (dtype == LMI_F8E4M3) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of_e4m3(bytes[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of_f16(halves[i]);
  }
}

inline void write_floats(const float *from, int32_t dtype, int64_t n, void *to) {
  uint16_t *halves = static_cast<uint16_t *>(to);
  uint8_t *bytes = static_cast<uint8_t *>(to);
  if (dtype == LMI_F32) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == LMI_BF16) {
    bf16_of_floats(from, n, halves);
  } else if (dtype == LMI_F8E4M3) {
    for (int64_t i = 0; i < n; ++i) bytes[i] = e4m3_of_float(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) halves[i] = f16_of_float(from[i]);
  }
}

/* values := what they are after a round trip through dtype. */
inline void round_floats(float *values, int32_t dtype, int64_t n) {
  if (dtype == LMI_BF16) {
    for (int64_t i = 0; i < n; ++i) values[i] = float_of_bf16(bf16_of_float(values[i]));
  } else if (dtype == LMI_F16) {
    for (int64_t i = 0; i < n; ++i) values[i] = float_of_f16(f16_of_float(values[i]));
  }
}

}  // namespace lmi::LMI_LEVEL
