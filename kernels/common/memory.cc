#include "common/memory.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lmi {
namespace {

constexpr std::align_val_t kLine{64};
constexpr std::uintptr_t kPage = 4096;

class Piece {
 public:
  ~Piece() { ::operator delete(data_, kLine); }

  float *floats(int64_t num) {
    if (num > size_ || kExact) {
      ::operator delete(data_, kLine);
      data_ = nullptr; /* for the case that there is no more */
      size_ = 0;
      data_ = static_cast<float *>(::operator new(static_cast<size_t>(num) * sizeof(float), kLine));
      size_ = num;
    }
    return data_;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kExact = true; /* so that the sanitizer knows where it ends */
#else
  static constexpr bool kExact = false;
#endif
  float *data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace

float *kept_floats(Purpose purpose, int64_t num) {
  static thread_local Piece pieces[static_cast<int>(Purpose::kCount)];
  return pieces[static_cast<int>(purpose)].floats(num);
}

void ask_for_huge_pages(void *data, int64_t num_bytes) {
#if defined(__linux__)
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(num_bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE); /* a wish: no matter if it is refused */
#else
  (void)data;
  (void)num_bytes;
#endif
}

}  // namespace lmi
