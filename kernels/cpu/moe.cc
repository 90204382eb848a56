/* Mixture of experts: which experts a token goes to, its rows ordered by expert, and the weighted sum of what they gave. */
#include <cstring>
#include <vector>

#include "common/arguments.h"
#include "common/math.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

float softmax(float *p, int64_t num) {
  float largest = p[0], sum = 0.0f;
  for (int64_t x = 1; x < num; ++x) largest = p[x] > largest ? p[x] : largest;
  for (int64_t x = 0; x < num; ++x) p[x] = exp_of(p[x] - largest);
  for (int64_t x = 0; x < num; ++x) sum += p[x];
  for (int64_t x = 0; x < num; ++x) p[x] /= sum;
  return sum;
}

/* The expert with the largest logit among those that are not taken; the lowest of equals. */
int32_t best_expert(const float *logits, const std::vector<bool> &taken) {
  int32_t best = -1;
  for (int32_t x = 0; x < static_cast<int32_t>(taken.size()); ++x) {
    if (!taken[x] && (best < 0 || logits[x] > logits[best])) best = x;
  }
  return best;
}

void route_token(const lmi_moe_route_args &args, int64_t token, float *logits, float *p) {
  const int64_t num_experts = args.logits.size[1], top_k = args.experts.size[1];
  float *weights = static_cast<float *>(at(args.weights, token));
  int32_t *experts = static_cast<int32_t *>(at(args.experts, token));
  read_row(args.logits, token, logits);
  std::memcpy(p, logits, static_cast<size_t>(num_experts) * sizeof(float));
  softmax(p, num_experts);
  std::vector<bool> taken(static_cast<size_t>(num_experts));
  float sum = 0.0f;
  for (int64_t j = 0; j < top_k; ++j) {
    experts[j] = best_expert(logits, taken);
    taken[experts[j]] = true;
    weights[j] = p[experts[j]];
    sum += weights[j];
  }
  for (int64_t j = 0; args.renormalize && j < top_k; ++j) weights[j] /= sum;
}

/* Counting sort of the pairs by expert; equal experts keep the order of their pairs. */
void order_pairs(const lmi_moe_route_args &args) {
  const int64_t top_k = args.experts.size[1], num_experts = args.logits.size[1];
  int32_t *starts = static_cast<int32_t *>(args.starts.data), *order = static_cast<int32_t *>(args.order.data);
  const auto expert_of = [&](int64_t pair) { return static_cast<const int32_t *>(at(args.experts, pair / top_k))[pair % top_k]; };
  std::memset(starts, 0, static_cast<size_t>(num_experts + 1) * sizeof(int32_t));
  for (int64_t pair = 0; pair < args.order.size[0]; ++pair) ++starts[expert_of(pair) + 1];
  for (int64_t x = 0; x < num_experts; ++x) starts[x + 1] += starts[x];
  std::vector<int32_t> next(starts, starts + num_experts);
  for (int64_t pair = 0; pair < args.order.size[0]; ++pair) order[next[expert_of(pair)]++] = static_cast<int32_t>(pair);
}

/* top_k, from the number of pairs; every entry of order must be a pair. */
}  // namespace

void moe_route(const lmi_moe_route_args &args) {
  check_arguments(args);
  const int64_t num_tokens = args.logits.size[0], num_experts = args.logits.size[1];
  parallel_for(num_tokens, rows_a_share(8 * num_experts), [&](int64_t begin, int64_t end) {
    Floats logits(num_experts), p(num_experts);
    for (int64_t token = begin; token < end; ++token) route_token(args, token, logits, p);
  });
  order_pairs(args);
}

void moe_gather(const lmi_moe_gather_args &args) {
  check_arguments(args);
  check_entries("an entry of order", args.order, 0, args.order.size[0] - 1);
  const int64_t top_k = top_k_of(args.order, args.x.size[0]);
  const size_t row_bytes = static_cast<size_t>(args.x.size[1] * bytes_of(args.x.dtype));
  parallel_for(args.order.size[0], rows_a_share(args.x.size[1]), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(at(args.out, i), at(args.x, integers(args.order)[i] / top_k), row_bytes);
  });
}

void moe_combine(const lmi_moe_combine_args &args) {
  check_arguments(args);
  check_entries("an entry of order", args.order, 0, args.order.size[0] - 1);
  const int64_t num_tokens = args.out.size[0], num = args.out.size[1], top_k = top_k_of(args.order, num_tokens);
  std::vector<int64_t> places(static_cast<size_t>(args.order.size[0]));
  for (int64_t i = 0; i < args.order.size[0]; ++i) places[integers(args.order)[i]] = i;
  parallel_for(num_tokens, rows_a_share(top_k * num), [&](int64_t begin, int64_t end) {
    Floats sum(num), row(num);
    for (int64_t t = begin; t < end; ++t) {
      const float *weights = static_cast<const float *>(at(args.weights, t));
      for (int64_t e = 0; e < num; ++e) sum[e] = 0.0f;
      for (int64_t j = 0; j < top_k; ++j) {
        read_row(args.y, places[t * top_k + j], row);
        for (int64_t e = 0; e < num; ++e) sum[e] += weights[j] * row[e];
      }
      if (is_given(args.residual)) {
        read_row(args.residual, t, row);
        for (int64_t e = 0; e < num; ++e) sum[e] += row[e];
      }
      write_row(sum, args.out, t);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
