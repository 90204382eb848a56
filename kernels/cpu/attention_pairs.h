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

  /* Sums what the weights are after rounding, so that the mean of equal values is that value. In passes over all rows: no row waits for
   * another, and what crosses lanes is done for 16 rows at once. */
  static void weigh(const float *scores, int64_t num_rows, float scale, const Range *seen, float *max, float *sums, uint32_t *weights) {
    __m512 lanes[kUnitRows];
    for (int64_t row = 0; row < num_rows; ++row) lanes[row] = max_of_lanes(scores + row * kTile, scale, seen[row]);
    reduce(lanes, num_rows, max, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
    for (int64_t row = 0; row < num_rows; ++row) {
      lanes[row] = weigh_row(scores + row * kTile, scale * kLog2E, seen[row], max[row] * kLog2E, weights + row * (kTile / 2));
    }
    std::fill_n(sums, num_rows, 0.0f);
    reduce(lanes, num_rows, sums, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
  }

  /* c tanh(s / c) = c - 2c / (e^(2s/c) + 1), within 3e-6 c: a small part of what a score owes to its rounded query and key. */
  static void soft_cap(float *scores, float cap) {
    const __m512 factor = _mm512_set1_ps(2.0f / cap), twice = _mm512_set1_ps(-2.0f * cap), one = _mm512_set1_ps(1.0f);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; i += 16) {
      const __m512 power = exp_of_lanes(_mm512_mul_ps(_mm512_loadu_ps(scores + i), factor));
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
  static constexpr float kLog2E = 1.44269504f;

  /* Of a row's keys 16 i .. 16 i + 15 in a tile, those that it sees. */
  static __mmask16 seen_of(Range keys, int i) {
    const uint64_t below_last = keys.last >= 64 ? ~0ull : (1ull << std::max<int64_t>(keys.last, 0)) - 1;
    const uint64_t from_first = keys.first >= 64 ? 0 : ~0ull << keys.first;
    return static_cast<__mmask16>((below_last & from_first) >> 16 * i);
  }

  [[gnu::always_inline]] static __m512 max_of_lanes(const float *scores, float scale, Range keys) {
    __m512 seen[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      seen[i] = _mm512_mask_mul_ps(_mm512_set1_ps(kNever), seen_of(keys, i), _mm512_loadu_ps(scores + 16 * i), _mm512_set1_ps(scale));
    }
    return _mm512_max_ps(_mm512_max_ps(seen[0], seen[1]), _mm512_max_ps(seen[2], seen[3]));
  }

  /* weights := 2^(scale * scores - max) of the keys that are seen, else 0; gives their sum, in parts. */
  [[gnu::always_inline]] static __m512 weigh_row(const float *scores, float scale, Range keys, float max, uint32_t *weights) {
    __m512 powers[4], sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 t = _mm512_fmsub_ps(_mm512_loadu_ps(scores + 16 * i), _mm512_set1_ps(scale), _mm512_set1_ps(max));
      powers[i] = _mm512_maskz_mov_ps(seen_of(keys, i), power_of_2(t, {0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f}));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(powers[i + 1], powers[i]);
      _mm512_storeu_si512(weights + 8 * i, (__m512i)pairs);
      sum = _mm512_dpbf16_ps(sum, pairs, (__m512bh)_mm512_set1_epi16(0x3f80)); /* times 1 */
    }
    return sum;
  }

  /* to[row] := combine(to[row], all lanes of the row), of 16 rows at a time: rows change places with lanes by halves. */
  template <class Combine>
  static void reduce(const __m512 *lanes, int64_t num_rows, float *to, Combine combine) {
    for (int64_t first = 0; first < num_rows; first += 16) {
      __m512 rows[16];
      for (int64_t i = 0; i < 16; ++i) rows[i] = lanes[std::min(first + i, num_rows - 1)];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512 a = rows[2 * i], b = rows[2 * i + 1];
        rows[i] = combine(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(rows[2 * i]), b = _mm512_castps_pd(rows[2 * i + 1]);
        rows[i] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
      }
#pragma GCC unroll 2
      for (int num = 2; num > 0; --num) {
        for (int i = 0; i < num; ++i) {
          const __m512 a = rows[2 * i], b = rows[2 * i + 1];
          rows[i] = combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        }
      }
      const __mmask16 there = static_cast<__mmask16>((1u << std::min<int64_t>(16, num_rows - first)) - 1);
      _mm512_mask_storeu_ps(to + first, there, combine(_mm512_maskz_loadu_ps(there, to + first), rows[0]));
    }
  }

  /* e^scores within 3e-6; 0 far below, infinite far above. */
  static __m512 exp_of_lanes(__m512 scores) {
    const __m512 t = _mm512_mul_ps(scores, _mm512_set1_ps(kLog2E));
    return power_of_2(t, {0.00133335581f, 0.00961812911f, 0.0555041087f, 0.240226507f, 0.693147181f, 1.0f});
  }

  /* 2^t: 2^n 2^r, |r| <= 1/2, by a Taylor polynomial: to r^4 within 5e-5, to r^5 within 3e-6. */
  static __m512 power_of_2(__m512 t, std::initializer_list<float> factors) {
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-220.0f), t); /* a NaN stays one */
    const __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(bounded, n);
    __m512 p = _mm512_setzero_ps();
    for (const float factor : factors) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factor));
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
