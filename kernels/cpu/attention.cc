/* Attention over blocks, for prefill and decode alike. Who owns what: a unit is up to 64 rows (a row is one query in one head) of
 * one sequence and one key head, or of several heads where each has few rows; it walks over the tiles of 64 keys that any of its rows
 * sees, a tile in one head after the other, fetches a tile's keys and values once for all of its head's rows (as floats or, at levels
 * with dot products of bf16, as pairs), and keeps an online softmax per row. A split of 512 keys starts its softmax anew; splits are
 * merged in ascending order. A row's bits depend only on its query and on the keys it sees: each product is added to its own sum in
 * the order of d or of j, four rows side by side in registers or one alone, and a key that a row does not see is not added at all.
 * Where there are few units, each split is a job of its own and the merge follows. Bound by arithmetic in prefill, by the reading of
 * the cache in decode. */
#include <atomic>

#include "cpu/attention_tile.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kUnitsAThread = 4;       /* with fewer, splits are jobs of their own */
constexpr int64_t kTileGroup = 4; /* query heads a key head from which on tiles are faster: a decode's row alone leaves them empty */
constexpr int64_t kWorthAThread = 1 << 16; /* products, about 5 us */

template <class Numbers>
void read_queries(const Problem &problem, const Unit &unit, Scratch<Numbers> &scratch) {
  const lmi_tensor &q = problem.args.q;
  scratch.turn_to(0);
  for_rows(problem, unit, [&](int64_t row, int64_t query, int64_t head) {
    scratch.about[row] = {head, problem.position(unit.sequence, query), problem.seen(unit.sequence, query)};
    const void *from = at(q, problem.start(unit.sequence) + query, head);
    Numbers::read_query(from, q.dtype, problem.size, scratch.queries + row * scratch.row_words);
  });
}

/* Where a split of a unit begins. */
Place begin_of(const Problem &problem, const Unit &unit, int64_t split) {
  const Range needed = seen_by_unit(problem, unit);
  return {&unit, unit.head, std::max(needed.first, split * kSplit) / kTile * kTile, needed};
}

/* One split of a unit, from nothing. following: where this thread will most likely be next. */
template <class Numbers>
void attend_split(const Problem &problem, const Unit &unit, int64_t split, const Place &following, Scratch<Numbers> &scratch,
                  States states) {
  states.clear(unit.num_rows(), problem.padded);
  Place place = begin_of(problem, unit, split);
  const int64_t last = std::min(place.needed.last, (split + 1) * kSplit);
  while (place.tile < last) {
    const int64_t tile = place.tile, row = place.first_row();
    const TileCache cache(problem, place);
    scratch.turn_to(row);
    place.go_on();
    TileCache next(problem, place.tile < last ? place : following);
    Numbers::read_keys(problem, cache.keys, scratch, next);
    Numbers::read_values(problem, cache.values, scratch, next);
    attend_tile(problem, unit.rows, tile, cache, scratch, States(states, row, problem.padded), next);
    next.ask_for_rest();
  }
}

void write_rows(const Problem &problem, const Unit &unit, const States &states) {
  const lmi_tensor &out = problem.args.out;
  for_rows(problem, unit, [&](int64_t row, int64_t query, int64_t head) {
    float *values = states.values + row * problem.padded;
    const float factor = states.sum[row] == 0.0f ? 1.0f : problem.v_scale / states.sum[row]; /* a row without keys gives 0 */
    for (int64_t d = 0; d < problem.size; ++d) values[d] *= factor;
    write_floats(values, out.dtype, problem.size, at(out, problem.start(unit.sequence) + query, head));
  });
}

/* What an operation is cut into. Later rows of a prompt see more keys, so the longest jobs are the last ones. */
struct Work {
  std::vector<Unit> units;
  int64_t unit_rows = 0;  /* of the largest */
  int64_t num_pairs = 0;  /* of a row and a key, about */
};

/* Keys, once for each key head, that a unit may read so that there are units enough to share out. */
int64_t keys_a_unit(const Problem &problem) {
  int64_t num_keys = 0;
  for (int64_t b = 0; b < problem.num_sequences; ++b) num_keys += problem.num_keys(b);
  return num_keys * problem.num_kv_heads / (kUnitsAThread * num_threads());
}

