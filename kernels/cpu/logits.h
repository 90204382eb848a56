/* Rows of logits: what penalties, draws and log probabilities share. A row belongs to one thread. Sums over the vocabulary are made
 * of blocks of 64 in float, which are added in double, in ascending order. */
#pragma once
#include <algorithm>
#include <limits>

#include "common/arguments.h"
#include "common/math.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {

constexpr int64_t kBlock = 64;
constexpr float kNever = -std::numeric_limits<float>::infinity();

inline const float *floats(const lmi_tensor &tensor) { return static_cast<const float *>(tensor.data); }

/* The greatest logit; NaN if there is one among them. */
inline float max_of(const float *logits, int64_t n) {
  float max[kBlock];
  int32_t nan[kBlock] = {};
  std::fill_n(max, kBlock, kNever);
  const auto look = [&](int64_t i, int64_t size) {
    for (int64_t j = 0; j < size; ++j) {
      max[j] = logits[i + j] > max[j] ? logits[i + j] : max[j];
      nan[j] |= logits[i + j] != logits[i + j];
    }
  };
  for (int64_t i = 0; i + kBlock <= n; i += kBlock) look(i, kBlock);
  look(n / kBlock * kBlock, n % kBlock);
  const bool has_nan = std::any_of(nan, nan + kBlock, [](int32_t lane) { return lane != 0; });
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : *std::max_element(max, max + kBlock);
}

inline bool can_be_drawn(float max) { return max > kNever; /* false for NaN */ }

template <class Term>
double sum_block(int64_t first, int64_t size, Term term) {
  float terms[kBlock] = {};
  for (int64_t j = 0; j < size; ++j) terms[j] = term(first + j);
  for (int64_t half = kBlock / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) terms[j] += terms[j + half];
  }
  return static_cast<double>(terms[0]);
}

/* sum of term(i) for i < n */
template <class Term>
double sum_terms(int64_t n, Term term) {
  double total = 0.0;
  for (int64_t i = 0; i + kBlock <= n; i += kBlock) total += sum_block(i, kBlock, term);
  return total + sum_block(n / kBlock * kBlock, n % kBlock, term);
}

}  // namespace lmi::LMI_LEVEL
