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

}  // namespace lmi::LMI_LEVEL
