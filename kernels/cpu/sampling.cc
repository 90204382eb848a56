/* Penalties, choice of a token, log probabilities. A row of logits belongs to one thread. Sums over the vocabulary are made of
 * blocks of 64 in float, added in double in ascending order. Choosing reads a row three or four times and sorts nothing: borders of
 * top-k, top-p and typical-p are found by halving (quickselect on weights), and Gumbel noise is computed only where it can win. */
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/math.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kRowsAShare = 64; /* penalties touch few logits of a row */
constexpr float kNever = -std::numeric_limits<float>::infinity();

const float *floats(const lmi_tensor &tensor) { return static_cast<const float *>(tensor.data); }

/* fn(begin, end) for shares of the rows; it returns the first row that it cannot do, or end. The first of those is refused. */
template <class Function>
void for_rows(int64_t rows, int64_t columns, Function fn) {
  std::atomic<int64_t> first_bad{rows};
  parallel_for(rows, rows_a_share(columns), [&](int64_t begin, int64_t end) {
    const int64_t bad = fn(begin, end);
    int64_t seen = first_bad.load();
    while (bad < end && bad < seen && !first_bad.compare_exchange_weak(seen, bad)) continue;
  });
  if (first_bad.load() == rows) return;
  refuse("row " + std::to_string(first_bad.load()) + " of logits has a NaN, or no logit above -infinity");
}

/* ---- sums over a row ---- */

/* The greatest logit; NaN if there is one among them. */
float max_of(const float *logits, int64_t n) {
  float max[kBlock];
  int32_t nan[kBlock] = {};
  std::fill_n(max, kBlock, kNever);
  const auto look = [&](int64_t i, int64_t size) {
    for (int64_t j = 0; j < size; ++j) {
      max[j] = logits[i + j] > max[j] ? logits[i + j] : max[j];
      nan[j] |= logits[i + j] != logits[i + j];
    }
  };
  for (int64_t i = 0; i + kBlock <= n; i += kBlock) look(i, kBlock);
  look(n / kBlock * kBlock, n % kBlock);
  const bool has_nan = std::any_of(nan, nan + kBlock, [](int32_t lane) { return lane != 0; });
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : *std::max_element(max, max + kBlock);
}

bool can_be_drawn(float max) { return max > kNever; /* false for NaN */ }

template <class Term>
double sum_block(int64_t first, int64_t size, Term term) {
  float terms[kBlock] = {};
  for (int64_t j = 0; j < size; ++j) terms[j] = term(first + j);
  for (int64_t half = kBlock / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) terms[j] += terms[j + half];
  }
  return static_cast<double>(terms[0]);
}

/* sum of term(i) for i < n */
template <class Term>
double sum_terms(int64_t n, Term term) {
  double total = 0.0;
  for (int64_t i = 0; i + kBlock <= n; i += kBlock) total += sum_block(i, kBlock, term);
  return total + sum_block(n / kBlock * kBlock, n % kBlock, term);
}

/* logits := those relative to max, which becomes 0 though it be infinite, divided by temperature. */
void shift(float *logits, int64_t n, float max, float temperature) {
  for (int64_t i = 0; i < n; ++i) logits[i] = logits[i] == max ? 0.0f : (logits[i] - max) / temperature;
}

/* ---- penalties ---- */

void penalize_history(const lmi_penalize_args &args, int64_t row, float *logits) {
  const float repetition = floats(args.repetition)[row];
  const float presence = floats(args.presence)[row], frequency = floats(args.frequency)[row];
  for (int64_t i = integers(args.history_starts)[row]; i < integers(args.history_starts)[row + 1]; ++i) {
    float &logit = logits[integers(args.history_ids)[i]];
    const float count = static_cast<float>(integers(args.history_counts)[i]);
    logit = logit > 0.0f ? logit / repetition : logit * repetition;
    logit -= frequency * count + (count > 0.0f ? presence : 0.0f);
  }
}

