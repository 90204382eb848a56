#include "common/check.h"

namespace lmi {
namespace {

const char *dtype_name(int32_t dtype) {
  static const char *const names[] = {"F32", "BF16", "F16", "I32", "I64", "U8", "U64", "F8E4M3"};
  return dtype >= LMI_F32 && dtype <= LMI_F8E4M3 ? names[dtype] : "an unknown dtype";
}

std::string shape_text(const lmi_tensor &tensor) {
  std::string text = "[";
  for (int32_t i = 0; i < tensor.dims && i < 4; ++i) text += (i ? ", " : "") + std::to_string(tensor.size[i]);
  return text + "]";
}

std::string shape_text(std::initializer_list<Size> shape) {
  std::string text;
  for (const Size &size : shape) text += (text.empty() ? "[" : ", ") + std::string(size.name) + "=" + std::to_string(size.value);
  return text + "]";
}

bool has_shape(const lmi_tensor &tensor, std::initializer_list<Size> shape) {
  if (tensor.dims != static_cast<int32_t>(shape.size())) return false;
  const int64_t *size = tensor.size;
  for (const Size &wanted : shape) {
    if (*size++ != wanted.value) return false;
  }
  return true;
}

/* What holds for every tensor that is not absent: data where there are elements, stride 1 in the last dimension. */
void check_layout(const char *name, const lmi_tensor &tensor) {
  int64_t elements = 1;
  for (int32_t i = 0; i < tensor.dims; ++i) {
    if (tensor.size[i] < 0) refuse(std::string(name) + " has a negative size: " + shape_text(tensor));
    elements *= tensor.size[i];
  }
  if (elements > 0 && !tensor.data) refuse(std::string(name) + " has no data");
  const int32_t last = tensor.dims - 1;
  if (tensor.size[last] > 1 && tensor.stride[last] != 1) {
    refuse(std::string(name) + " has stride " + std::to_string(tensor.stride[last]) + " in its last dimension; it must be 1");
  }
}

}  // namespace

void refuse(const std::string &message) { throw Error(LMI_BAD_ARGUMENT, message); }

void require(bool holds, const char *message) {
  if (!holds) refuse(message);
}

void check_dims(const char *name, const lmi_tensor &tensor, int32_t dims) {
  if (tensor.dims != dims) {
    const std::string found = tensor.dims == 0 ? "is absent" : "has shape " + shape_text(tensor);
    refuse(std::string(name) + " " + found + "; it must have " + std::to_string(dims) + " dimensions");
  }
  check_layout(name, tensor);
}

void check_shape(const char *name, const lmi_tensor &tensor, std::initializer_list<Size> shape) {
  if (!has_shape(tensor, shape)) {
    const std::string found = tensor.dims == 0 ? "is absent" : "has shape " + shape_text(tensor);
    refuse(std::string(name) + " " + found + "; it must be " + shape_text(shape));
  }
  check_layout(name, tensor);
}

void check_dtype(const char *name, const lmi_tensor &tensor, int32_t dtype) {
  if (tensor.dtype != dtype) {
    refuse(std::string(name) + " is " + dtype_name(tensor.dtype) + "; it must be " + dtype_name(dtype));
  }
}

void check_float(const char *name, const lmi_tensor &tensor) {
  if (tensor.dtype != LMI_F32 && tensor.dtype != LMI_BF16 && tensor.dtype != LMI_F16) {
    refuse(std::string(name) + " is " + dtype_name(tensor.dtype) + "; it must be F32, BF16 or F16");
  }
}

void check_range(const char *name, int64_t value, int64_t minimum, int64_t maximum) {
  if (value < minimum || value > maximum) {
    refuse(std::string(name) + "=" + std::to_string(value) + " must be " + std::to_string(minimum) + " to " + std::to_string(maximum));
  }
}

void check(const char *name, const lmi_tensor &tensor, int32_t dtype, std::initializer_list<Size> shape) {
  check_shape(name, tensor, shape);
  check_dtype(name, tensor, dtype);
}

void check_optional(const char *name, const lmi_tensor &tensor, int32_t dtype, std::initializer_list<Size> shape) {
  if (is_given(tensor)) check(name, tensor, dtype, shape);
}

void check_entries(const char *name, const lmi_tensor &entries, int64_t minimum, int64_t maximum) {
  const int32_t *entry = static_cast<const int32_t *>(entries.data);
  for (int64_t i = 0; i < entries.size[0]; ++i) check_range(name, entry[i], minimum, maximum);
}

void check_starts(const char *name, const lmi_tensor &starts, int64_t last) {
  const int32_t *start = static_cast<const int32_t *>(starts.data);
  const int64_t num = starts.size[0];
  bool ascending = num > 0 && start[0] == 0 && start[num - 1] == last;
  for (int64_t i = 1; ascending && i < num; ++i) ascending = start[i - 1] <= start[i];
  if (!ascending) refuse(std::string(name) + " must ascend from 0 to " + std::to_string(last));
}

bool has_no_gaps(const lmi_tensor &tensor) {
  int64_t step = 1;
  for (int32_t i = tensor.dims - 1; i >= 0; --i) {
    if (tensor.size[i] > 1 && tensor.stride[i] != step) return false;
    step *= tensor.size[i];
  }
  return true;
}

int64_t num_elements(const lmi_tensor &tensor) {
  int64_t num = 1;
  for (int32_t i = 0; i < tensor.dims; ++i) num *= tensor.size[i];
  return num;
}

}  // namespace lmi
