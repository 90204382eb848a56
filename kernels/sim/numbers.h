/* 16-bit and 8-bit floats as CUDA names them. */
#pragma once
#include <cstdint>

#include "common/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return lmi::LMI_LEVEL::float_of_bf16(value.bits); }
inline __nv_bfloat16 __float2bfloat16(float value) { return {lmi::LMI_LEVEL::bf16_of_float(value)}; }
inline float __half2float(__half value) { return lmi::LMI_LEVEL::float_of_f16(value.bits); }
inline __half __float2half(float value) { return {lmi::LMI_LEVEL::f16_of_float(value)}; }

namespace lmi::sim {

/* OCP's other 8-bit floating point, a short fp16. */
inline float float_of_e5m2(uint8_t value) { return lmi::LMI_LEVEL::float_of_f16(static_cast<uint16_t>(value << 8)); }

}  // namespace lmi::sim