void add_bias(const lmi_penalize_args &args, int64_t row, float *logits) {
  for (int64_t i = integers(args.bias_starts)[row]; i < integers(args.bias_starts)[row + 1]; ++i) {
    logits[integers(args.bias_ids)[i]] += floats(args.bias_values)[i];
  }
}

/* starts: I32 [R+1] over ids: I32 [entries] below V. */
void check_pieces(const std::string &name, const lmi_tensor &starts, const lmi_tensor &ids, const lmi_tensor &logits) {
  check_dims((name + "_ids").c_str(), ids, 1);
  check_dtype((name + "_ids").c_str(), ids, LMI_I32);
  check((name + "_starts").c_str(), starts, LMI_I32, {{"R+1", logits.size[0] + 1}});
  check_starts((name + "_starts").c_str(), starts, ids.size[0]);
  for (int64_t i = 0; i < ids.size[0]; ++i) {
    const int64_t id = integers(ids)[i];
    if (id < 0 || id >= logits.size[1]) refuse(name + "_ids has " + std::to_string(id) + "; ids are 0 to V-1");
  }
}

void check_penalties(const lmi_penalize_args &args) {
  const int64_t rows = args.logits.size[0];
  if (is_given(args.history_starts)) {
    check_pieces("history", args.history_starts, args.history_ids, args.logits);
    check("history_counts", args.history_counts, LMI_I32, {{"entries", args.history_ids.size[0]}});
    check("repetition", args.repetition, LMI_F32, {{"R", rows}});
    check("presence", args.presence, LMI_F32, {{"R", rows}});
    check("frequency", args.frequency, LMI_F32, {{"R", rows}});
  }
  if (is_given(args.bias_starts)) {
    check_pieces("bias", args.bias_starts, args.bias_ids, args.logits);
    check("bias_values", args.bias_values, LMI_F32, {{"entries", args.bias_ids.size[0]}});
  }
}

/* ---- what is left to draw from ---- */

/* Tokens in the order of their ids: logits relative to the greatest, weights e^logit. Left-out tokens are squeezed out in place. */
struct Candidates {
  int64_t num;
  float *logits, *weights;
  int32_t *ids;

  template <class Keep>
  void keep_if(Keep keep) {
    int64_t kept = 0;
    for (int64_t i = 0; i < num; ++i) {
      const bool stays = keep(i);
      logits[kept] = logits[i];
      weights[kept] = weights[i];
      ids[kept] = ids[i];
      kept += stays;
    }
    num = kept;
  }

  double sum() const {
    return sum_terms(num, [&](int64_t i) { return weights[i]; });
  }
};

struct Entry {
  float key, weight;
};

/* Brings the keys of [first,last) that are below, at and above the middle one of three in this order. */
struct Thirds {
  Entry *at, *above;
  float pivot;
};

Thirds partition(Entry *first, Entry *last) {
  const float a = first->key, b = first[(last - first) / 2].key, c = last[-1].key;
  const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
  Entry *at = std::partition(first, last, [&](const Entry &entry) { return entry.key < pivot; });
  Entry *above = std::partition(at, last, [&](const Entry &entry) { return entry.key == pivot; });
  return {at, above, pivot};
}

double sum_of(const Entry *first, const Entry *last) {
  double sum = 0.0;
  for (; first < last; ++first) sum += static_cast<double>(first->weight);
  return sum;
}

/* The smallest key at which the weights, added in ascending order of keys, reach `wanted`; the greatest key if they do not. */
float border(Entry *first, Entry *last, double wanted) {
  for (double below = 0.0;;) {
    const Thirds thirds = partition(first, last);
    const double less = below + sum_of(first, thirds.at), upto = less + sum_of(thirds.at, thirds.above);
    if (thirds.at > first && less >= wanted) {
      last = thirds.at;
    } else if (thirds.above == last || upto >= wanted) {
      return thirds.pivot;
    } else {
      first = thirds.above;
      below = upto;
    }
  }
}

