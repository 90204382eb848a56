/* Penalties and bias: few logits of each row, in place. */
#include "cpu/logits.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kRowsAShare = 64;

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

/* starts over ids below V. */
void check_pieces(const std::string &name, const lmi_tensor &starts, const lmi_tensor &ids, int64_t vocabulary) {
  if (!is_given(starts)) return;
  check_starts((name + "_starts").c_str(), starts, ids.size[0]);
  for (int64_t i = 0; i < ids.size[0]; ++i) {
    const int64_t id = integers(ids)[i];
    if (id < 0 || id >= vocabulary) refuse(name + "_ids has " + std::to_string(id) + "; ids are 0 to V-1");
  }
}

}  // namespace

void penalize(const lmi_penalize_args &args) {
  check_arguments(args);
  check_pieces("history", args.history_starts, args.history_ids, args.logits.size[1]);
  check_pieces("bias", args.bias_starts, args.bias_ids, args.logits.size[1]);
  parallel_for(args.logits.size[0], kRowsAShare, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float *logits = static_cast<float *>(at(args.logits, row));
      if (is_given(args.history_starts)) penalize_history(args, row, logits);
      if (is_given(args.bias_starts)) add_bias(args, row, logits);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
