/* Of attention.cc: one tile of 64 keys against the rows of a unit, and the softmax that goes on from tile to tile. */
#pragma once
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
  const float scale = problem.scale;
  Range seen[Rows], shared = {0, kTile};
  bool any = false;
  for (int r = 0; r < Rows; ++r) {
    const Range keys = scratch.about[row + r].seen;
    seen[r] = common({keys.first - tile, keys.last - tile}, {0, kTile});
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
  for (int r = 0; r < Rows; ++r) {
    float *scores = scratch.scores + r * kTile;
    for (int j = 0; j < kTile; ++j) scores[j] *= scale;
    if (problem.is_biased) add_biases<Numbers>(problem, scratch.about[row + r].head, tile - scratch.about[row + r].position, scores);
  }
  weigh_rows<Numbers, Rows>(scratch.scores, seen, states, row, problem.padded, scratch.weights);
  for (int r = 0; r < Rows; ++r) add_alone(r, {seen[r].first, shared.is_empty() ? seen[r].last : shared.first});
  if (shared.is_empty()) return;
  Numbers::template add_values<Rows>(scratch.weights, scratch, problem.padded, shared, states.values + row * problem.padded, next);
  for (int r = 0; r < Rows; ++r) add_alone(r, {shared.last, seen[r].last});
}

}  // namespace
}  // namespace lmi::LMI_LEVEL
