/* A pool of sleeping threads. A thread that waits looks at an atomic for a moment (a decode step has hundreds of jobs
 * microseconds apart) and then sleeps on a condition variable, so that an idle server costs nothing. */
#include "common/threads.h"

#include "common/relax.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace lmi {
namespace {

constexpr int kSpins = 2000; /* 20 to 60 us */

template <class Condition>
bool spin_until(Condition holds) {
  for (int i = 0; i < kSpins; ++i) {
    if (holds()) return true;
    relax();
  }
  return holds();
}

/* Ties this thread to the share-th CPU that the process may use, if there are as many as shares: otherwise two threads may share one
 * for 8 ms before the system moves one of them. The caller's thread is not ours to tie; the system finds it the CPU that is left. */
void stay_on_cpu(int32_t share, int32_t num_shares) {
#if defined(__linux__)
  cpu_set_t allowed, own;
  if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) != num_shares) return;
  int cpu = 0;
  for (int32_t left = share; !CPU_ISSET(cpu, &allowed) || left-- > 0;) ++cpu;
  CPU_ZERO(&own);
  CPU_SET(cpu, &own);
  sched_setaffinity(0, sizeof own, &own); /* a wish: no matter if it is refused */
#else
  (void)share;
  (void)num_shares;
#endif
}

struct Job {
  void (*body)(void *, int64_t, int64_t) = nullptr;
  void *context = nullptr;
  int64_t n = 0;
  int32_t shares = 0;
  bool is_last = false; /* the threads end after it */

  void run(int32_t share) const {
    const int64_t begin = n * share / shares, end = n * (share + 1) / shares;
    if (begin < end) body(context, begin, end);
  }
};

thread_local bool inside_share = false;

class Pool {
 public:
  explicit Pool(int32_t num_workers) : num_workers_(num_workers) {
    for (int32_t i = 0; i < num_workers; ++i) std::thread([this, i] { work(i + 1); }).detach();
  }

  void run(const Job &job) {
    std::lock_guard<std::mutex> one_job_at_a_time(entry_);
    failure_ = nullptr;
    post(job);
    run_share(0);
    wait_for_workers();
    if (failure_) std::rethrow_exception(failure_);
  }

  /* Ends the workers; the pool itself stays, since a worker may still look at it. */
  void stop() {
    std::lock_guard<std::mutex> one_job_at_a_time(entry_);
    Job last;
    last.is_last = true;
    post(last);
    wait_for_workers();
  }

 private:
  void post(const Job &job) {
    job_ = job;
    running_.store(num_workers_, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void wait_for_workers() {
    const auto all_done = [this] { return running_.load(std::memory_order_acquire) == 0; };
    if (spin_until(all_done)) return;
    std::unique_lock<std::mutex> lock(sleep_);
    done_.wait(lock, all_done);
  }

  void work(int32_t share) {
    stay_on_cpu(share, num_workers_ + 1);
    bool is_last = false;
    for (uint64_t seen = 0; !is_last; ++seen) {
      const auto posted = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(posted)) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, posted);
      }
      run_share(share);
      is_last = job_.is_last; /* before the count goes down: then the next job may come */
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(sleep_);
        done_.notify_one();
      }
    }
  }

  void run_share(int32_t share) {
    if (share >= job_.shares) return;
    inside_share = true;
    try {
      job_.run(share);
    } catch (...) {
      std::lock_guard<std::mutex> lock(sleep_);
      if (!failure_) failure_ = std::current_exception();
    }
    inside_share = false;
  }

  const int32_t num_workers_;
  Job job_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int32_t> running_{0};
  std::exception_ptr failure_;
  std::mutex entry_, sleep_;
  std::condition_variable wake_, done_;
};

std::atomic<int32_t> wanted_threads{1};
std::mutex pool_mutex;
Pool *pool = nullptr; /* never deleted: its threads may outlive the library's static objects */

/* A fork copies the pool but not its threads: the child starts one of its own when it first needs it. */
void forget_pool_in_child() {
  pool = nullptr;
  inside_share = false;
  new (&pool_mutex) std::mutex;
}

Pool &current_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
  (void)registered;
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (!pool) pool = new Pool(wanted_threads - 1);
  return *pool;
}

}  // namespace

void set_threads(int32_t num_threads) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (num_threads == wanted_threads) return;
  if (pool) pool->stop();
  pool = nullptr;
  wanted_threads = num_threads;
}

int32_t num_threads() { return wanted_threads; }

void run_shares(int64_t n, int64_t grain, void (*body)(void *, int64_t, int64_t), void *context) {
  const int64_t shares = std::min<int64_t>(wanted_threads, n / std::max<int64_t>(grain, 1));
  if (shares <= 1 || inside_share) {
    if (n > 0) body(context, 0, n);
    return;
  }
  current_pool().run({body, context, n, static_cast<int32_t>(shares), false});
}

}  // namespace lmi
