/* Attention over blocks, for prefill and decode alike. Who owns what: a unit is up to 64 rows (a row is one query in one head) of
 * one sequence and one key head; it walks over the tiles of 64 keys that any of its rows sees, turns a tile's keys and values
 * into floats once for all of them, and keeps an online softmax per row. A split of 512 keys starts its softmax anew; splits are
 * merged in ascending order. A row's bits depend only on its query and on the keys it sees: each product is added to its own
 * sum in the order of d or of j, four rows side by side in registers or one alone, and a key that a row does not see is not added at
 * all. Where there are few units, each split is a job of its own and the merge follows. Bound by arithmetic in prefill, by the
 * reading of the cache in decode. */
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/math.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kTile = 64, kSplit = 512, kUnitRows = 64;
constexpr int64_t kPad = 32; /* floats that a row of values is filled up to a multiple of */
constexpr int kRegisterRows = 4; /* rows whose sums stand side by side in registers */
constexpr int kSumLanes = 16;    /* partial sums of a tile's weights, the same number at every level */
constexpr int64_t kUnitsAThread = 4; /* with fewer, splits are jobs of their own */
constexpr int64_t kWorthAThread = 1 << 16; /* products, about 5 us */
constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Range {
  int64_t first, last;
  bool is_empty() const { return first >= last; }
};

Range common(Range a, Range b) { return {std::max(a.first, b.first), std::min(a.last, b.last)}; }

