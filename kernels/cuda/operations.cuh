/* The operations of this column, in the header's order; library.cu exports each. Errors are thrown (common/check.h). */
#pragma once
#include "common/arguments.h"
#include "common/operations.h"
#include "cuda/device.cuh"

namespace lmi::cuda {

#define LMI_DECLARE(name) void name(const lmi_##name##_args &args, cudaStream_t stream);
LMI_MODEL_OPERATIONS(LMI_DECLARE)
LMI_DECLARE(peer_all_reduce)
#undef LMI_DECLARE

}  // namespace lmi::cuda

namespace lmi::base {

/* What ranks do together is done on the CPU, by the CPU column's sources. */
#define LMI_DECLARE(name) void name(const lmi_##name##_args &args);
LMI_RANK_OPERATIONS(LMI_DECLARE)
#undef LMI_DECLARE

}  // namespace lmi::base
