/* Where the elements of a matrix product's operands lie in the registers of a warp (PTX ISA, "Matrix Fragments for mma"): what the
 * twins in ptx.cuh share. */
#pragma once
#include <cstdint>
#include <cstring>

#include "sim/numbers.h"

namespace lmi::sim {

/* Element of `kBits` number i of a 32-bit register. */
struct Bf16 {
  static constexpr int kBits = 16;
  static float number(uint32_t bits) { return lmi::LMI_LEVEL::float_of_bf16(static_cast<uint16_t>(bits)); }
};
struct F16 {
  static constexpr int kBits = 16;
  static float number(uint32_t bits) { return lmi::LMI_LEVEL::float_of_f16(static_cast<uint16_t>(bits)); }
};
struct E4m3 {
  static constexpr int kBits = 8;
  static float number(uint32_t bits) { return lmi::LMI_LEVEL::float_of_e4m3(static_cast<uint8_t>(bits)); }
};
struct S8 {
  static constexpr int kBits = 8;
  static int number(uint32_t bits) { return static_cast<int8_t>(bits); }
};

template <class Element>
auto element_of(uint32_t word, int i) {
  return Element::number(word >> (Element::kBits * i) & ((1u << Element::kBits) - 1));
}

/* One lane's registers of D[16,8] += A[16,K] B[K,8] with K = 8 words: A in four, B in two, D in four. */
template <class Sum>
struct ProductPart {
  const uint32_t *a, *b;
  Sum *d;
};

/* D += A B. A: register r of lane (g, t) holds row g + 8 (r % 2), words t + 4 (r / 2); B: register r holds word t + 4 r of column
 * g; D: registers 0, 1 are row g, columns 2t, 2t+1, and 2, 3 those of row g + 8. */
template <class Element, class Sum>
void multiply_fragments(ProductPart<Sum> **lanes) {
  constexpr int kPerWord = 32 / Element::kBits, kDepth = 8 * kPerWord;
  using Number = decltype(Element::number(0));
  Number a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, word = lane % 4;
    for (int i = 0; i < kPerWord; ++i) {
      for (int r = 0; r < 4; ++r) a[row + r % 2 * 8][(word + r / 2 * 4) * kPerWord + i] = element_of<Element>(lanes[lane]->a[r], i);
      for (int r = 0; r < 2; ++r) b[row][(word + r * 4) * kPerWord + i] = element_of<Element>(lanes[lane]->b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[column][k];
      lanes[lane]->d[r] += sum;
    }
  }
}

}  // namespace lmi::sim
