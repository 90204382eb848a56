/* What a thread says to its CPU while it looks at an atomic again and again. */
#pragma once

namespace lmi {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace lmi
