/* Functions of one float, without branches, that compilers vectorize when called in a loop; the same formula at every
 * level. Errors are against double, over all finite floats (tests/kernels/test_activation.py). */
#pragma once
#include "common/dtype.h"

namespace lmi::LMI_LEVEL {

/* e^x within 2 units in the last place; 0 below -86.6, infinite above 88.72. 2^n * e^r, |r| <= ln(2)/2, Taylor to r^7/7!. */
inline float exp_of(float x) {
  const float large = x > 89.0f ? 89.0f : x, bounded = large < -87.0f ? -87.0f : large;
  const float n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;   /* ln 2 in two parts, the first exact in products */
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  /* 2^(n-1), then twice: 2^128 is no float. bounded instead of a NaN keeps the conversion defined; p carries the NaN on. */
  const float finite = n == n ? n : 0.0f;
  const float power = float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(finite) + 126) << 23);
  const float value = p * power * 2.0f;
  const float low = x < -86.6f ? 0.0f : value;
  return x > 88.72283f ? __builtin_inff() : low;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

/* tanh within 2e-7: 1 - 2 / (e^2x + 1), and x - x^3/3 + 2x^5/15 - 17x^7/315 near 0 where the difference would cancel. */
inline float tanh_of(float x) {
  const float square = x * x;
  const float far = 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f);
  const float near = x * (1.0f + square * (-1.0f / 3.0f + square * (2.0f / 15.0f + square * (-17.0f / 315.0f))));
  return square < 0.02f ? near : far;
}

/* erf within 3e-7: Abramowitz and Stegun 7.1.26. */
inline float erf_of(float x) {
  const float size = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * size);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float value = 1.0f - p * t * exp_of(-size * size);
  return x < 0.0f ? -value : value;
}

}  // namespace lmi::LMI_LEVEL
