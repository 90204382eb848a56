/* Of linear.cc: weight formats at every level. How a column (linear_layout.h) becomes `kInputs` inputs of two vectors, for the lower
 * and the upper half of the panel; `lane` is where the vectors begin in their halves. */
#pragma once
#include "common/level.h"
#include "cpu/linear_layout.h"

namespace lmi::LMI_LEVEL {
namespace {

struct Pair {
  Vector low, high;
};

inline Vector as_floats(Words words) {
  Vector value;
  __builtin_memcpy(&value, &words, sizeof value);
  return value;
}

struct F32Columns {
  static constexpr int kInputs = 1, kWords = 32;
  explicit F32Columns(const float *, int) {}
  Pair input(const uint32_t *column, int) const { return {as_floats(load(column)), as_floats(load(column + kHalf))}; }
};

struct BF16Columns {
  static constexpr int kInputs = 2, kWords = 32;
  explicit BF16Columns(const float *, int) {}
  Pair input(const uint32_t *column, int i) const { return {widen(load(column), i), widen(load(column + kHalf), i)}; }

 private:
  static Vector widen(Words words, int i) { return as_floats(i == 0 ? words << 16 : words & 0xffff0000u); }
};

struct F16Columns {
  static constexpr int kInputs = 2, kWords = 32;
  explicit F16Columns(const float *, int) {}
  Pair input(const uint32_t *column, int i) const { return {widen(load(column), i), widen(load(column + kHalf), i)}; }

 private:
  /* float_of_f16, lane by lane */
  static Vector widen(Words words, int i) {
    const Words halves = i == 0 ? words & 0xffffu : words >> 16;
    const Words shifted = (halves & 0x7fffu) << 13, sign = (halves & 0x8000u) << 16;
    const Vector finite = as_floats(shifted) * 0x1p112f;
    const Words bits = (Words)finite | ((Words)(shifted >= 0x0f800000u) & 0x7f800000u);
    return as_floats(bits | sign);
  }
};

/* Small integers of kBits with a scale and a zero an output and group: (w - zero) * scale. */
template <int kBits>
struct IntegerColumns {
  static constexpr int kInputs = 16 / kBits, kWords = 16;
  explicit IntegerColumns(const float *scales, int lane)
      : scale_{load(scales + lane), load(scales + lane + kHalf)},
        zero_{load(scales + kPanel + lane), load(scales + kPanel + lane + kHalf)} {}
  Pair input(const uint32_t *column, int i) const {
    const Words words = load(column) >> (2 * kBits * i);
    return {(number(words) - zero_.low) * scale_.low, (number(words >> kBits) - zero_.high) * scale_.high};
  }

 private:
  static Vector number(Words words) { return __builtin_convertvector((Integers)(words & ((1u << kBits) - 1)), Vector); }
  Pair scale_, zero_;
};

}  // namespace
}  // namespace lmi::LMI_LEVEL
