/* Of attention.cc: queries, keys, values and weights as floats, for every dtype at every level.
 *
 * What attention_tile.h expects of a kind of numbers (FloatNumbers, PairNumbers; AmxNumbers has products of its own): a Word holds
 * kTogether of them, kRows rows are taken side by side, Tools is what a thread needs for it, and, with `padded` for D filled up to a
 * multiple of kPad,
 *   queries  [rows][padded / kTogether]     keys     [D / kTogether][64], transposed
 *   values   [64 / kTogether][padded]       weights  [rows][64 / kTogether]
 *   read_query, read_keys, read_values      fill these; keys and values that are not there become anything: no row sees them
 *   weigh(scores, num_rows, scale, seen, max, sums, weights)   max := the greatest of max and of the scaled scores of the keys that a row
 *                                           sees; weights := exp(scale * scores - max), else 0; sums := theirs. scores are scratch
 *   score_rows<Rows>   scores[r,j] = sum_d queries[r,d] keys[d,j]                  d ascending
 *   add_values<Rows>   sums[r,:] += sum_j weights[r,j] values[j,:]                 j ascending in a range of keys
 *   whole(keys)        the part of a range that several rows may add together
 * While they work they ask for the `next` tile. */
#pragma once
#include "cpu/attention_scratch.h"

namespace lmi::LMI_LEVEL {
namespace {

/* Two registers of each row's sums: with four rows, what every level has room for. */
template <int Rows>
struct Sums {
  Vector of[Rows][2];

  /* of[r] += factors[r * stride] * numbers */
  void add(const float *factors, int64_t stride, const float *numbers) {
    const Vector left = load(numbers), right = load(numbers + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      of[r][0] += factors[r * stride] * left;
      of[r][1] += factors[r * stride] * right;
    }
  }

  void read(const float *from, int64_t stride) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      of[r][0] = load(from + r * stride);
      of[r][1] = load(from + r * stride + kLanes);
    }
  }

  void write(float *to, int64_t stride) const {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      store(to + r * stride, of[r][0]);
      store(to + r * stride + kLanes, of[r][1]);
    }
  }
};

constexpr int kSumLanes = 16; /* partial sums of a tile's weights, the same number at every level */

/* Sum of a tile's weights in an order of its own, the same at every level. */
float sum_of(const float *weights) {
  float sums[kSumLanes] = {};
  for (int j = 0; j < kTile; j += kSumLanes) {
    for (int lane = 0; lane < kSumLanes; ++lane) sums[lane] += weights[j + lane];
  }
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

struct FloatNumbers {
  using Word = float;
  static constexpr int kTogether = 1;
  static constexpr int64_t kRows = 4, kFew = 2;
  struct Tools {};

  static void read_query(const void *q, int32_t dtype, int64_t size, float *to) { read_floats(q, dtype, size, to); }

  static void read_keys(const Problem &problem, const TileChunks &chunks, Scratch<FloatNumbers> &scratch, TileCache &next) {
    const ChunkShape shape = ChunkShape::of_keys(problem.args.k_cache);
    for (int64_t chunk = 0; chunk < TileChunks::kChunks; ++chunk) {
      float *to = scratch.keys + chunk * kChunk;
      for (int64_t row = 0; chunks.of[chunk] && row < shape.rows; ++row, to += 2 * kTile) {
        read_floats(chunks.of[chunk] + row * shape.stride, problem.args.k_cache.dtype, shape.numbers, scratch.few);
        next.ask();
        part(scratch.few, kChunk, to, to + kTile);
      }
    }
  }

  static void read_values(const Problem &problem, const TileChunks &chunks, Scratch<FloatNumbers> &scratch, TileCache &next) {
    const ChunkShape shape = ChunkShape::of_values(problem.args.v_cache);
    for (int64_t chunk = 0; chunk < TileChunks::kChunks; ++chunk) {
      float *to = scratch.values + chunk * kChunk * problem.padded;
      for (int64_t row = 0; chunks.of[chunk] && row < shape.rows; ++row, to += 2 * problem.padded) {
        read_floats(chunks.of[chunk] + row * shape.stride, problem.args.v_cache.dtype, shape.numbers, scratch.few);
        next.ask();
        part(scratch.few, problem.size, to, to + problem.padded);
        std::fill(to + problem.size, to + problem.padded, 0.0f);
        std::fill(to + problem.padded + problem.size, to + 2 * problem.padded, 0.0f);
      }
    }
  }

  static void soft_cap(float *scores, float cap) {
    for (int j = 0; j < kTile; ++j) scores[j] = cap * tanh_of(scores[j] / cap);
  }

  /* The greatest of the scores and `max`; a NaN is none. */
  static float max_of(const float *scores, float max) {
    float maxima[kSumLanes];
    for (int lane = 0; lane < kSumLanes; ++lane) maxima[lane] = max;
    for (int j = 0; j < kTile; j += kSumLanes) {
      for (int lane = 0; lane < kSumLanes; ++lane) maxima[lane] = scores[j + lane] > maxima[lane] ? scores[j + lane] : maxima[lane];
    }
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) maxima[lane] = maxima[lane + half] > maxima[lane] ? maxima[lane + half] : maxima[lane];
    }
    return maxima[0];
  }

  static void weigh(float *scores, int64_t num_rows, float scale, const Range *seen, float *max, float *sums, float *weights) {
    for (int64_t row = 0; row < num_rows; ++row, scores += kTile, weights += kTile) {
      const auto is_seen = [&](int j) { return j >= seen[row].first && j < seen[row].last; };
      for (int j = 0; j < kTile; ++j) scores[j] = is_seen(j) ? scores[j] * scale : kNever;
      max[row] = max_of(scores, max[row]);
      for (int j = 0; j < kTile; ++j) weights[j] = is_seen(j) ? exp_of(scores[j] - max[row]) : 0.0f;
      sums[row] = sum_of(weights);
    }
  }

  static Range whole(Range keys) { return keys; }

  template <int Rows>
  static void score_rows(const float *queries, int64_t size, const Scratch<FloatNumbers> &scratch, float *scores, TileCache &next) {
    for (int64_t j = 0; j < kTile; j += 2 * kLanes) {
      Sums<Rows> sums = {};
      next.ask();
      for (int64_t d = 0; d < size; ++d) sums.add(queries + d, scratch.row_words, scratch.keys + d * kTile + j);
      sums.write(scores + j, kTile);
    }
  }

  template <int Rows>
  static void add_values(const float *weights, const Scratch<FloatNumbers> &scratch, int64_t padded, Range keys, float *so_far,
                         TileCache &next) {
    for (int64_t d = 0; d < padded; d += 2 * kLanes) {
      next.ask();
      Sums<Rows> sums;
      sums.read(so_far + d, padded);
      for (int64_t j = keys.first; j < keys.last; ++j) sums.add(weights + j, kTile, scratch.values + j * padded + d);
      sums.write(so_far + d, padded);
    }
  }

 private:
  /* n pairs: the first of each to one place, the second to another. */
  static void part(const float *pairs, int64_t n, float *firsts, float *seconds) {
    for (int64_t i = 0; i < n; ++i) {
      firsts[i] = pairs[2 * i];
      seconds[i] = pairs[2 * i + 1];
    }
  }
};

}  // namespace
}  // namespace lmi::LMI_LEVEL
