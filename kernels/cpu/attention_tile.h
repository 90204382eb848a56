/* Of attention.cc: one tile of 64 keys against the rows of a unit, and the softmax that goes on from tile to tile. */
#pragma once
#include "cpu/attention_amx.h"
#include "cpu/attention_floats.h"
#include "cpu/attention_pairs.h"

namespace lmi::LMI_LEVEL {
namespace {

/* Of scaled products: soft cap, biases. distance: the tile's first key minus the row's position. */
template <class Numbers>
void add_biases(const Problem &problem, int64_t head, int64_t distance, float *scores) {
  const lmi_attention_args &args = problem.args;
  if (args.soft_cap > 0.0f) Numbers::soft_cap(scores, args.soft_cap);
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

/* Keys that a row sees in a tile. */
inline Range seen_in(const Row &row, int64_t tile) { return common({row.seen.first - tile, row.seen.last - tile}, {0, kTile}); }

/* Products of rows with a tile's keys become weights, exp(score - max); the rows' states follow their new maxima. */
template <class Numbers>
void weigh_rows(const Problem &problem, int64_t num_rows, int64_t tile, const Range *seen, Scratch<Numbers> &scratch,
                const States &states) {
  float scale = problem.scale;
  if (problem.is_biased) {
    for (int64_t i = 0; i < num_rows * kTile; ++i) scratch.scores[i] *= scale;
    for (int64_t row = 0; row < num_rows; ++row) {
      const Row &about = scratch.about[row];
      add_biases<Numbers>(problem, about.head, tile - about.position, scratch.scores + row * kTile);
    }
    scale = 1.0f;
  }
  float keep[kUnitRows], sums[kUnitRows];
  std::copy_n(states.max, num_rows, keep);
  Numbers::weigh(scratch.scores, num_rows, scale, seen, states.max, sums, scratch.weights);
  for (int64_t row = 0; row < num_rows; ++row) keep[row] = keep[row] == states.max[row] ? 1.0f : exp_of(keep[row] - states.max[row]);
  for (int64_t row = 0; row < num_rows; ++row) {
    states.sum[row] = keep[row] * states.sum[row] + sums[row];
    float *const values = states.values + row * problem.padded;
    for (int64_t d = 0; d < problem.padded; ++d) values[d] *= keep[row];
  }
}

/* fn(row, std::integral_constant) of as many rows as are taken side by side from there on. */
template <class Numbers, class Function>
void for_groups(int64_t num_rows, Function fn) {
  int64_t row = 0;
  for (; row + Numbers::kRows <= num_rows; row += Numbers::kRows) fn(row, std::integral_constant<int, Numbers::kRows>());
  for (; row < num_rows; ++row) fn(row, std::integral_constant<int, 1>());
}

/* Rows row .. row+Rows-1 get what they see of the tile's values: what all of them see side by side, the rest alone. */
template <class Numbers, int Rows>
void add_to_rows(const Problem &problem, int64_t row, const Range *seen, const Scratch<Numbers> &scratch, const States &states,
                 TileCache &next) {
  Range shared = {0, kTile};
  for (int r = 0; r < Rows; ++r) shared = common(shared, seen[r]);
  shared = Numbers::whole(shared);
  const typename Numbers::Word *weights = scratch.weights + row * scratch.kWords;
  float *values = states.values + row * problem.padded;
  const auto add_alone = [&](int r, Range keys) {
    Numbers::template add_values<1>(weights + r * scratch.kWords, scratch, problem.padded, keys, values + r * problem.padded, next);
  };
  for (int r = 0; r < Rows; ++r) add_alone(r, {seen[r].first, shared.is_empty() ? seen[r].last : shared.first});
  if (shared.is_empty()) return;
  Numbers::template add_values<Rows>(weights, scratch, problem.padded, shared, values, next);
  for (int r = 0; r < Rows; ++r) add_alone(r, {shared.last, seen[r].last});
}

/* All rows of a unit against the tile in scratch, in three passes: products come one after the other without waiting for the softmax
 * between them. */
template <class Numbers>
void attend_tile(const Problem &problem, int64_t num_rows, int64_t tile, const TileCache &, Scratch<Numbers> &scratch,
                 const States &states, TileCache &next) {
  Range seen[kUnitRows];
  for (int64_t row = 0; row < num_rows; ++row) seen[row] = seen_in(scratch.about[row], tile);
  for_groups<Numbers>(num_rows, [&](int64_t row, auto rows) {
    Numbers::template score_rows<rows>(scratch.queries + row * scratch.row_words, problem.size, scratch, scratch.scores + row * kTile, next);
  });
  weigh_rows<Numbers>(problem, num_rows, tile, seen, scratch, states);
  for_groups<Numbers>(num_rows, [&](int64_t row, auto rows) {
    add_to_rows<Numbers, rows>(problem, row, seen + row, scratch, states, next);
  });
}

#if defined(LMI_AMX)
/* The same by tiles, that take all 64 keys, those that a row does not see with weight 0. */
inline void attend_tile(const Problem &problem, int64_t num_rows, int64_t tile, const TileCache &cache, Scratch<AmxNumbers> &scratch,
                        const States &states, TileCache &next) {
  const int64_t padded = problem.padded;
  const Range any = cache.values.seen; /* by any row */
  Range seen[kUnitRows];
  bool all_see_all = true;
  for (int64_t row = 0; row < num_rows; ++row) {
    seen[row] = seen_in(scratch.about[row], tile);
    all_see_all = all_see_all && seen[row].first == any.first && seen[row].last == any.last;
  }
  const auto for_groups = [&](auto fn) {
    for (int64_t row = 0; row < num_rows; row += AmxNumbers::kGroup) {
      scratch.tools.configure(std::min(AmxNumbers::kGroup, num_rows - row));
      fn(row);
    }
  };
  for_groups([&](int64_t row) {
    AmxNumbers::score(scratch.queries + row * scratch.row_words, scratch.row_words, scratch.key_lines, scratch.scores + row * kTile, next);
  });
  weigh_rows<AmxNumbers>(problem, num_rows, tile, seen, scratch, states);
  /* What no row sees may be anything in the cache: the values of such a tile are in scratch. */
  const bool is_whole = cache.values.is_whole();
  const TileLines values = is_whole ? scratch.value_lines : keep_values(scratch.value_lines, any, padded, scratch.values);
  const auto add = [&](int64_t first, const TileLines &seen_values) {
    float *const sums = states.values + first * padded;
    AmxNumbers::add(scratch.weights + first * Scratch<AmxNumbers>::kWords, seen_values, padded, sums, next);
  };
  if (all_see_all || are_finite(values, padded)) return for_groups([&](int64_t first) { add(first, values); });
  /* Weight 0 times what is not finite is not 0: each row has the values that it sees. */
  scratch.tools.configure(1);
  uint32_t *const own = reinterpret_cast<uint32_t *>(scratch.few);
  for (int64_t row = 0; row < num_rows; ++row) add(row, keep_values(values, seen[row], padded, own));
}
#endif

}  // namespace
}  // namespace lmi::LMI_LEVEL