/* Keeps the smallest keys whose weights first reach `wanted`, and all that are equal to the greatest of them. */
template <class Key, class Weight>
void keep_smallest(Candidates &left, Entry *entries, double wanted, Key key, Weight weight) {
  for (int64_t i = 0; i < left.num; ++i) entries[i] = {key(i), weight(i)};
  const float greatest = border(entries, entries + left.num, wanted);
  left.keep_if([&](int64_t i) { return key(i) <= greatest; });
}

void keep_top_k(Candidates &left, Entry *entries, int64_t top_k) {
  if (top_k <= 0 || top_k >= left.num) return;
  const auto key = [&](int64_t i) { return -left.logits[i]; };
  keep_smallest(left, entries, static_cast<double>(top_k), key, [](int64_t) { return 1.0f; });
}

void keep_top_p(Candidates &left, Entry *entries, float top_p) {
  if (!(top_p < 1.0f)) return;
  const auto key = [&](int64_t i) { return -left.logits[i]; };
  keep_smallest(left, entries, static_cast<double>(top_p) * left.sum(), key, [&](int64_t i) { return left.weights[i]; });
}

/* With p = w / W: entropy = log W - sum(w l) / W, so that -log p - entropy = sum(w l) / W - l. */
void keep_typical(Candidates &left, Entry *entries, float typical_p) {
  if (!(typical_p < 1.0f)) return;
  const double total = left.sum();
  const auto product = [&](int64_t i) { return left.weights[i] > 0.0f ? left.weights[i] * left.logits[i] : 0.0f; };
  const double mean = sum_terms(left.num, product) / total;
  const auto key = [&](int64_t i) { return static_cast<float>(std::abs(mean - static_cast<double>(left.logits[i]))); };
  keep_smallest(left, entries, static_cast<double>(typical_p) * total, key, [&](int64_t i) { return left.weights[i]; });
}

void keep_min_p(Candidates &left, float min_p) {
  if (!(min_p > 0.0f)) return;
  const float least = min_p * *std::max_element(left.weights, left.weights + left.num);
  left.keep_if([&](int64_t i) { return left.weights[i] >= least; });
}

/* ---- random numbers ---- */

struct Stream {
  uint64_t seed;
  uint32_t position;
};

