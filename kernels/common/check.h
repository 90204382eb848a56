/* Errors inside a column and the checks that come first in every operation. A check throws; library.cc turns that into
 * a status and this thread's message, so that nothing is thrown across the C line. Compiled once, for any CPU. */
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "lmi_kernels.h"

namespace lmi {

struct Error : std::runtime_error {
  lmi_status status;
  Error(lmi_status status, const std::string &message) : std::runtime_error(message), status(status) {}
};

/* A named size of a shape, as the header writes it: {"T", 4}. */
struct Size {
  const char *name;
  int64_t value;
};

[[noreturn]] void refuse(const std::string &message);
void require(bool holds, const char *message);

inline bool is_given(const lmi_tensor &tensor) { return tensor.dims != 0; }

/* Each throws LMI_BAD_ARGUMENT with a sentence that names the tensor, its shape or dtype, and the rule. A tensor without
 * elements needs no data. The last dimension must have stride 1. */
void check_shape(const char *name, const lmi_tensor &tensor, std::initializer_list<Size> shape);
void check_dims(const char *name, const lmi_tensor &tensor, int32_t dims);
void check_dtype(const char *name, const lmi_tensor &tensor, int32_t dtype);
void check_float(const char *name, const lmi_tensor &tensor); /* F32, BF16 or F16 */
void check_range(const char *name, int64_t value, int64_t minimum, int64_t maximum);

/* Shape and dtype at once; the second does nothing for an absent tensor. */
void check(const char *name, const lmi_tensor &tensor, int32_t dtype, std::initializer_list<Size> shape);
void check_optional(const char *name, const lmi_tensor &tensor, int32_t dtype, std::initializer_list<Size> shape);

/* Each entry of an I32 vector must lie between the two. */
void check_entries(const char *name, const lmi_tensor &entries, int64_t minimum, int64_t maximum);

/* Rows of an I32 vector must be increasing from 0 to `last`: starts of pieces. */
void check_starts(const char *name, const lmi_tensor &starts, int64_t last);

bool has_no_gaps(const lmi_tensor &tensor);
int64_t num_elements(const lmi_tensor &tensor);

/* In hot loops; always inlined, or one level's copy would serve all. */
[[gnu::always_inline]] inline int64_t bytes_of(int32_t dtype) {
  switch (dtype) {
    case LMI_U8:
    case LMI_F8E4M3: return 1;
    case LMI_BF16:
    case LMI_F16: return 2;
    case LMI_F32:
    case LMI_I32: return 4;
    default: return 8;
  }
}

}  // namespace lmi
