/* The activations of the header, of one float; parameter: of those that have one. */
#pragma once
#include "cuda/device.cuh"

namespace lmi {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float activate(float x, int kind, float parameter = 0.0f) {
  switch (kind) {
    case LMI_SILU: return x * sigmoid(x);
    case LMI_GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
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
