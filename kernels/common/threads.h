/* The threads that share an operation. A job is cut into fixed shares, one a thread, so which thread does a row is a
 * function of the sizes alone; no operation's bits depend on it. Compiled once, for any CPU. */
#pragma once
#include <cstdint>

namespace lmi {

void set_threads(int32_t num_threads);
int32_t num_threads();

/* Runs body(context, begin, end) over [0, n) in at most num_threads() shares of at least `grain` items; returns when all have
 * run. May be called from any thread (one job at a time, others wait) and from inside a body (then it runs alone). The
 * first exception of a share is thrown here, after the others have ended. */
void run_shares(int64_t n, int64_t grain, void (*body)(void *, int64_t, int64_t), void *context);

/* fn(begin, end). grain: items that are too little work to wake a thread for (about 5 us). */
template <class Function>
void parallel_for(int64_t n, int64_t grain, Function fn) {
  run_shares(
      n, grain, [](void *context, int64_t begin, int64_t end) { (*static_cast<Function *>(context))(begin, end); }, &fn);
}

}  // namespace lmi
