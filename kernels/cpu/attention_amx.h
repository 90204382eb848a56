/* Of attention.cc: bf16 by the tile instructions of AMX, 16 rows side by side, in the words of attention_halves.h: 32 of D of 16 keys, or
 * 16 keys of 16 of D, lie as the right factor of a product wants them. A row takes all 64 keys of a tile, those that it does not see with
 * weight 0; so its bits do not depend on what stands beside it. */
#pragma once
#include "common/amx.h"
#if defined(LMI_AMX)
#include "cpu/attention_floats.h"
#include "cpu/attention_halves.h"
#include "cpu/attention_pairs.h"

namespace lmi::LMI_LEVEL {
namespace {

struct AmxNumbers : HalvesRead<AmxNumbers> {
  static constexpr bool kWholeTiles = true;
  static constexpr int64_t kGroup = 16, kFew = kTile / 2; /* few: the values that one row sees */
  using Tools = ThreadTiles<true>;

  static void weigh(float *scores, int64_t num_rows, float scale, const Range *seen, float *max, float *sums, uint32_t *weights) {
#if defined(__AVX512BF16__)
    PairNumbers::weigh(scores, num_rows, scale, seen, max, sums, weights);
#else
    for (int64_t row = 0; row < num_rows; ++row) {
      float exact[kTile];
      FloatNumbers::weigh(scores + row * kTile, 1, scale, seen + row, max + row, sums + row, exact);
      round_floats(exact, LMI_BF16, kTile);
      write_floats(exact, LMI_BF16, kTile, weights + row * (kTile / 2));
      sums[row] = sum_of(exact);
    }
#endif
  }

  static void soft_cap(float *scores, float cap) {
#if defined(__AVX512BF16__)
    PairNumbers::soft_cap(scores, cap);
#else
    FloatNumbers::soft_cap(scores, cap);
#endif
  }

  /* scores[r,j] = sum_d queries[r,d] keys[d,j], of as many rows as are configured */
  static void score(const uint32_t *queries, int64_t row_words, const TileLines &keys, float *scores, TileCache &next) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t word = 0; word < row_words; word += kTileWords) {
      const int64_t place = word * keys.stride;
      _tile_loadd(4, queries + word, row_words * 4);
      _tile_loadd(6, keys.of[0] + place, keys.stride * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(6, keys.of[1] + place, keys.stride * 4);
      _tile_dpbf16ps(1, 4, 6);
      next.ask();
      _tile_loadd(6, keys.of[2] + place, keys.stride * 4);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(6, keys.of[3] + place, keys.stride * 4);
      _tile_dpbf16ps(3, 4, 6);
      next.ask();
    }
    _tile_stored(0, scores, kTile * 4);
    _tile_stored(1, scores + 16, kTile * 4);
    _tile_stored(2, scores + 32, kTile * 4);
    _tile_stored(3, scores + 48, kTile * 4);
  }

  /* sums[r,:] += sum_j weights[r,j] values[j,:], a chunk of keys after the other */
  static void add(const uint32_t *weights, const TileLines &values, int64_t padded, float *sums, TileCache &next) {
    for (int64_t d = 0; d < padded; d += 32) { /* kPad */
      _tile_loadd(0, sums + d, padded * 4);
      _tile_loadd(1, sums + d + 16, padded * 4);
      for (int64_t chunk = 0; chunk < TileChunks::kChunks; ++chunk) {
        _tile_loadd(5, weights + chunk * kChunk / 2, kTile * 2);
        _tile_loadd(7, values.of[chunk] + d, values.stride * 4);
        _tile_dpbf16ps(0, 5, 7);
        _tile_loadd(7, values.of[chunk] + d + 16, values.stride * 4);
        _tile_dpbf16ps(1, 5, 7);
        next.ask();
      }
      _tile_stored(0, sums + d, padded * 4);
      _tile_stored(1, sums + d + 16, padded * 4);
    }
  }

 private:
  static constexpr int64_t kTileWords = 16;
};

/* Values of a tile to [32][padded] in `to`, where they may be already; those of keys outside of the range become 0. */
inline TileLines keep_values(const TileLines &values, Range keys, int64_t padded, uint32_t *to) {
  constexpr int64_t kPairs = kChunk / 2;
  const auto is_in = [&](int64_t key) { return key >= keys.first && key < keys.last; };
  TileLines kept{{}, padded};
  for (int64_t pair = 0; pair < kTile / 2; ++pair, to += padded) {
    if (pair % kPairs == 0) kept.of[pair / kPairs] = to;
    const uint32_t *from = values.of[pair / kPairs] + pair % kPairs * values.stride;
    const uint32_t mask = (is_in(2 * pair) ? 0xffffu : 0u) | (is_in(2 * pair + 1) ? 0xffff0000u : 0u);
    for (int64_t d = 0; d < padded; ++d) to[d] = from[d] & mask;
  }
  return kept;
}

inline bool are_finite(const TileLines &values, int64_t padded) {
  uint32_t any = 0;
  for (const uint32_t *chunk : values.of) {
    for (int64_t pair = 0; pair < kChunk / 2; ++pair) {
      for (int64_t d = 0; d < padded; ++d) {
        const uint32_t word = chunk[pair * values.stride + d];
        any |= static_cast<uint32_t>((word & 0x7f80u) == 0x7f80u) | static_cast<uint32_t>((word & 0x7f800000u) == 0x7f800000u);
      }
    }
  }
  return any == 0;
}

}  // namespace
}  // namespace lmi::LMI_LEVEL
#endif
