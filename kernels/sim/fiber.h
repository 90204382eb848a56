/* Fibers: functions with a stack of their own that hand the CPU to each other by name. On x86-64 a switch is 15 instructions (about
 * 3 ns), elsewhere, or with LMI_SIM_UCONTEXT, the C library's. */
#pragma once
#include <cstddef>

#if !defined(__x86_64__) && !defined(LMI_SIM_UCONTEXT)
#define LMI_SIM_UCONTEXT
#endif
#if defined(LMI_SIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace lmi::sim {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  /* A fiber that stands for the caller's own stack. */
  Fiber() = default;
  Fiber(const Fiber &) = delete;
  Fiber &operator=(const Fiber &) = delete;
  ~Fiber();

  /* The next switch to it calls `entry`, which must not return, on an empty stack; what it ran before is forgotten. */
  void start(void (*entry)());

  /* Goes on with `to`; returns when somebody switches back to `from`, which must be the one that runs. */
  static void change(Fiber &from, Fiber &to);

 private:
  char *stack_ = nullptr;
#if defined(LMI_SIM_UCONTEXT)
  ucontext_t context_ = {};
#else
  void *top_ = nullptr;
#endif
};

}  // namespace lmi::sim
