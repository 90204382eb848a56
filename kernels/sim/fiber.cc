#include "sim/fiber.h"

#include <sys/mman.h>

#include <new>

#include "sim/poison.h"

namespace lmi::sim {
namespace {

constexpr size_t kGuardBytes = 4096; /* below the stack: an overflow is a fault, not a wrong result */

char *new_stack() {
  void *memory = mmap(nullptr, Fiber::kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char *>(memory);
}

#if !defined(LMI_SIM_UCONTEXT)
/* Registers that a call preserves go to the old stack and come from the new one. noipa: GCC must not look inside and conclude that
 * other registers survive. */
__attribute__((naked, noinline, noipa)) void change_stack(void **, void *) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}
#endif

}  // namespace

Fiber::~Fiber() {
  if (stack_) munmap(stack_, kStackBytes);
}

#if defined(LMI_SIM_UCONTEXT)
void Fiber::start(void (*entry)()) {
  if (!stack_) stack_ = new_stack();
  unpoison(stack_ + kGuardBytes, kStackBytes - kGuardBytes);
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_ + kGuardBytes;
  context_.uc_stack.ss_size = kStackBytes - kGuardBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::change(Fiber &from, Fiber &to) { swapcontext(&from.context_, &to.context_); }
#else
void Fiber::start(void (*entry)()) {
  if (!stack_) stack_ = new_stack();
  unpoison(stack_ + kGuardBytes, kStackBytes - kGuardBytes);
  void **top = reinterpret_cast<void **>(stack_ + kStackBytes - 64);
  *--top = nullptr; /* a return address for entry, which it never uses: keeps the stack aligned as a call does */
  *--top = reinterpret_cast<void *>(entry);
  top_ = top - 6;
}

void Fiber::change(Fiber &from, Fiber &to) { change_stack(&from.top_, to.top_); }
#endif

}  // namespace lmi::sim
