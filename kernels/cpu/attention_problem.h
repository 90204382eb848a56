/* Of attention.cc: what is asked of it. The arguments with their checks, who sees which keys, and the biases by distance. */
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/arguments.h"
#include "common/rows.h"
#include "cpu/cache_order.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kTile = 64, kSplit = 512, kUnitRows = 64;
constexpr int64_t kPad = 32; /* floats that a row of values is filled up to a multiple of */

struct Range {
  int64_t first, last;
  bool is_empty() const { return first >= last; }
};

Range common(Range a, Range b) { return {std::max(a.first, b.first), std::min(a.last, b.last)}; }

struct Problem {
  const lmi_attention_args &args;
  int64_t num_sequences, num_kv_heads, group, size, padded, block_size;
  float scale, v_scale; /* of products, and of what the values come to */
  bool is_biased;       /* a soft cap counts, too */
  std::vector<float> bias; /* [H, 2 * max_distance + 1]: the relative bias by key minus query position */

  int64_t start(int64_t sequence) const { return integers(args.starts)[sequence]; }
  int64_t num_queries(int64_t sequence) const { return start(sequence + 1) - start(sequence); }
  int64_t num_keys(int64_t sequence) const { return integers(args.key_lengths)[sequence]; }
  int64_t position(int64_t sequence, int64_t query) const { return num_keys(sequence) - num_queries(sequence) + query; }

  Range seen(int64_t sequence, int64_t query) const {
    const int64_t p = position(sequence, query);
    const int64_t first = args.window ? std::max<int64_t>(0, p - args.window + 1) : 0;
    return {first, args.causal ? p + 1 : num_keys(sequence)};
  }
};

/* Rows first, first + 1, ..., so many of each of some key heads of one sequence, a head's after the other's; a head's row r is query
 * r / group in head r % group of its group. */
struct Unit {
  int64_t sequence, head, num_heads, first, rows;
  int64_t num_rows() const { return num_heads * rows; }
};

/* fn(row, query, head) for all rows of a unit, in order. */
template <class Function>
void for_rows(const Problem &problem, const Unit &unit, Function fn) {
  for (int64_t i = 0; i < unit.num_heads; ++i) {
    for (int64_t r = 0; r < unit.rows; ++r) {
      const int64_t at = unit.first + r;
      fn(i * unit.rows + r, at / problem.group, (unit.head + i) * problem.group + at % problem.group);
    }
  }
}

/* Keys that any row of the unit sees: both ends grow with the query. */
Range seen_by_unit(const Problem &problem, const Unit &unit) {
  const Range first = problem.seen(unit.sequence, unit.first / problem.group);
  const Range last = problem.seen(unit.sequence, (unit.first + unit.rows - 1) / problem.group);
  return {first.first, std::max(first.first, last.last)};
}

/* At least one, though it be empty. */
Range splits_of(const Problem &problem, const Unit &unit) {
  const Range keys = seen_by_unit(problem, unit);
  if (keys.is_empty()) return {0, 1};
  return {keys.first / kSplit, (keys.last + kSplit - 1) / kSplit};
}

/* The bucket of T5 (Raffel et al. 2019, as Mesh TensorFlow computes it in float) for key minus query position. */
int64_t bucket_of(int64_t distance, int64_t num_buckets, int64_t max_distance, bool causal) {
  const int64_t half = causal ? num_buckets : num_buckets / 2, exact = half / 2;
  const int64_t base = !causal && distance > 0 ? half : 0;
  const int64_t size = causal ? std::max<int64_t>(-distance, 0) : std::abs(distance);
  if (size < exact) return base + size;
  const float ratio = std::log(static_cast<float>(size) / static_cast<float>(exact));
  const float range = static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(exact)));
  const int64_t above = static_cast<int64_t>(ratio / range * static_cast<float>(half - exact));
  return base + std::min(exact + above, half - 1);
}

/* From max_distance on, all distances share a bucket. */
std::vector<float> bias_by_distance(const lmi_attention_args &args) {
  const int64_t heads = args.relative_bias.size[1], far = args.max_distance;
  std::vector<float> bias(static_cast<size_t>(heads * (2 * far + 1)));
  for (int64_t distance = -far; distance <= far; ++distance) {
    const int64_t bucket = bucket_of(distance, args.relative_bias.size[0], far, args.causal != 0);
    const float *row = static_cast<const float *>(at(args.relative_bias, bucket));
    for (int64_t head = 0; head < heads; ++head) bias[static_cast<size_t>(head * (2 * far + 1) + far + distance)] = row[head];
  }
  return bias;
}

/* Every block that a row of the sequence sees must be there. */
void check_table(const Problem &problem, int64_t sequence) {
  const lmi_tensor &tables = problem.args.tables;
  const int64_t keys = problem.num_keys(sequence), room = tables.size[1] * problem.block_size;
  const std::string where = "sequence " + std::to_string(sequence);
  if (keys < 0 || keys > room) {
    refuse(where + " has key_lengths=" + std::to_string(keys) + "; its table has room for " + std::to_string(room));
  }
  if (problem.num_queries(sequence) == 0) return;
  const int32_t *table = integers(tables) + sequence * tables.stride[0];
  for (int64_t i = problem.seen(sequence, 0).first / problem.block_size; i * problem.block_size < keys; ++i) {
    if (table[i] >= 0 && table[i] < problem.args.k_cache.size[0]) continue;
    refuse(where + " has block " + std::to_string(table[i]) + " in its table; it must be 0 to N-1");
  }
}

/* Checks the arguments and looks at them; throws LMI_BAD_ARGUMENT. */
Problem problem_of(const lmi_attention_args &args) {
  check_arguments(args);
  check_order("k_cache", args.k_cache);
  check_order("v_cache", args.v_cache);
  check_starts("starts", args.starts, args.q.size[0]);
  const int64_t size = args.q.size[2], kv_heads = args.k_cache.size[1];
  const bool is_scaled = args.k_cache.dtype == LMI_F8E4M3;
  Problem problem{args, args.starts.size[0] - 1, kv_heads, args.q.size[1] / kv_heads, size, (size + kPad - 1) / kPad * kPad,
                  args.k_cache.size[2], is_scaled ? args.scale * args.k_scale : args.scale, is_scaled ? args.v_scale : 1.0f,
                  args.soft_cap > 0.0f || is_given(args.alibi) || is_given(args.relative_bias), {}};
  for (int64_t b = 0; b < problem.num_sequences; ++b) check_table(problem, b);
  if (is_given(args.relative_bias)) problem.bias = bias_by_distance(args);
  return problem;
}

}  // namespace
}  // namespace lmi::LMI_LEVEL
