/* Of attention.cc: one tile of 64 keys against the rows of a unit, and the softmax that goes on from tile to tile. */
#pragma once
#include <cstring>
#include <limits>

#include "common/math.h"
#include "cpu/attention_problem.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int kRegisterRows = 4; /* rows whose sums stand side by side in registers */
constexpr int kSumLanes = 16;    /* partial sums of a tile's weights, the same number at every level */
constexpr float kNever = -std::numeric_limits<float>::infinity();

/* A unit's rows: greatest score, sum of weights and weighted sum of values so far. A sum of 0 says that no key was seen yet. */
struct States {
  float *max, *sum, *values;

  static int64_t floats(int64_t rows, int64_t padded) { return rows * (padded + 2); }
  States(float *memory, int64_t rows) : max(memory), sum(memory + rows), values(memory + 2 * rows) {}

  void clear(int64_t rows, int64_t padded) {
    std::fill_n(max, rows, kNever);
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(values, rows * padded, 0.0f);
  }
};

void merge_row(const States &total, const States &part, int64_t row, int64_t padded) {
  if (part.sum[row] == 0.0f) return;
  float *to = total.values + row * padded;
  const float *from = part.values + row * padded;
  if (total.sum[row] == 0.0f) {
    total.max[row] = part.max[row];
    total.sum[row] = part.sum[row];
    std::copy_n(from, padded, to);
    return;
  }
  const float max = std::max(total.max[row], part.max[row]);
  const float keep = exp_of(total.max[row] - max), add = exp_of(part.max[row] - max);
  total.sum[row] = keep * total.sum[row] + add * part.sum[row];
  for (int64_t d = 0; d < padded; ++d) to[d] = keep * to[d] + add * from[d];
  total.max[row] = max;
}

void merge(const States &total, const States &part, int64_t rows, int64_t padded) {
  for (int64_t row = 0; row < rows; ++row) merge_row(total, part, row, padded);
}

/* ---- what is read ---- */

constexpr int kSquare = kLanes < 8 ? kLanes : 8;
typedef float Row __attribute__((vector_size(4 * kSquare)));
typedef int32_t Pattern __attribute__((vector_size(4 * kSquare)));

/* Element i is element pattern[i] of a followed by b. */
inline Row shuffle(Row a, Row b, Pattern pattern) {
#if defined(__clang__)
  Row out;
  for (int i = 0; i < kSquare; ++i) out[i] = pattern[i] < kSquare ? a[pattern[i]] : b[pattern[i] - kSquare];
  return out;
#else
  return __builtin_shuffle(a, b, pattern);
#endif
}

/* to[i * to_stride + j] = from[j * from_stride + i] for i, j < kSquare: squares of 1, 2, 4 change places across the diagonal. In
 * registers, since element by element it would take longer than the arithmetic of a decode. */
