/* AddressSanitizer's marks, where the library is built with it: memory that nobody may touch. Else nothing. */
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace lmi::sim {

#if defined(__SANITIZE_ADDRESS__)
inline void poison(const void *from, size_t num_bytes) { __asan_poison_memory_region(from, num_bytes); }
inline void unpoison(const void *from, size_t num_bytes) { __asan_unpoison_memory_region(from, num_bytes); }
#else
inline void poison(const void *, size_t) {}
inline void unpoison(const void *, size_t) {}
#endif

}  // namespace lmi::sim
