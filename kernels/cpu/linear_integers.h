/* Of linear.cc: weights of small integers by dot products of bf16, which holds w - zero exactly. A group's products are summed on their own
 * and added times its scale. */
#pragma once
#include "cpu/linear_tiles.h"
#if defined(__AVX512BF16__)

namespace lmi::LMI_LEVEL {
namespace {

/* A group's columns (linear_layout.h). */
template <int kBits>
class IntegerPairs {
 public:
  static constexpr int kInputs = 16 / kBits; /* of a column, which has 64 bytes */

  /* zeros: of the panel's 32 outputs, whole numbers */
  IntegerPairs(const char *columns, const float *zeros) : columns_(columns), low_(with(zeros)), high_(with(zeros + kHalf)) {}

  Pairs pair(int64_t input) const {
    const __m512i words = _mm512_loadu_si512(columns_ + input / kInputs * 64);
    const __m512i two = _mm512_srli_epi32(words, static_cast<unsigned>(2 * kBits * (input % kInputs)));
    return {numbers(two, low_), numbers(_mm512_srli_epi32(two, kBits), high_)};
  }

 private:
  static constexpr int kMask = (1 << kBits) - 1;

  /* 4 bits: 16 - zero in both halves of each word; 8 bits: the zeros */
  static __m512i with(const float *zeros) {
    const __m512i zero = _mm512_cvtps_epi32(_mm512_loadu_ps(zeros));
    if constexpr (kBits == 8) return zero;
    const __m512i offset = _mm512_sub_epi32(_mm512_set1_epi32(16), zero);
    return _mm512_or_si512(offset, _mm512_slli_epi32(offset, 16));
  }

  /* w - zero of the two w in bits 0.. and 2 kBits.. of each word */
  static __m512bh numbers(__m512i words, __m512i with) {
    if constexpr (kBits == 4) {
      const __m512i first = _mm512_and_si512(words, _mm512_set1_epi32(kMask));
      const __m512i second = _mm512_and_si512(_mm512_slli_epi32(words, 8), _mm512_set1_epi32(kMask << 16));
      alignas(64) static constexpr uint16_t kNumbers[32] = {/* -16 to 15 */
          0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
          0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
      const __m512i place = _mm512_add_epi16(_mm512_or_si512(first, second), with);
      return (__m512bh)_mm512_permutexvar_epi16(place, _mm512_load_si512(kNumbers));
    } else {
      const auto float_of = [&](__m512i number) { /* its lower half is 0 */
        const __m512i difference = _mm512_sub_epi32(_mm512_and_si512(number, _mm512_set1_epi32(kMask)), with);
        return _mm512_castps_si512(_mm512_cvtepi32_ps(difference));
      };
      return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(float_of(words), 16), float_of(_mm512_srli_epi32(words, 16)));
    }
  }

  const char *columns_;
  const __m512i low_, high_;
};

template <int kBits>
struct IntegerTiles : DotTiles {
  static void multiply(int64_t width, const char *panel, const PanelLayout &layout, Inputs inputs, TileInput x, const SumsPlace &y,
                       Next next) {
    with_width(width, [&](auto rows) {
      for (int64_t e = inputs.first, end = inputs.first + inputs.num; e < end;) {
        const GroupPart part(panel, layout, e, end);
        const float *scales = reinterpret_cast<const float *>(part.start);
        Sums<rows> sums;
        sums.start(y, part.group > 0 || part.first == 0); /* a single group may come in parts */
        add_dots(IntegerPairs<kBits>(part.columns, scales + kPanel), part.num, x, sums, next);
        if (part.first + part.num == layout.group_inputs) sums.scale(scales, y, part.group > 0);
        sums.write(y);
        x.data += 2 * part.num;
        e += part.num;
      }
    });
  }
};

}  // namespace
}  // namespace lmi::LMI_LEVEL
#endif