inline void transpose(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
  Row rows[kSquare];
  for (int i = 0; i < kSquare; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
#pragma GCC unroll 4
  for (int width = 1; width < kSquare; width *= 2) {
    Pattern upper = {}, lower = {};
#pragma GCC unroll 8
    for (int i = 0; i < kSquare; ++i) {
      upper[i] = i & width ? kSquare + i - width : i;
      lower[i] = i & width ? kSquare + i : i + width;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kSquare; ++i) {
      if (i & width) continue;
      const Row a = rows[i], b = rows[i + width];
      rows[i] = shuffle(a, b, upper);
      rows[i + width] = shuffle(a, b, lower);
    }
  }
  for (int i = 0; i < kSquare; ++i) std::memcpy(to + i * to_stride, &rows[i], sizeof(Row));
}

/* What a thread works with: queries [rows,D], a tile's keys transposed [D,64] and values [64,padded], a few keys on their way
 * [kSquare,padded], scores of four rows [4,64], and memory for two states of a unit. */
struct Scratch {
  Floats memory;
  float *queries, *keys, *values, *rows, *scores, *part, *total;

  Scratch(const Problem &problem, int64_t unit_rows)
      : memory(unit_rows * problem.size + kTile * problem.size + (kTile + kSquare) * problem.padded + kRegisterRows * kTile +
               2 * States::floats(unit_rows, problem.padded)),
        queries(memory),
        keys(queries + unit_rows * problem.size),
        values(keys + kTile * problem.size),
        rows(values + kTile * problem.padded),
        scores(rows + kSquare * problem.padded),
        part(scores + kRegisterRows * kTile),
        total(part + States::floats(unit_rows, problem.padded)) {}
};

const void *cached(const Problem &problem, const lmi_tensor &cache, const Unit &unit, int64_t key) {
  const lmi_tensor &tables = problem.args.tables;
  const int32_t block = integers(tables)[unit.sequence * tables.stride[0] + key / problem.block_size];
  return at(cache, block, unit.head, key % problem.block_size);
}

/* A tile ahead of its use: blocks lie anywhere in memory, and waiting for them would take most of a decode. */
void prefetch(const Problem &problem, const lmi_tensor &cache, const Unit &unit, int64_t key) {
  const char *row = static_cast<const char *>(cached(problem, cache, unit, key));
  const int64_t size_bytes = problem.size * bytes_of(cache.dtype);
  for (int64_t byte = 0; byte < size_bytes; byte += 64) __builtin_prefetch(row + byte);
}

/* Keys of the tile that starts at `tile`, transposed; those outside of `needed` are 0. */
void read_keys(const Problem &problem, const Unit &unit, int64_t tile, Range needed, Scratch &scratch) {
  const lmi_tensor &cache = problem.args.k_cache;
  for (int64_t j = 0; j < kTile; j += kSquare) {
    for (int64_t i = 0; i < kSquare; ++i) {
      float *row = scratch.rows + i * problem.padded;
      const int64_t key = tile + j + i;
      if (key + kTile < needed.last) prefetch(problem, cache, unit, key + kTile);
      if (key >= needed.first && key < needed.last) {
        read_floats(cached(problem, cache, unit, key), cache.dtype, problem.size, row);
      } else {
        std::fill_n(row, problem.size, 0.0f);
      }
    }
    for (int64_t d = 0; d < problem.size; d += kSquare) {
      transpose(scratch.rows + d, problem.padded, scratch.keys + d * kTile + j, kTile);
    }
  }
}

/* Values of the tile; those outside of `needed` stay what they are, since no row sees them. */
void read_values(const Problem &problem, const Unit &unit, int64_t tile, Range needed, Scratch &scratch) {
  const lmi_tensor &cache = problem.args.v_cache;
  const Range keys = common(needed, {tile, tile + kTile});
  for (int64_t key = keys.first; key < keys.last; ++key) {
    float *row = scratch.values + (key - tile) * problem.padded;
    if (key + kTile < needed.last) prefetch(problem, cache, unit, key + kTile);
    read_floats(cached(problem, cache, unit, key), cache.dtype, problem.size, row);
    std::fill(row + problem.size, row + problem.padded, 0.0f);
  }
}

/* ---- products ---- */

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

/* scores[r,j] = sum_d queries[r,d] * keys[d,j], d ascending; scores: [Rows,64] */
template <int Rows>
void score_rows(const float *queries, int64_t size, const float *keys, float *scores) {
  for (int64_t j = 0; j < kTile; j += 2 * kLanes) {
    Sums<Rows> sums = {};
    for (int64_t d = 0; d < size; ++d) sums.add(queries + d, size, keys + d * kTile + j);
    sums.write(scores + j, kTile);
  }
}

/* values[r,:] += sum_j weights[r,j] * tile[j,:], j ascending in `keys` (counted from the tile's first); weights: [Rows,64] */
template <int Rows>
void add_values(const float *weights, const float *tile, int64_t padded, Range keys, float *values) {
  for (int64_t d = 0; d < padded; d += 2 * kLanes) {
    Sums<Rows> sums;
    sums.read(values + d, padded);
    for (int64_t j = keys.first; j < keys.last; ++j) sums.add(weights + j, kTile, tile + j * padded + d);
    sums.write(values + d, padded);
  }
}

/* ---- softmax ---- */

/* From products to scores: scale, soft cap, biases. distance: the tile's first key minus the row's position. */
void finish_scores(const Problem &problem, int64_t head, int64_t distance, float *scores) {
  const lmi_attention_args &args = problem.args;
  for (int j = 0; j < kTile; ++j) scores[j] *= args.scale;
  if (args.soft_cap > 0.0f) {
    for (int j = 0; j < kTile; ++j) scores[j] = args.soft_cap * tanh_of(scores[j] / args.soft_cap);
  }
  if (is_given(args.alibi)) {
    const float slope = static_cast<const float *>(args.alibi.data)[head], from = static_cast<float>(distance);
    for (int j = 0; j < kTile; ++j) scores[j] += slope * (from + static_cast<float>(j));
  }
  if (is_given(args.relative_bias)) {
    const int64_t far = args.max_distance;
    const float *bias = problem.bias.data() + head * (2 * far + 1) + far;
    for (int64_t j = 0; j < kTile; ++j) scores[j] += bias[std::clamp(distance + j, -far, far)];
  }
}

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

/* Scores of the keys that the row sees become weights, exp(score - max); the row's states follow the new maximum. */
void weigh_row(float *scores, Range keys, const States &states, int64_t row, int64_t padded) {
  for (int64_t j = 0; j < kTile; ++j) scores[j] = j >= keys.first && j < keys.last ? scores[j] : kNever;
  float max = states.max[row];
  for (int j = 0; j < kTile; ++j) max = scores[j] > max ? scores[j] : max;
  for (int j = 0; j < kTile; ++j) scores[j] = exp_of(scores[j] - max);
  const float keep = exp_of(states.max[row] - max);
  states.max[row] = max;
  states.sum[row] = keep * states.sum[row] + sum_of(scores);
  float *values = states.values + row * padded;
  for (int64_t d = 0; d < padded; ++d) values[d] *= keep;
}

/* Rows row .. row+Rows-1 of the unit against the tile in scratch. What all of them see is added side by side, the rest alone. */
template <int Rows>
void attend_rows(const Problem &problem, const Unit &unit, int64_t row, int64_t tile, Scratch &scratch, const States &states) {
  Range seen[Rows], shared = {0, kTile};
  bool any = false;
  for (int r = 0; r < Rows; ++r) {
    const Range keys = problem.seen(unit.sequence, query_of(problem, unit, row + r));
    seen[r] = common({keys.first - tile, keys.last - tile}, {0, kTile});
    shared = common(shared, seen[r]);
    any = any || !seen[r].is_empty();
  }
  if (!any) return;
  float *values = states.values + row * problem.padded;
  score_rows<Rows>(scratch.queries + row * problem.size, problem.size, scratch.keys, scratch.scores);
  for (int r = 0; r < Rows; ++r) {
    if (seen[r].is_empty()) continue;
    float *scores = scratch.scores + r * kTile;
    const int64_t position = problem.position(unit.sequence, query_of(problem, unit, row + r));
    finish_scores(problem, head_of(problem, unit, row + r), tile - position, scores);
    weigh_row(scores, seen[r], states, row + r, problem.padded);
    const int64_t alone = shared.is_empty() ? seen[r].last : shared.first;
    add_values<1>(scores, scratch.values, problem.padded, {seen[r].first, alone}, values + r * problem.padded);
  }
  if (shared.is_empty()) return;
  add_values<Rows>(scratch.scores, scratch.values, problem.padded, shared, values);
  for (int r = 0; r < Rows; ++r) {
    const Range after = {shared.last, seen[r].last};
    add_values<1>(scratch.scores + r * kTile, scratch.values, problem.padded, after, values + r * problem.padded);
  }
}

}  // namespace
}  // namespace lmi::LMI_LEVEL
