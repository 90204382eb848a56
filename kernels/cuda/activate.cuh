/* The activations of the header, of one float; parameter: of those that have one. */
#pragma once
#include "cuda/device.cuh"

namespace lmi {

/* erf within 4e-7: Abramowitz and Stegun 7.1.26, as the CPU column has it, in 16 PTX instructions where erff takes 27: it is exact where
 * gelu does not need it. */
__device__ __forceinline__ float erf_of(float x) {
  const float size = fabsf(x), t = __fdividef(1.0f, 1.0f + 0.3275911f * size);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return copysignf(1.0f - p * t * __expf(-size * size), x);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float activate(float x, int kind, float parameter = 0.0f) {
  switch (kind) {
    case LMI_SILU: return x * sigmoid(x);
    case LMI_GELU: return 0.5f * x * (1.0f + erf_of(x * 0.70710678f));
    case LMI_GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case LMI_RELU: return x < 0.0f ? 0.0f : x;
    case LMI_QUICK_GELU: return x * sigmoid(1.702f * x);
    case LMI_SOFT_CAP: return parameter * tanhf(x / parameter);
    case LMI_CLAMP: return x > parameter ? parameter : x < -parameter ? -parameter : x; /* a NaN stays one */
    case LMI_SCALE: return parameter * x;
    default: return x;
  }
}

}  // namespace lmi
