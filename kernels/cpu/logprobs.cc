/* Log probabilities, ranks and the best tokens of a row. */
#include <cmath>
#include <vector>

#include "cpu/logits.h"

namespace lmi::LMI_LEVEL {
namespace {

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

void tell(const lmi_logprobs_args &args, int64_t row) {
  const float *logits = static_cast<const float *>(at(args.logits, row));
  const int64_t n = args.logits.size[1];
  const int32_t id = integers(args.ids)[row];
  float &value = static_cast<float *>(args.values.data)[row];
  int32_t &rank = static_cast<int32_t *>(args.ranks.data)[row];
  const float max = max_of(logits, n);
  if (!can_be_drawn(max) || id < 0 || id >= n) {
    value = std::numeric_limits<float>::quiet_NaN();
    rank = -1;
    return;
  }
  const LogSoftmax log_softmax(logits, n, max);
  value = log_softmax(id);
  rank = rank_of(logits, n, logits[id]);
  if (!is_given(args.top_ids)) return;
  const std::vector<int32_t> best = best_ids(logits, n, args.top_ids.size[1]);
  float *values = static_cast<float *>(at(args.top_values, row));
  std::copy(best.begin(), best.end(), static_cast<int32_t *>(at(args.top_ids, row)));
  for (size_t i = 0; i < best.size(); ++i) values[i] = log_softmax(best[i]);
}

}  // namespace

void logprobs(const lmi_logprobs_args &args) {
  check_arguments(args);
  parallel_for(args.logits.size[0], rows_a_share(args.logits.size[1]), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) tell(args, row);
  });
}

}  // namespace lmi::LMI_LEVEL
