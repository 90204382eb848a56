/* values := act(values), for the activations of the header; parameter: of those that have one. */
#pragma once
#include "common/math.h"

namespace lmi::LMI_LEVEL {

inline float silu(float x) { return x * sigmoid(x); }
inline float gelu(float x) { return 0.5f * x * (1.0f + erf_of(x * 0.70710678f)); }
inline float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanh_of(0.79788456f * (x + 0.044715f * x * x * x))); }
inline float quick_gelu(float x) { return x * sigmoid(1.702f * x); }
inline float relu(float x) { return x < 0.0f ? 0.0f : x; }
inline float clamp(float x, float most) {
  const float bounded = x > most ? most : x; /* a NaN stays one */
  return bounded < -most ? -most : bounded;
}

template <class Function>
void map_floats(float *values, int64_t n, Function fn) {
  for (int64_t i = 0; i < n; ++i) values[i] = fn(values[i]);
}

inline void activate(float *values, int64_t n, int32_t kind, float parameter = 0.0f) {
  switch (kind) {
    case LMI_SILU: return map_floats(values, n, [](float x) { return silu(x); });
    case LMI_GELU: return map_floats(values, n, [](float x) { return gelu(x); });
    case LMI_GELU_TANH: return map_floats(values, n, [](float x) { return gelu_tanh(x); });
    case LMI_RELU: return map_floats(values, n, [](float x) { return relu(x); });
    case LMI_QUICK_GELU: return map_floats(values, n, [](float x) { return quick_gelu(x); });
    case LMI_SOFT_CAP: return map_floats(values, n, [=](float x) { return parameter * tanh_of(x / parameter); });
    case LMI_CLAMP: return map_floats(values, n, [=](float x) { return clamp(x, parameter); });
    case LMI_SCALE: return map_floats(values, n, [=](float x) { return parameter * x; });
    default: return;
  }
}

}  // namespace lmi::LMI_LEVEL
