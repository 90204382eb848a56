/* What the header says of each operation's argument struct: which tensors must be there, their shapes and dtypes, the numbers. The
 * same in every column, compiled once. What the entries of integer tensors hold is a column's own business: the CPU's looks at them,
 * one on a device passes over those out of range, since nobody has seen them before the call returns. */
#pragma once
#include "common/check.h"

namespace lmi {

/* Of a weight to be packed; the header says what the fields mean. */
struct LinearShape {
  int64_t out_features, in_features, group;
  int32_t dtype, format, gated;
};

template <class Args>
LinearShape shape_of(const Args &args) {
  return {args.out_features, args.in_features, args.group, args.dtype, args.format, args.gated};
}

/* Empty if it can be packed, else what stands against it. */
const char *why_unsupported(const LinearShape &shape);

/* Each throws LMI_BAD_ARGUMENT. packed_bytes: of one weight in the column's layout. */
void check_arguments(const lmi_rms_norm_args &args);
void check_arguments(const lmi_layer_norm_args &args);
void check_arguments(const lmi_rotary_args &args);
void check_arguments(const lmi_attention_args &args);
void check_arguments(const lmi_linear_pack_args &args, int64_t packed_bytes);
void check_arguments(const lmi_linear_args &args, int64_t packed_bytes);
void check_arguments(const lmi_grouped_linear_args &args, int64_t packed_bytes);
void check_arguments(const lmi_lora_args &args);
void check_arguments(const lmi_activation_args &args);
void check_arguments(const lmi_embedding_args &args);
void check_arguments(const lmi_moe_route_args &args);
void check_arguments(const lmi_moe_gather_args &args);
void check_arguments(const lmi_moe_combine_args &args);
void check_arguments(const lmi_penalize_args &args);
void check_arguments(const lmi_sample_args &args);
void check_arguments(const lmi_logprobs_args &args);

/* Pairs a token in `order`, of T * top_k entries; 1 where there are no tokens. */
int64_t top_k_of(const lmi_tensor &order, int64_t num_tokens);

}  // namespace lmi