Work cut(const Problem &problem) {
  Work work;
  const int64_t most = keys_a_unit(problem);
  for (int64_t b = 0; b < problem.num_sequences; ++b) {
    const int64_t rows = problem.num_queries(b) * problem.group;
    for (int64_t first = 0; first < rows; first += kUnitRows) {
      const int64_t unit_rows = std::min(kUnitRows, rows - first);
      const int64_t room = std::min(problem.num_kv_heads, kUnitRows / unit_rows);
      const int64_t num_heads = std::clamp<int64_t>(most / (problem.num_keys(b) + 1), 1, room);
      for (int64_t end = problem.num_kv_heads; end > 0; end -= num_heads) { /* the first heads' turn comes first: it is the last job's */
        const int64_t head = std::max<int64_t>(0, end - num_heads);
        work.units.push_back({b, head, end - head, first, unit_rows});
      }
      work.unit_rows = std::max(work.unit_rows, num_heads * unit_rows);
      work.num_pairs += unit_rows * problem.num_kv_heads * problem.num_keys(b);
    }
  }
  return work;
}

/* fn(job, likely, scratch) for each job, the last one first, as threads become free: which thread does it changes no bits. likely: the
 * job that this thread will most likely do next, or -1. */
template <class Numbers, class Function>
void share_out(const Problem &problem, const Work &work, size_t num_jobs, Function fn) {
  const int64_t jobs = static_cast<int64_t>(num_jobs);
  const bool is_small = work.num_pairs * problem.padded < kWorthAThread;
  std::atomic<int64_t> left{jobs};
  parallel_for(is_small ? 1 : std::min<int64_t>(num_threads(), jobs), 1, [&](int64_t, int64_t) {
    Scratch<Numbers> scratch(problem, work.unit_rows);
    for (int64_t job = --left; job >= 0; job = --left) fn(job, std::max<int64_t>(left, 0) - 1, scratch);
  });
}

template <class Numbers>
void attend_units(const Problem &problem, const Work &work) {
  const auto begin_of_unit = [&](int64_t index) {
    if (index < 0) return Place{};
    const Unit &unit = work.units[static_cast<size_t>(index)];
    return begin_of(problem, unit, splits_of(problem, unit).first);
  };
  share_out<Numbers>(problem, work, work.units.size(), [&](int64_t job, int64_t likely, Scratch<Numbers> &scratch) {
    const Unit &unit = work.units[static_cast<size_t>(job)];
    States total(scratch.total, work.unit_rows), part(scratch.part, work.unit_rows);
    read_queries(problem, unit, scratch);
    const Range splits = splits_of(problem, unit);
    for (int64_t split = splits.first; split < splits.last; ++split) {
      const bool is_last = split + 1 == splits.last;
      const Place following = is_last ? begin_of_unit(likely) : begin_of(problem, unit, split + 1);
      attend_split(problem, unit, split, following, scratch, split == splits.first ? total : part);
      if (split > splits.first) merge(total, part, unit.num_rows(), problem.padded);
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

template <class Numbers>
void attend_splits(const Problem &problem, const Work &work) {
  const std::vector<SplitJob> jobs = cut_splits(problem, work);
  const int64_t floats = States::floats(work.unit_rows, problem.padded);
  float *memory = kept_floats(Purpose::kParts, floats * static_cast<int64_t>(jobs.size()));
  const auto states_of = [&](size_t job) { return States(memory + static_cast<int64_t>(job) * floats, work.unit_rows); };
  share_out<Numbers>(problem, work, jobs.size(), [&](int64_t job, int64_t likely, Scratch<Numbers> &scratch) {
    const auto job_at = [&](int64_t index) { return jobs[static_cast<size_t>(index)]; };
    const auto unit_of = [&](int64_t index) -> const Unit & { return work.units[job_at(index).unit]; };
    const Unit &unit = unit_of(job);
    read_queries(problem, unit, scratch);
    const Place following = likely < 0 ? Place{} : begin_of(problem, unit_of(likely), job_at(likely).split);
    attend_split(problem, unit, job_at(job).split, following, scratch, states_of(static_cast<size_t>(job)));
  });
  for (size_t job = 0; job < jobs.size();) {
    const size_t first = job;
    const Unit &unit = work.units[jobs[first].unit];
    while (++job < jobs.size() && jobs[job].unit == jobs[first].unit) {
      merge(states_of(first), states_of(job), unit.num_rows(), problem.padded);
    }
    write_rows(problem, unit, states_of(first));
  }
}

template <class Numbers>
void attend(const Problem &problem) {
  const Work work = cut(problem);
  const bool is_few = static_cast<int64_t>(work.units.size()) < kUnitsAThread * num_threads();
  (is_few ? attend_splits<Numbers> : attend_units<Numbers>)(problem, work);
}

}  // namespace

void attention(const lmi_attention_args &args) {
  const Problem problem = problem_of(args);
#if defined(LMI_AMX)
  if (args.q.dtype == LMI_BF16 && problem.group >= kTileGroup) return attend<AmxNumbers>(problem);
#endif
#if defined(__AVX512BF16__)
  if (args.q.dtype == LMI_BF16) return attend<PairNumbers>(problem);
#endif
  attend<FloatNumbers>(problem);
}

}  // namespace lmi::LMI_LEVEL
