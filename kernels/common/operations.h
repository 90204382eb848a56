/* The operations of the column, in the header's order. One level implements each as `void name(const lmi_name_args &)` in its
 * namespace (errors are thrown, check.h) and offers them as a table; library.cc exports lmi_name and calls the table of the level
 * that this machine runs. */
#pragma once
#include "lmi_kernels.h"

#define LMI_RANK_OPERATIONS(DO) DO(all_reduce) DO(gather)
#define LMI_MODEL_OPERATIONS(DO)                                                                                        \
  DO(rms_norm) DO(layer_norm) DO(rotary) DO(attention) DO(linear_pack) DO(linear) DO(grouped_linear) DO(lora)           \
  DO(activation) DO(embedding) DO(moe_route) DO(moe_gather) DO(moe_combine) DO(penalize) DO(sample) DO(logprobs)
#define LMI_OPERATIONS(DO) LMI_MODEL_OPERATIONS(DO) LMI_RANK_OPERATIONS(DO)

namespace lmi {

struct Operations {
#define LMI_MEMBER(name) void (*name)(const lmi_##name##_args &);
  LMI_OPERATIONS(LMI_MEMBER)
#undef LMI_MEMBER
};

#define LMI_LEVELS(DO) DO(base) DO(avx2) DO(avx512) DO(avx512bf16) DO(amx)

#define LMI_TABLE(level)               \
  namespace level {                    \
  extern const Operations operations;  \
  }
LMI_LEVELS(LMI_TABLE)
#undef LMI_TABLE

}  // namespace lmi