struct Problem {
  const lmi_attention_args &args;
  int64_t num_sequences, num_kv_heads, group, size, padded, block_size;
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

struct Unit {
  int64_t sequence, head, first, rows; /* head: key head; rows first, first + 1, ...: query r / group in head r % group of the group */
};

int64_t query_of(const Problem &problem, const Unit &unit, int64_t row) { return (unit.first + row) / problem.group; }

int64_t head_of(const Problem &problem, const Unit &unit, int64_t row) {
  return unit.head * problem.group + (unit.first + row) % problem.group;
}

/* Keys that any row of the unit sees: both ends grow with the query. */
Range seen_by_unit(const Problem &problem, const Unit &unit) {
  const Range first = problem.seen(unit.sequence, query_of(problem, unit, 0));
  const Range last = problem.seen(unit.sequence, query_of(problem, unit, unit.rows - 1));
  return {first.first, std::max(first.first, last.last)};
}

/* At least one, though it be empty. */
Range splits_of(const Problem &problem, const Unit &unit) {
  const Range keys = seen_by_unit(problem, unit);
  if (keys.is_empty()) return {0, 1};
  return {keys.first / kSplit, (keys.last + kSplit - 1) / kSplit};
}

/* ---- softmax states ---- */

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

/* ---- one tile ---- */

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

/* ---- units ---- */

void read_queries(const Problem &problem, const Unit &unit, Scratch &scratch) {
  const lmi_tensor &q = problem.args.q;
  for (int64_t row = 0; row < unit.rows; ++row) {
    const int64_t token = problem.start(unit.sequence) + query_of(problem, unit, row);
    read_floats(at(q, token, head_of(problem, unit, row)), q.dtype, problem.size, scratch.queries + row * problem.size);
  }
}

/* One split of a unit, from nothing. */
void attend_split(const Problem &problem, const Unit &unit, int64_t split, Scratch &scratch, States states) {
  states.clear(unit.rows, problem.padded);
  const Range needed = seen_by_unit(problem, unit), keys = common(needed, {split * kSplit, (split + 1) * kSplit});
  for (int64_t tile = keys.first / kTile * kTile; tile < keys.last; tile += kTile) {
    read_keys(problem, unit, tile, needed, scratch);
    read_values(problem, unit, tile, needed, scratch);
    int64_t row = 0;
    for (; row + kRegisterRows <= unit.rows; row += kRegisterRows) {
      attend_rows<kRegisterRows>(problem, unit, row, tile, scratch, states);
    }
    for (; row < unit.rows; ++row) attend_rows<1>(problem, unit, row, tile, scratch, states);
  }
}

void write_rows(const Problem &problem, const Unit &unit, const States &states) {
  const lmi_tensor &out = problem.args.out;
  for (int64_t row = 0; row < unit.rows; ++row) {
    float *values = states.values + row * problem.padded;
    const float sum = states.sum[row] == 0.0f ? 1.0f : states.sum[row]; /* a row without keys gives 0 */
    for (int64_t d = 0; d < problem.size; ++d) values[d] /= sum;
    const int64_t token = problem.start(unit.sequence) + query_of(problem, unit, row);
    write_floats(values, out.dtype, problem.size, at(out, token, head_of(problem, unit, row)));
  }
}

/* What an operation is cut into. Later rows of a prompt see more keys, so the longest jobs are the last ones. */
struct Work {
  std::vector<Unit> units;
  int64_t unit_rows = 0;  /* of the largest */
  int64_t num_pairs = 0;  /* of a row and a key, about */
};

Work cut(const Problem &problem) {
  Work work;
  for (int64_t b = 0; b < problem.num_sequences; ++b) {
    const int64_t rows = problem.num_queries(b) * problem.group;
    for (int64_t first = 0; first < rows; first += kUnitRows) {
      const int64_t unit_rows = std::min(kUnitRows, rows - first);
      for (int64_t head = 0; head < problem.num_kv_heads; ++head) work.units.push_back({b, head, first, unit_rows});
      work.unit_rows = std::max(work.unit_rows, unit_rows);
      work.num_pairs += unit_rows * problem.num_kv_heads * problem.num_keys(b);
    }
  }
  return work;
}

/* fn(job, scratch) for each job, the last one first, as threads become free: which thread does it changes no bits. */
template <class Function>
void share_out(const Problem &problem, const Work &work, size_t num_jobs, Function fn) {
  const int64_t jobs = static_cast<int64_t>(num_jobs);
  const bool is_small = work.num_pairs * problem.padded < kWorthAThread;
  std::atomic<int64_t> left{jobs};
  parallel_for(is_small ? 1 : std::min<int64_t>(num_threads(), jobs), 1, [&](int64_t, int64_t) {
    Scratch scratch(problem, work.unit_rows);
    for (int64_t job = --left; job >= 0; job = --left) fn(static_cast<size_t>(job), scratch);
  });
}

void attend_units(const Problem &problem, const Work &work) {
  share_out(problem, work, work.units.size(), [&](size_t job, Scratch &scratch) {
    const Unit &unit = work.units[job];
    States total(scratch.total, work.unit_rows), part(scratch.part, work.unit_rows);
    total.clear(unit.rows, problem.padded);
    read_queries(problem, unit, scratch);
    const Range splits = splits_of(problem, unit);
    for (int64_t split = splits.first; split < splits.last; ++split) {
      attend_split(problem, unit, split, scratch, part);
      merge(total, part, unit.rows, problem.padded);
    }
    write_rows(problem, unit, total);
  });
}

struct SplitJob {
  size_t unit;
  int64_t split;
};

std::vector<SplitJob> cut_splits(const Problem &problem, const Work &work) {
  std::vector<SplitJob> jobs;
  for (size_t unit = 0; unit < work.units.size(); ++unit) {
    const Range splits = splits_of(problem, work.units[unit]);
    for (int64_t split = splits.first; split < splits.last; ++split) jobs.push_back({unit, split});
  }
  return jobs;
}

void attend_splits(const Problem &problem, const Work &work) {
  const std::vector<SplitJob> jobs = cut_splits(problem, work);
  const int64_t floats = States::floats(work.unit_rows, problem.padded);
  Floats memory(floats * static_cast<int64_t>(jobs.size()));
  const auto states_of = [&](size_t job) { return States(memory + static_cast<int64_t>(job) * floats, work.unit_rows); };
  share_out(problem, work, jobs.size(), [&](size_t job, Scratch &scratch) {
    const Unit &unit = work.units[jobs[job].unit];
    read_queries(problem, unit, scratch);
    attend_split(problem, unit, jobs[job].split, scratch, states_of(job));
  });
  for (size_t job = 0; job < jobs.size();) {
    const size_t first = job;
    const Unit &unit = work.units[jobs[first].unit];
    while (++job < jobs.size() && jobs[job].unit == jobs[first].unit) {
      merge(states_of(first), states_of(job), unit.rows, problem.padded);
    }
    write_rows(problem, unit, states_of(first));
  }
}

/* ---- arguments ---- */

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

void check_bias(const lmi_attention_args &args) {
  if (!is_given(args.relative_bias)) return;
  check_dims("relative_bias", args.relative_bias, 2);
  const int64_t buckets = args.relative_bias.size[0];
  check("relative_bias", args.relative_bias, LMI_F32, {{"buckets", buckets}, {"H", args.q.size[1]}});
  require(buckets >= (args.causal ? 2 : 4), "relative_bias must have at least 2 buckets, 4 if not causal");
  check_range("max_distance", args.max_distance, buckets / (args.causal ? 2 : 4) + 1, 1 << 20);
}

void check_shapes(const lmi_attention_args &args) {
  check_dims("q", args.q, 3);
  check_dims("k_cache", args.k_cache, 4);
  check_dims("starts", args.starts, 1);
  check_dims("tables", args.tables, 2);
  const int64_t *q = args.q.size, *cache = args.k_cache.size, sequences = args.starts.size[0] - 1;
  check_float("q", args.q);
  check("out", args.out, args.q.dtype, {{"T", q[0]}, {"H", q[1]}, {"D", q[2]}});
  check("k_cache", args.k_cache, args.q.dtype, {{"N", cache[0]}, {"K", cache[1]}, {"P", cache[2]}, {"D", q[2]}});
  check("v_cache", args.v_cache, args.q.dtype, {{"N", cache[0]}, {"K", cache[1]}, {"P", cache[2]}, {"D", q[2]}});
  check("key_lengths", args.key_lengths, LMI_I32, {{"B", sequences}});
  check("tables", args.tables, LMI_I32, {{"B", sequences}, {"max_blocks", args.tables.size[1]}});
  check_dtype("starts", args.starts, LMI_I32);
  check_starts("starts", args.starts, q[0]);
  check_optional("alibi", args.alibi, LMI_F32, {{"H", q[1]}});
  require(q[2] > 0 && q[2] <= 256 && q[2] % 8 == 0, "D must be a multiple of 8 up to 256");
  require(cache[1] > 0 && q[1] % cache[1] == 0, "K must divide H");
  require(cache[2] > 0, "P must be at least 1");
  require(args.window >= 0, "window must be at least 0");
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

}  // namespace

void attention(const lmi_attention_args &args) {
  check_shapes(args);
  check_bias(args);
  const int64_t size = args.q.size[2], kv_heads = args.k_cache.size[1];
  Problem problem{args, args.starts.size[0] - 1, kv_heads, args.q.size[1] / kv_heads, size, (size + kPad - 1) / kPad * kPad,
                  args.k_cache.size[2], {}};
  for (int64_t b = 0; b < problem.num_sequences; ++b) check_table(problem, b);
  if (is_given(args.relative_bias)) problem.bias = bias_by_distance(args);
  const Work work = cut(problem);
  const bool is_few = static_cast<int64_t>(work.units.size()) < kUnitsAThread * num_threads();
  (is_few ? attend_splits : attend_units)(problem, work);
}

}  // namespace lmi::LMI_LEVEL
