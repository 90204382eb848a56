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

void check_pieces(const std::string &name, const lmi_tensor &starts, const lmi_tensor &ids, const lmi_tensor &logits) {
  check_dims((name + "_ids").c_str(), ids, 1);
  check_dtype((name + "_ids").c_str(), ids, LMI_I32);
  check((name + "_starts").c_str(), starts, LMI_I32, {{"R+1", logits.size[0] + 1}});
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

}  // namespace

void penalize(const lmi_penalize_args &args, cudaStream_t stream) {
  check_logits(args.logits);
  check_penalties(args);
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
                        static_cast<int>(args.logits.size[1])};
  launch("penalize", penalize_kernel, {static_cast<unsigned>(args.logits.size[0]), kThreads}, stream, given);
}

}  // namespace lmi::cuda
