/* Log probabilities, ranks and the best tokens of a row. A block owns a row and reads it once for each wanted token and twice more;
 * bound by the second-level cache, where the row stays. A bad row's values are NaN and its rank is -1; so is an id out of range. */
#include "cuda/logits.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

struct LogProbs {
  Rows<const float> logits;
  const int *ids;
  float *values;
  int *ranks;
  Rows<float> top_values;
  Rows<int> top_ids;
  int vocabulary, top;
};

/* log_softmax of one logit; the greatest is 0 relative to itself though it be infinite. */
__device__ float log_softmax(float logit, float max, double log_sum) {
  const double relative = logit == max ? 0.0 : static_cast<double>(logit) - static_cast<double>(max);
  return static_cast<float>(relative - log_sum);
}

__device__ double log_sum_of(const float *logits, int num, float max) {
  double sum = 0.0;
  for_logits(logits, num, [&](float logit, int) { sum += logit == max ? 1.0 : static_cast<double>(expf(logit - max)); });
  return log(sum_in_block(sum));
}

/* The best of those that come after `last` in descending order. */
__device__ Candidate next_best(const float *logits, int num, Candidate last) {
  Candidate best{-INFINITY, num};
  for_logits(logits, num, [&](float logit, int id) {
    if (logit < last.logit || (logit == last.logit && id > last.id)) best = better(best, {logit, id});
  });
  return best_in_block(best);
}

__device__ void tell_nothing(const LogProbs &wanted, int64_t row) {
  if (threadIdx.x > 0) return;
  wanted.values[row] = NAN;
  wanted.ranks[row] = -1;
}

__global__ void logprobs_kernel(LogProbs wanted) {
  const int64_t row = blockIdx.x;
  const float *const logits = wanted.logits.row(row);
  const int num = wanted.vocabulary, id = wanted.ids[row];
  const Candidate first = best_of_row(logits, num);
  if (!can_be_drawn(first.logit) || id < 0 || id >= num) return tell_nothing(wanted, row);
  const double log_sum = log_sum_of(logits, num, first.logit);
  const float logit = logits[id];
  int larger = 0;
  for_logits(logits, num, [&](float other, int) { larger += other > logit; });
  larger = sum_in_block(larger);
  if (threadIdx.x == 0) wanted.values[row] = log_softmax(logit, first.logit, log_sum);
  if (threadIdx.x == 0) wanted.ranks[row] = larger;
  Candidate best = first;
  for (int j = 0; j < wanted.top; ++j) {
    if (threadIdx.x == 0) wanted.top_ids.row(row)[j] = best.id;
    if (threadIdx.x == 0) wanted.top_values.row(row)[j] = log_softmax(best.logit, first.logit, log_sum);
    best = next_best(logits, num, best);
  }
}

}  // namespace

void logprobs(const lmi_logprobs_args &args, cudaStream_t stream) {
  check_arguments(args);
  const LogProbs wanted{args.logits,
                        vector_of<int>(args.ids),
                        vector_of<float>(args.values),
                        vector_of<int>(args.ranks),
                        args.top_values,
                        args.top_ids,
                        vocabulary_of(args.logits),
                        is_given(args.top_ids) ? static_cast<int>(args.top_ids.size[1]) : 0};
  launch("logprobs", logprobs_kernel, {static_cast<unsigned>(args.logits.size[0]), kRowThreads}, stream, wanted);
}

}  // namespace lmi::cuda
