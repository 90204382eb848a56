/* Rows of tensors as floats: how operations look at their arguments without a template a dtype. */
#pragma once
#include <memory>
#include <new>

#include "common/check.h"
#include "common/dtype.h"
#include "common/threads.h"

namespace lmi::LMI_LEVEL {

/* n floats of scratch, uninitialised, on a cache line. */
class Floats {
 public:
  explicit Floats(int64_t n) : data_(static_cast<float *>(::operator new(static_cast<size_t>(n) * sizeof(float), kLine))) {}
  ~Floats() { ::operator delete(data_, kLine); }
  Floats(const Floats &) = delete;
  Floats &operator=(const Floats &) = delete;
  operator float *() { return data_; }
  operator const float *() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  float *data_;
};

/* Address of element [i,j,k,0]; indices beyond the tensor's dimensions are left out. */
inline void *at(const lmi_tensor &tensor, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t element = i * tensor.stride[0] + j * tensor.stride[1] + k * tensor.stride[2];
  return static_cast<char *>(tensor.data) + element * bytes_of(tensor.dtype);
}

inline void read_row(const lmi_tensor &tensor, int64_t row, float *to) {
  read_floats(at(tensor, row), tensor.dtype, tensor.size[1], to);
}

inline void write_row(const float *from, const lmi_tensor &tensor, int64_t row) {
  write_floats(from, tensor.dtype, tensor.size[1], at(tensor, row));
}

inline void read_vector(const lmi_tensor &tensor, float *to) {
  read_floats(tensor.data, tensor.dtype, tensor.size[0], to);
}

inline const int32_t *integers(const lmi_tensor &tensor) { return static_cast<const int32_t *>(tensor.data); }

/* Rows that make a share worth a thread, for an operation that touches about `elements` numbers a row. */
inline int64_t rows_a_share(int64_t elements) { return elements > 16384 ? 1 : 16384 / (elements + 1) + 1; }

}  // namespace lmi::LMI_LEVEL
