/* The choice of a token. A row is read three or four times and nothing is sorted: the borders of top-k, top-p and typical-p are
 * found by partition (quickselect on weights), and Gumbel noise is computed only where it can win. */
#include <cmath>
#include <vector>

#include "cpu/logits.h"

namespace lmi::LMI_LEVEL {
namespace {

/* logits := those relative to max, which becomes 0 though it be infinite, divided by temperature. */
void shift(float *logits, int64_t n, float max, float temperature) {
  for (int64_t i = 0; i < n; ++i) logits[i] = logits[i] == max ? 0.0f : (logits[i] - max) / temperature;
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

/* Word 0 of Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counter (id, position, 0, 0). */
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

/* l + gumbel(u) > s needs 1 - u < 1 - exp(-e^(l-s)) <= e^l * e^-s: one product instead of two logarithms leaves out most. */
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

  void resize(size_t n) {
    weights.resize(n);
    ids.resize(n);
    entries.resize(n);
  }
};

Candidates candidates_of(float *logits, int64_t n, float max, float temperature, Scratch &scratch) {
  scratch.resize(static_cast<size_t>(n));
  shift(logits, n, max, temperature);
  for (int64_t i = 0; i < n; ++i) scratch.weights[static_cast<size_t>(i)] = exp_of(logits[i]);
  for (int64_t i = 0; i < n; ++i) scratch.ids[static_cast<size_t>(i)] = static_cast<int32_t>(i);
  return {n, logits, scratch.weights.data(), scratch.ids.data()};
}

int32_t choose(const lmi_sample_args &args, int64_t row, Scratch &scratch) {
  float *logits = static_cast<float *>(at(args.logits, row));
  const int64_t n = args.logits.size[1];
  const float max = max_of(logits, n), temperature = floats(args.temperature)[row];
  if (!can_be_drawn(max)) return -1;
  if (temperature == 0.0f) return static_cast<int32_t>(std::find(logits, logits + n, max) - logits);
  Candidates left = candidates_of(logits, n, max, temperature, scratch);
  keep_top_k(left, scratch.entries.data(), integers(args.top_k)[row]);
  keep_top_p(left, scratch.entries.data(), floats(args.top_p)[row]);
  keep_typical(left, scratch.entries.data(), floats(args.typical_p)[row]);
  keep_min_p(left, floats(args.min_p)[row]);
  const Stream stream = {static_cast<const uint64_t *>(args.seeds.data)[row], static_cast<uint32_t>(integers(args.positions)[row])};
  return draw_token(left, stream);
}

void check_wishes(const lmi_sample_args &args) {
  for (int64_t row = 0; row < args.logits.size[0]; ++row) {
    const float temperature = floats(args.temperature)[row], min_p = floats(args.min_p)[row];
    require(temperature >= 0.0f, "temperature must be at least 0");
    require(min_p <= 1.0f, "min_p must be at most 1");
  }
}

}  // namespace

void sample(const lmi_sample_args &args) {
  check_arguments(args);
  check_wishes(args);
  int32_t *ids = static_cast<int32_t *>(args.ids.data);
  parallel_for(args.logits.size[0], rows_a_share(args.logits.size[1]), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t row = begin; row < end; ++row) ids[row] = choose(args, row, scratch);
  });
}

}  // namespace lmi::LMI_LEVEL
