/* The calls of a recorded forward, one after the other. An operation that fails has left its sentence; what follows it is not run. */
#include "lmi_kernels.h"

lmi_status lmi_replay(const lmi_call *calls, int64_t num_calls, lmi_stream stream) {
  using Operation = lmi_status (*)(const void *, lmi_stream); /* any of the header's: their first arguments are all pointers */
  for (int64_t i = 0; i < num_calls; ++i) {
    const lmi_status status = reinterpret_cast<Operation>(calls[i].operation)(calls[i].args, stream);
    if (status != LMI_OK) return status;
  }
  return LMI_OK;
}
