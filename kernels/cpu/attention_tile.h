/* Of attention.cc: one tile of 64 keys against the rows of a unit, and the softmax that goes on from tile to tile. */
#pragma once
#include "cpu/attention_floats.h"
#include "cpu/attention_pairs.h"

namespace lmi::LMI_LEVEL {
namespace {

/* From products to scores: scale, soft cap, biases. distance: the tile's first key minus the row's position. */
void finish_scores(const Problem &problem, int64_t head, int64_t distance, float *scores) {
  const lmi_attention_args &args = problem.args;
  for (int j = 0; j < kTile; ++j) scores[j] *= problem.scale;
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

/* Scores of the keys that the row sees become weights, exp(score - max); the row's states follow the new maximum. */
template <class Numbers>
void weigh_row(float *scores, Range keys, const States &states, int64_t row, int64_t padded, typename Numbers::Word *weights) {
  std::fill_n(scores, keys.first, kNever);
  std::fill(scores + keys.last, scores + kTile, kNever);
  const float max = Numbers::max_of(scores, states.max[row]), sum = Numbers::weigh(scores, max, weights);
  if (max == states.max[row]) { /* most tiles of a long row: what follows would multiply by 1 */
    states.sum[row] += sum;
    return;
  }
  const float keep = exp_of(states.max[row] - max);
  states.max[row] = max;
  states.sum[row] = keep * states.sum[row] + sum;
  float *values = states.values + row * padded;
  for (int64_t d = 0; d < padded; ++d) values[d] *= keep;
}

/* Rows row .. row+Rows-1 of the unit against the tile in scratch. What all of them see is added side by side, the rest alone. */
template <class Numbers, int Rows>
void attend_rows(const Problem &problem, int64_t row, int64_t tile, Scratch<Numbers> &scratch, const States &states) {
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
    Numbers::template add_values<1>(scratch.weights + r * scratch.kWords, scratch.values, problem.padded, keys,
                                    states.values + (row + r) * problem.padded);
  };
  const typename Numbers::Word *queries = scratch.queries + row * scratch.row_words;
  Numbers::template score_rows<Rows>(queries, scratch.row_words, problem.size, scratch.keys, scratch.scores);
  for (int r = 0; r < Rows; ++r) {
    if (seen[r].is_empty()) continue;
    float *scores = scratch.scores + r * kTile;
    const Row &about = scratch.about[row + r];
    finish_scores(problem, about.head, tile - about.position, scores);
    weigh_row<Numbers>(scores, seen[r], states, row + r, problem.padded, scratch.weights + r * scratch.kWords);
    add_alone(r, {seen[r].first, shared.is_empty() ? seen[r].last : shared.first});
  }
  if (shared.is_empty()) return;
  Numbers::template add_values<Rows>(scratch.weights, scratch.values, problem.padded, shared, states.values + row * problem.padded);
  for (int r = 0; r < Rows; ++r) add_alone(r, {shared.last, seen[r].last});
}

}  // namespace
}  // namespace lmi::LMI_LEVEL
