/* Penalties and bias: few logits of each row, in place. A block owns a row; entries out of range are passed over. */
#include "cuda/logits.cuh"
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kThreads = 128;

struct Penalties {
  Rows<float> logits;
  const int *history_starts, *history_ids, *history_counts;
  const float *repetition, *presence, *frequency;
  const int *bias_starts, *bias_ids;
  const float *bias_values;
  int vocabulary;
};

/* An id stands once in a history, so each logit has one thread. */
__device__ void penalize_history(const Penalties &given, int64_t row, float *logits) {
  const float repetition = given.repetition[row], presence = given.presence[row], frequency = given.frequency[row];
  for (int i = given.history_starts[row] + threadIdx.x; i < given.history_starts[row + 1]; i += kThreads) {
    const int id = given.history_ids[i];
    if (id < 0 || id >= given.vocabulary) continue;
    const float count = static_cast<float>(given.history_counts[i]), logit = logits[id];
    logits[id] = (logit > 0.0f ? logit / repetition : logit * repetition) - (frequency * count + (count > 0.0f ? presence : 0.0f));
  }
}

__global__ void penalize_kernel(Penalties given) {
  const int64_t row = blockIdx.x;
  float *const logits = given.logits.row(row);
  if (given.history_starts) penalize_history(given, row, logits);
  if (!given.bias_starts) return;
  __syncthreads(); /* a bias may be on an id of the history */
  /* one thread: an id may come twice, and floats are added in the order of the list */
  if (threadIdx.x > 0) return;
  for (int i = given.bias_starts[row]; i < given.bias_starts[row + 1]; ++i) {
    const int id = given.bias_ids[i];
    if (id >= 0 && id < given.vocabulary) logits[id] += given.bias_values[i];
  }
}

}  // namespace

void penalize(const lmi_penalize_args &args, cudaStream_t stream) {
  check_arguments(args);
  const Penalties given{args.logits,
                        vector_of<int>(args.history_starts),
                        vector_of<int>(args.history_ids),
                        vector_of<int>(args.history_counts),
                        vector_of<float>(args.repetition),
                        vector_of<float>(args.presence),
                        vector_of<float>(args.frequency),
                        vector_of<int>(args.bias_starts),
                        vector_of<int>(args.bias_ids),
                        vector_of<float>(args.bias_values),
                        vocabulary_of(args.logits)};
  launch("penalize", penalize_kernel, {static_cast<unsigned>(args.logits.size[0]), kThreads}, stream, given);
}

}  // namespace lmi::cuda
