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

/* Products of one row with a tile's keys become scores. */
template <class Numbers>
void finish_scores(const Problem &problem, const Row &row, int64_t tile, float *scores) {
  for (int j = 0; j < kTile; ++j) scores[j] *= problem.scale;
  if (problem.is_biased) add_biases<Numbers>(problem, row.head, tile - row.position, scores);
}

/* Keys that a row sees in a tile. */
inline Range seen_in(const Row &row, int64_t tile) { return common({row.seen.first - tile, row.seen.last - tile}, {0, kTile}); }

/* Scores of the keys that each row sees become weights, exp(score - max); the rows' states follow their new maxima. Without a branch on
 * whether a maximum has changed: that is as good as random, and a wrong guess waits for all that the maximum depends on. */
template <class Numbers, int Rows>
void weigh_rows(float *scores, const Range *seen, const States &states, int64_t row, int64_t padded, typename Numbers::Word *weights) {
  Weighed weighed[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const float max = states.max[row + r];
    if (seen[r].is_empty()) weighed[r] = {max, 0.0f};
    else weighed[r] = Numbers::weigh(scores + r * kTile, seen[r], max, weights + r * (kTile / Numbers::kTogether));
  }
  float keep[Rows];
  for (int r = 0; r < Rows; ++r) {
    const float before = states.max[row + r], max = weighed[r].max;
    keep[r] = before == max ? 1.0f : exp_of(before - max);
  }
  for (int r = 0; r < Rows; ++r) {
    states.max[row + r] = weighed[r].max;
    states.sum[row + r] = keep[r] * states.sum[row + r] + weighed[r].sum;
    float *values = states.values + (row + r) * padded;
    for (int64_t d = 0; d < padded; ++d) values[d] *= keep[r];
  }
}

/* Rows row .. row+Rows-1 of the unit against the tile in scratch. What all of them see is added side by side, the rest alone. */
template <class Numbers, int Rows>
void attend_rows(const Problem &problem, int64_t row, int64_t tile, Scratch<Numbers> &scratch, const States &states, TileCache &next) {
  Range seen[Rows], shared = {0, kTile};
  bool any = false;
  for (int r = 0; r < Rows; ++r) {
    seen[r] = seen_in(scratch.about[row + r], tile);
    shared = common(shared, seen[r]);
    any = any || !seen[r].is_empty();
  }
  if (!any) return;
  shared = Numbers::whole(shared);
  const auto add_alone = [&](int r, Range keys) {
    if (keys.is_empty()) return;
    Numbers::template add_values<1>(scratch.weights + r * scratch.kWords, scratch, problem.padded, keys,
                                    states.values + (row + r) * problem.padded, next);
  };
  const typename Numbers::Word *queries = scratch.queries + row * scratch.row_words;
  Numbers::template score_rows<Rows>(queries, problem.size, scratch, scratch.scores, next);
  for (int r = 0; r < Rows; ++r) finish_scores<Numbers>(problem, scratch.about[row + r], tile, scratch.scores + r * kTile);
  weigh_rows<Numbers, Rows>(scratch.scores, seen, states, row, problem.padded, scratch.weights);
  for (int r = 0; r < Rows; ++r) add_alone(r, {seen[r].first, shared.is_empty() ? seen[r].last : shared.first});
  if (shared.is_empty()) return;
  Numbers::template add_values<Rows>(scratch.weights, scratch, problem.padded, shared, states.values + row * problem.padded, next);
  for (int r = 0; r < Rows; ++r) add_alone(r, {shared.last, seen[r].last});
}

/* All rows of a unit against the tile in scratch. */
template <class Numbers>
void attend_tile(const Problem &problem, int64_t num_rows, int64_t tile, const TileCache &, Scratch<Numbers> &scratch,
                 const States &states, TileCache &next) {
  int64_t row = 0;
  for (; row + Numbers::kRows <= num_rows; row += Numbers::kRows) {
    attend_rows<Numbers, Numbers::kRows>(problem, row, tile, scratch, states, next);
  }
  for (; row < num_rows; ++row) attend_rows<Numbers, 1>(problem, row, tile, scratch, states, next);
}

#if defined(LMI_AMX)
/* Weights of a row for the products with the values. */
template <int Rows>
void weigh_scores(const Problem &problem, int64_t row, int64_t tile, const Range *seen, Scratch<AmxNumbers> &scratch,
                  const States &states) {
  constexpr int64_t kWords = Scratch<AmxNumbers>::kWords;
  float *const scores = scratch.scores + row * kTile;
  uint32_t *const weights = scratch.weights + row * kWords;
  for (int r = 0; r < Rows; ++r) {
    finish_scores<AmxNumbers>(problem, scratch.about[row + r], tile, scores + r * kTile);
    if (seen[row + r].is_empty()) std::fill_n(weights + r * kWords, kWords, 0u);
  }
  weigh_rows<AmxNumbers, Rows>(scores, seen + row, states, row, problem.padded, weights);
}

/* All rows of a unit, in three passes: products come one after the other without waiting for the softmax between them. */
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
  int64_t row = 0;
  for (; row + 4 <= num_rows; row += 4) weigh_scores<4>(problem, row, tile, seen, scratch, states);
  for (; row < num_rows; ++row) weigh_scores<1>(problem, row, tile, seen, scratch, states);
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
  for (row = 0; row < num_rows; ++row) add(row, keep_values(values, seen[row], padded, own));
}
#endif

}  // namespace
}  // namespace lmi::LMI_LEVEL
