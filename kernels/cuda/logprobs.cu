/* Log probabilities, ranks and the best tokens of a row. A block owns a row and reads it about five times, whatever is asked for: for the
 * maximum, for the sum, for the border of the best (logits.cuh) and to pick these out. Bound by the second-level cache, where the row
 * stays. A bad row's values are NaN and its rank is -1; so is an id out of range. */
#include "cuda/logits.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

struct LogProbs {
  Rows<float> logits;
  const int *ids;
  float *values;
  int *ranks;
  Rows<float> top_values;
  Rows<int> top_ids;
  Candidate *best; /* [R,top], scratch */
  int vocabulary, top;
};

/* log_softmax of one logit; the greatest is 0 relative to itself though it be infinite. */
struct LogSoftmax {
  float max;
  double log_sum;

  __device__ float operator()(float logit) const {
    const double relative = logit == max ? 0.0 : static_cast<double>(logit) - static_cast<double>(max);
    return static_cast<float>(relative - log_sum);
  }
};

/* Writes values and ranks. */
template <int kNum>
__device__ LogSoftmax tell_chosen(const LogProbs &wanted, const LogitRow<kNum> &row, float max) {
  const float own = row.logits[wanted.ids[blockIdx.x]];
  double sum = 0.0;
  int larger = 0;
  row.for_each([&](float logit, int) {
    sum += logit == max ? 1.0 : static_cast<double>(expf(logit - max));
    larger += logit > own;
  });
  const LogSoftmax log_softmax{max, log(sum_in_block(sum))};
  larger = sum_in_block(larger);
  if (threadIdx.x == 0) wanted.values[blockIdx.x] = log_softmax(own);
  if (threadIdx.x == 0) wanted.ranks[blockIdx.x] = larger;
  return log_softmax;
}

__device__ __forceinline__ unsigned key_of(float logit) { return ~ascending_bits(logit); }

/* The `top` best of a row in any order. */
template <int kNum>
__device__ void pick_best(const LogitRow<kNum> &row, float max, int top, Candidate *best) {
  LMI_SHARED(DigitSums, sums);
  LMI_SHARED(int, num_picked);
  const auto wanted = [=](unsigned long long) { return static_cast<unsigned long long>(top); };
  const auto coarse = [=](unsigned key) {
    const float logit = of_ascending_bits(~key);
    return digit_of_distance(logit == max ? 0.0f : max - logit);
  };
  const auto walk = [&](auto visit) { row.for_each([&](float logit, int) { visit(key_of(logit), 1); }); };
  const KeyRange border = find_border({key_of(max), key_of(-INFINITY), 0}, sums, walk, coarse, wanted);
  int last_id = row.num - 1;
  if (border.first == border.last) { /* of equal logits the lowest ids */
    const KeyRange ids{0, static_cast<unsigned>(last_id), border.below};
    const auto walk_equal = [&](auto visit) {
      row.for_each([&](float logit, int id) {
        if (key_of(logit) == border.first) visit(static_cast<unsigned>(id), 1);
      });
    };
    last_id = static_cast<int>(find_border(ids, sums, walk_equal, EvenDigits(ids), wanted).last);
  }
  if (threadIdx.x == 0) num_picked = 0;
  __syncthreads();
  row.for_each([&](float logit, int id) {
    const unsigned key = key_of(logit);
    if (key < border.first || (key <= border.last && id <= last_id)) best[atomicAdd(&num_picked, 1)] = {logit, id};
  });
  __syncthreads();
}

/* Each of the picked ones counts those that are better, and knows its place. */
__device__ void tell_best(const LogProbs &wanted, const LogSoftmax &log_softmax, const Candidate *best) {
  for (int i = threadIdx.x; i < wanted.top; i += kRowThreads) {
    const Candidate own = best[i];
    int place = 0;
    for (int j = 0; j < wanted.top; ++j) place += order_of(best[j]) > order_of(own);
    wanted.top_ids.row(blockIdx.x)[place] = own.id;
    wanted.top_values.row(blockIdx.x)[place] = log_softmax(own.logit);
  }
}

__device__ void tell_nothing(const LogProbs &wanted) {
  if (threadIdx.x > 0) return;
  wanted.values[blockIdx.x] = NAN;
  wanted.ranks[blockIdx.x] = -1;
}

template <int kNum>
__global__ void __launch_bounds__(kRowThreads) logprobs_kernel(LogProbs wanted) {
  const LogitRow<kNum> row{wanted.logits.row(blockIdx.x), wanted.vocabulary};
  const int id = wanted.ids[blockIdx.x];
  const float max = best_of_row(row).logit;
  if (!can_be_drawn(max) || id < 0 || id >= row.num) return tell_nothing(wanted);
  const LogSoftmax log_softmax = tell_chosen(wanted, row, max);
  if (wanted.top == 0) return;
  Candidate *const best = wanted.best + int64_t{blockIdx.x} * wanted.top;
  pick_best(row, max, wanted.top, best);
  tell_best(wanted, log_softmax, best);
}

}  // namespace

void logprobs(const lmi_logprobs_args &args, cudaStream_t stream) {
  check_arguments(args);
  const int64_t num_rows = args.logits.size[0], top = is_given(args.top_ids) ? args.top_ids.size[1] : 0;
  const Scratch best(static_cast<size_t>(num_rows * top) * sizeof(Candidate), stream);
  const LogProbs wanted{args.logits,
                        vector_of<int>(args.ids),
                        vector_of<float>(args.values),
                        vector_of<int>(args.ranks),
                        args.top_values,
                        args.top_ids,
                        best.as<Candidate>(),
                        vocabulary_of(args.logits),
                        static_cast<int>(top)};
  with_width<float>(is_wide({&args.logits}), [&](auto num) {
    launch("logprobs", logprobs_kernel<num>, {static_cast<unsigned>(num_rows), kRowThreads}, stream, wanted);
  });
}

}  // namespace lmi::cuda
