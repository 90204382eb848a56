/* Of attention.cc: bf16 by AVX-512's dot products of two. A Word holds two numbers that are added one after the other: of d in queries
 * and keys, of two keys in weights and values. Weights are rounded to bf16 before they are used and summed. */
#pragma once
#if defined(__AVX512BF16__)
#include <immintrin.h>

#include "cpu/attention_halves.h"

namespace lmi::LMI_LEVEL {
namespace {

struct PairNumbers : HalvesRead<PairNumbers> {
  static constexpr int64_t kRows = 4, kFew = 0;
  static constexpr bool kWholeTiles = false;
  struct Tools {};

  /* Sums what the weights are after rounding, so that the mean of equal values is that value. */
  [[gnu::always_inline]] static Weighed weigh(const float *scores, Range keys, float max_before, uint32_t *weights) {
    const uint64_t below_last = keys.last >= 64 ? ~0ull : (1ull << keys.last) - 1, is_seen = below_last & ~0ull << keys.first;
    __m512 seen[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __mmask16 mask = static_cast<__mmask16>(is_seen >> 16 * i);
      seen[i] = _mm512_mask_loadu_ps(_mm512_set1_ps(kNever), mask, scores + 16 * i);
    }
    const __m512 greatest = _mm512_max_ps(_mm512_max_ps(seen[0], seen[1]), _mm512_max_ps(seen[2], seen[3]));
    const float max = std::max(max_before, _mm512_reduce_max_ps(greatest));
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(exp_of_lanes(seen[i + 1], max), exp_of_lanes(seen[i], max));
      _mm512_storeu_si512(weights + 8 * i, (__m512i)pairs);
      sum = _mm512_dpbf16_ps(sum, pairs, (__m512bh)_mm512_set1_epi16(0x3f80)); /* times 1 */
    }
    return {max, _mm512_reduce_add_ps(sum)};
  }

  /* c tanh(s / c) = c - 2c / (e^(2s/c) + 1), within 3e-6 c: a small part of what a score owes to its rounded query and key. */
  static void soft_cap(float *scores, float cap) {
    const __m512 factor = _mm512_set1_ps(2.0f / cap), twice = _mm512_set1_ps(-2.0f * cap), one = _mm512_set1_ps(1.0f);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; i += 16) {
      const __m512 power = exp_of_lanes(_mm512_mul_ps(_mm512_loadu_ps(scores + i), factor), 0.0f);
      _mm512_storeu_ps(scores + i, _mm512_add_ps(_mm512_set1_ps(cap), _mm512_div_ps(twice, _mm512_add_ps(power, one))));
    }
  }

  static Range whole(Range keys) { return {(keys.first + 1) / 2 * 2, keys.last / 2 * 2}; }

  template <int Rows>
  static void score_rows(const uint32_t *queries, int64_t size, const Scratch<PairNumbers> &scratch, float *scores, TileCache &next) {
    const TileLines &keys = scratch.key_lines;
    __m512 sums[Rows][4] = {};
    for (int64_t word = 0; word < size / 2; ++word) {
      next.ask();
      __m512bh lines[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) lines[i] = load_pairs(keys.of[i] + word * keys.stride);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const __m512bh query = broadcast(queries[r * scratch.row_words + word]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], query, lines[i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm512_storeu_ps(scores + r * kTile + 16 * i, sums[r][i]);
    }
  }

  /* A pair of which only one key is in the range has 0 for the other's values: they may be infinite. */
  template <int Rows>
  static void add_values(const uint32_t *weights, const Scratch<PairNumbers> &scratch, int64_t padded, Range keys, float *so_far,
                         TileCache &next) {
    if (keys.is_empty()) return;
    int64_t d = 0;
    for (; d + 64 <= padded; d += 64) add_to_lines<Rows, 4>(weights, scratch.value_lines, d, padded, keys, so_far + d, next);
    if (d < padded) add_to_lines<Rows, 2>(weights, scratch.value_lines, d, padded, keys, so_far + d, next);
  }

 private:
  /* e^(scores - max) within 3e-6: 2^n 2^r, |r| <= 1/2, Taylor to r^5; 0 far below, infinite far above. */
  static __m512 exp_of_lanes(__m512 scores, float max) {
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-150.0f), _mm512_sub_ps(scores, _mm512_set1_ps(max)));
    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(0.00133335581f);
    for (const float factor : {0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f}) {
      p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factor));
    }
    return _mm512_scalef_ps(p, n);
  }

  static __m512bh broadcast(uint32_t word) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(word)); }
  static __m512bh load_pairs(const uint32_t *from) { return (__m512bh)_mm512_loadu_si512(from); }

  /* 16 * Lines sums of each row, in registers: with 64 no addition waits for the one before. */
  template <int Rows, int Lines>
  static void add_to_lines(const uint32_t *weights, const TileLines &values, int64_t d, int64_t padded, Range keys, float *so_far,
                           TileCache &next) {
    constexpr int64_t kPairs = kChunk / 2;
    __m512 sums[Rows][Lines];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < Lines; ++i) sums[r][i] = _mm512_loadu_ps(so_far + r * padded + 16 * i);
    }
    const auto add = [&](int64_t pair, uint32_t keep) { /* the half of each word that counts, or both */
      const __m512i mask = _mm512_set1_epi32(static_cast<int>(keep));
      const uint32_t *line = values.of[pair / kPairs] + pair % kPairs * values.stride + d;
      __m512bh numbers[Lines];
#pragma GCC unroll 4
      for (int i = 0; i < Lines; ++i) {
        numbers[i] = (__m512bh)_mm512_and_si512(_mm512_loadu_si512(line + 16 * i), mask);
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const __m512bh weight = broadcast(weights[r * (kTile / 2) + pair]);
#pragma GCC unroll 4
        for (int i = 0; i < Lines; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], weight, numbers[i]);
      }
    };
    const Range pairs = {(keys.first + 1) / 2, keys.last / 2};
    if (keys.first % 2) add(keys.first / 2, 0xffff0000u);
    for (int64_t pair = pairs.first; pair < pairs.last; ++pair) {
      next.ask();
      add(pair, ~0u);
    }
    if (keys.last % 2 && keys.last / 2 >= pairs.first) add(keys.last / 2, 0xffffu);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < Lines; ++i) _mm512_storeu_ps(so_far + r * padded + 16 * i, sums[r][i]);
    }
  }
};

}  // namespace
}  // namespace lmi::LMI_LEVEL
#endif
