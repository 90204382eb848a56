/* Of attention.cc: how levels with products of bf16 pairs read queries, keys and values: as they lie in the cache (cache_order.h), a Word
 * being two numbers; what a cache holds in fp8 is bf16 too, exactly. */
#pragma once
#include "cpu/attention_scratch.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace lmi::LMI_LEVEL {
namespace {

/* A copy of 32 numbers of a cache, of which those from `num` on, which may not be there, become 0. */
#if defined(__AVX512BF16__)
inline __mmask32 first_of_32(int64_t num) { return num >= 32 ? ~0u : num <= 0 ? 0u : (1u << num) - 1; }

struct Halves16 {
  static void copy(const char *from, int64_t num, uint32_t *to) {
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(first_of_32(num), from));
  }
};

/* fp8 to bf16: the exponent's base goes from 7 to 127, and what has none, 0 to 7 times 2^-9, is looked up. */
struct Bytes8 {
  static void copy(const char *from, int64_t num, uint32_t *to) {
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(first_of_32(num), from));
    const __m512i magnitude = _mm512_and_si512(bytes, _mm512_set1_epi16(0x7f)), sign = _mm512_slli_epi16(_mm512_srli_epi16(bytes, 7), 15);
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __m512i small = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    const __m512i finite = _mm512_mask_permutexvar_epi16(normal, is_small, magnitude, small);
    _mm512_storeu_si512(to, _mm512_or_si512(sign, _mm512_mask_mov_epi16(finite, is_nan, _mm512_set1_epi16(0x7fc0))));
  }
};
#else
struct Halves16 {
  static void copy(const char *from, int64_t num, uint32_t *to) {
    std::fill_n(to, 16, 0u);
    std::memcpy(to, from, static_cast<size_t>(2 * std::clamp<int64_t>(num, 0, 32)));
  }
};

struct Bytes8 {
  static void copy(const char *from, int64_t num, uint32_t *to) {
    uint16_t halves[32] = {};
    for (int64_t i = 0; i < std::min<int64_t>(num, 32); ++i) halves[i] = bf16_of_float(float_of_e4m3(static_cast<uint8_t>(from[i])));
    std::memcpy(to, halves, sizeof halves);
  }
};
#endif

/* The part of a kind of numbers (attention_floats.h) that reads. kWholeTiles: it takes 32 of D and all
 * values of a tile, whether a row sees them or not. */
template <class Numbers>
struct HalvesRead {
  using Word = uint32_t;
  static constexpr int kTogether = 2;

  /* Up to a multiple of kPad, the last ones 0. */
  static void read_query(const void *q, int32_t, int64_t size, uint32_t *to) {
    for (int64_t i = 0; i < size; i += kPad) Halves16::copy(static_cast<const char *>(q) + 2 * i, size - i, to + i / 2);
  }

  static void read_keys(const Problem &problem, const TileChunks &chunks, Scratch<Numbers> &scratch, TileCache &next) {
    const ChunkShape shape = ChunkShape::of_keys(problem.args.k_cache);
    if (problem.args.k_cache.dtype == LMI_F8E4M3) copy_keys<Bytes8>(problem, chunks, scratch, next);
    else if (Numbers::kWholeTiles && problem.padded > problem.size) copy_keys<Halves16>(problem, chunks, scratch, next);
    else scratch.key_lines = lines_of(chunks, shape);
  }

  static void read_values(const Problem &problem, const TileChunks &chunks, Scratch<Numbers> &scratch, TileCache &next) {
    const ChunkShape shape = ChunkShape::of_values(problem.args.v_cache);
    if (problem.args.v_cache.dtype == LMI_F8E4M3) copy_values<Bytes8>(problem, chunks, scratch, next);
    else if ((Numbers::kWholeTiles && !chunks.is_whole()) || problem.padded > problem.size) {
      copy_values<Halves16>(problem, chunks, scratch, next);
    }
    else scratch.value_lines = lines_of(chunks, shape);
  }

 private:
  /* Of a cache in bf16, which is read where it lies. A chunk that no row sees is another one: what comes of it does not count. */
  static TileLines lines_of(const TileChunks &chunks, const ChunkShape &shape) {
    TileLines lines{{}, shape.stride / 4};
    const char *seen = nullptr;
    for (const char *chunk : chunks.of) seen = seen ? seen : chunk;
    for (int64_t i = 0; i < TileChunks::kChunks; ++i) lines.of[i] = reinterpret_cast<const uint32_t *>(chunks.of[i] ? chunks.of[i] : seen);
    return lines;
  }

  /* Lines of D beyond the last are 0. */
  template <class Copy>
  static void copy_keys(const Problem &problem, const TileChunks &chunks, Scratch<Numbers> &scratch, TileCache &next) {
    const ChunkShape shape = ChunkShape::of_keys(problem.args.k_cache);
    std::fill_n(scratch.keys + problem.size / 2 * kTile, (problem.padded - problem.size) / 2 * kTile, 0u);
    scratch.key_lines.stride = kTile;
    for (int64_t chunk = 0; chunk < TileChunks::kChunks; ++chunk) {
      const char *from = chunks.of[chunk];
      uint32_t *to = scratch.keys + chunk * kChunk;
      scratch.key_lines.of[chunk] = to;
      for (int64_t row = 0; from && row < shape.rows; ++row, from += shape.stride, to += kTile) {
        if (row % 4 == 0) next.ask();
        Copy::copy(from, shape.numbers, to);
      }
    }
  }

  template <class Copy>
  static void copy_values(const Problem &problem, const TileChunks &chunks, Scratch<Numbers> &scratch, TileCache &next) {
    const ChunkShape shape = ChunkShape::of_values(problem.args.v_cache);
    const int64_t bytes = bytes_of(problem.args.v_cache.dtype);
    scratch.value_lines.stride = problem.padded;
    for (int64_t chunk = 0; chunk < TileChunks::kChunks; ++chunk) {
      const char *from = chunks.of[chunk];
      uint32_t *to = scratch.values + chunk * kChunk / 2 * problem.padded;
      scratch.value_lines.of[chunk] = to;
      for (int64_t row = 0; from && row < shape.rows; ++row, from += shape.stride, to += problem.padded) {
        next.ask();
        for (int64_t i = 0; i < 2 * problem.padded; i += 32) Copy::copy(from + i * bytes, shape.numbers - i, to + i / 2);
      }
    }
  }
};

}  // namespace
}  // namespace lmi::LMI_LEVEL