/* Word 0 of Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with counter (id, position, 0, 0). */
inline uint32_t philox(Stream stream, uint32_t id) {
  uint32_t c0 = id, c1 = stream.position, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

double gumbel(uint32_t word) { return -std::log(-std::log((static_cast<double>(word) + 0.5) * 0x1p-32)); }

/* The best of l + gumbel so far; equal ones go to the lower id. */
struct Draw {
  double score;
  int32_t id;

  void offer(double other, int32_t other_id) {
    if (other > score || (other == score && other_id < id)) *this = {other, other_id};
  }
};

/* l + gumbel(u) > s needs 1 - u < 1 - exp(-e^(l-s)) <= e^l * e^-s: one product instead of two logarithms leaves out all but a few. */
void draw_block(const Candidates &left, Stream stream, int64_t first, int64_t size, Draw &draw) {
  uint32_t words[kBlock];
  int32_t may_win[kBlock];
  const float reach = static_cast<float>(std::exp(-draw.score) * 1.001); /* a bit more, for what is rounded here */
  for (int64_t j = 0; j < size; ++j) words[j] = philox(stream, static_cast<uint32_t>(left.ids[first + j]));
  for (int64_t j = 0; j < size; ++j) {
    const float tail = static_cast<float>(static_cast<int32_t>(~words[j] >> 1)) * 0x1p-31f; /* at most 1 - u */
    may_win[j] = tail <= left.weights[first + j] * reach;
  }
  for (int64_t j = 0; j < size; ++j) {
    const int64_t i = first + j;
    if (may_win[j]) draw.offer(static_cast<double>(left.logits[i]) + gumbel(words[j]), left.ids[i]);
  }
}

int32_t draw_token(const Candidates &left, Stream stream) {
  const int64_t likeliest = std::max_element(left.logits, left.logits + left.num) - left.logits;
  const int32_t id = left.ids[likeliest];
  Draw draw{static_cast<double>(left.logits[likeliest]) + gumbel(philox(stream, static_cast<uint32_t>(id))), id};
  for (int64_t i = 0; i + kBlock <= left.num; i += kBlock) draw_block(left, stream, i, kBlock, draw);
  draw_block(left, stream, left.num / kBlock * kBlock, left.num % kBlock, draw);
  return draw.id;
}

/* ---- one row ---- */

struct Scratch {
  std::vector<float> weights;
  std::vector<int32_t> ids;
  std::vector<Entry> entries;
  explicit Scratch(size_t n) : weights(n), ids(n), entries(n) {}
};

Candidates candidates_of(float *logits, int64_t n, float max, float temperature, Scratch &scratch) {
  shift(logits, n, max, temperature);
  for (int64_t i = 0; i < n; ++i) scratch.weights[static_cast<size_t>(i)] = exp_of(logits[i]);
  for (int64_t i = 0; i < n; ++i) scratch.ids[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  return {n, logits, scratch.weights.data(), scratch.ids.data()};
}

/* False if the row's logits cannot be drawn from. */
bool choose(const lmi_sample_args &args, int64_t row, Scratch &scratch) {
  float *logits = static_cast<float *>(at(args.logits, row));
  int32_t &id = static_cast<int32_t *>(args.ids.data)[row];
  const int64_t n = args.logits.size[1];
  const float max = max_of(logits, n), temperature = floats(args.temperature)[row];
  if (!can_be_drawn(max)) return false;
  if (temperature == 0.0f) {
    id = static_cast<int32_t>(std::find(logits, logits + n, max) - logits);
    return true;
  }
  Candidates left = candidates_of(logits, n, max, temperature, scratch);
  keep_top_k(left, scratch.entries.data(), integers(args.top_k)[row]);
  keep_top_p(left, scratch.entries.data(), floats(args.top_p)[row]);
  keep_typical(left, scratch.entries.data(), floats(args.typical_p)[row]);
  keep_min_p(left, floats(args.min_p)[row]);
  const Stream stream = {static_cast<const uint64_t *>(args.seeds.data)[row], static_cast<uint32_t>(integers(args.positions)[row])};
  id = draw_token(left, stream);
  return true;
}

void check_logits(const lmi_tensor &logits) {
  check_dims("logits", logits, 2);
  check_dtype("logits", logits, LMI_F32);
  require(logits.size[1] > 0, "V must be at least 1");
}

void check_choice(const lmi_sample_args &args) {
  check_logits(args.logits);
  const Size rows = {"R", args.logits.size[0]};
  check("temperature", args.temperature, LMI_F32, {rows});
  check("top_k", args.top_k, LMI_I32, {rows});
  check("top_p", args.top_p, LMI_F32, {rows});
  check("typical_p", args.typical_p, LMI_F32, {rows});
  check("min_p", args.min_p, LMI_F32, {rows});
  check("seeds", args.seeds, LMI_U64, {rows});
  check("positions", args.positions, LMI_I32, {rows});
  check("ids", args.ids, LMI_I32, {rows});
  for (int64_t row = 0; row < rows.value; ++row) {
    const float temperature = floats(args.temperature)[row], min_p = floats(args.min_p)[row];
    if (!(temperature >= 0.0f)) refuse("row " + std::to_string(row) + " has a negative temperature");
    if (!(min_p <= 1.0f)) refuse("row " + std::to_string(row) + " has min_p above 1, which leaves no token");
  }
}

/* ---- log probabilities ---- */

/* log_softmax(logits)[i] = (logits[i] relative to max) - log(sum of e^those) */
struct LogSoftmax {
  const float *logits;
  float max;
  double log_sum;

  LogSoftmax(const float *logits, int64_t n, float max) : logits(logits), max(max), log_sum(std::log(sum(n))) {}
  double sum(int64_t n) const {
    return sum_terms(n, [&](int64_t i) { return logits[i] == max ? 1.0f : exp_of(logits[i] - max); });
  }
  float operator()(int64_t id) const {
    const double relative = logits[id] == max ? 0.0 : static_cast<double>(logits[id]) - static_cast<double>(max);
    return static_cast<float>(relative - log_sum);
  }
};

int32_t rank_of(const float *logits, int64_t n, float logit) {
  int32_t larger = 0;
  for (int64_t i = 0; i < n; ++i) larger += logits[i] > logit;
  return larger;
}

/* The `num` best ids, best first: a heap with the worst of them in front. */
std::vector<int32_t> best_ids(const float *logits, int64_t n, int64_t num) {
  const auto is_better = [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  std::vector<int32_t> best;
  for (int32_t id = 0; id < n && num > 0; ++id) {
    const bool is_full = static_cast<int64_t>(best.size()) == num;
    if (is_full && !(logits[id] > logits[best.front()])) continue;
    if (is_full) {
      std::pop_heap(best.begin(), best.end(), is_better);
      best.pop_back();
    }
    best.push_back(id);
    std::push_heap(best.begin(), best.end(), is_better);
  }
  std::sort_heap(best.begin(), best.end(), is_better);
  return best;
}

bool tell(const lmi_logprobs_args &args, int64_t row) {
  const float *logits = static_cast<const float *>(at(args.logits, row));
  const int64_t n = args.logits.size[1];
  const float max = max_of(logits, n);
  if (!can_be_drawn(max)) return false;
  const LogSoftmax log_softmax(logits, n, max);
  const int32_t id = integers(args.ids)[row];
  static_cast<float *>(args.values.data)[row] = log_softmax(id);
  static_cast<int32_t *>(args.ranks.data)[row] = rank_of(logits, n, logits[id]);
  if (!is_given(args.top_ids)) return true;
  const std::vector<int32_t> best = best_ids(logits, n, args.top_ids.size[1]);
  float *values = static_cast<float *>(at(args.top_values, row));
  std::copy(best.begin(), best.end(), static_cast<int32_t *>(at(args.top_ids, row)));
  for (size_t i = 0; i < best.size(); ++i) values[i] = log_softmax(best[i]);
  return true;
}

void check_logprobs(const lmi_logprobs_args &args) {
  check_logits(args.logits);
  const Size rows = {"R", args.logits.size[0]};
  check("ids", args.ids, LMI_I32, {rows});
  check("values", args.values, LMI_F32, {rows});
  check("ranks", args.ranks, LMI_I32, {rows});
  for (int64_t row = 0; row < rows.value; ++row) check_range("ids", integers(args.ids)[row], 0, args.logits.size[1] - 1);
  if (!is_given(args.top_ids)) return;
  check_dims("top_ids", args.top_ids, 2);
  check_range("top", args.top_ids.size[1], 0, args.logits.size[1]);
  check("top_ids", args.top_ids, LMI_I32, {rows, {"top", args.top_ids.size[1]}});
  check("top_values", args.top_values, LMI_F32, {rows, {"top", args.top_ids.size[1]}});
}

}  // namespace

void penalize(const lmi_penalize_args &args) {
  check_logits(args.logits);
  check_penalties(args);
  parallel_for(args.logits.size[0], kRowsAShare, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float *logits = static_cast<float *>(at(args.logits, row));
      if (is_given(args.history_starts)) penalize_history(args, row, logits);
      if (is_given(args.bias_starts)) add_bias(args, row, logits);
    }
  });
}

void sample(const lmi_sample_args &args) {
  check_choice(args);
  for_rows(args.logits.size[0], args.logits.size[1], [&](int64_t begin, int64_t end) {
    Scratch scratch(static_cast<size_t>(args.logits.size[1]));
    while (begin < end && choose(args, begin, scratch)) ++begin;
    return begin;
  });
}

void logprobs(const lmi_logprobs_args &args) {
  check_logprobs(args);
  for_rows(args.logits.size[0], args.logits.size[1], [&](int64_t begin, int64_t end) {
    while (begin < end && tell(args, begin)) ++begin;
    return begin;
  });
}

}  // namespace lmi::LMI_LEVEL
