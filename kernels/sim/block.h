/* The thread block that runs: its threads, each a fiber, who is next, and barriers. One block of one launch runs at a time, on one
 * thread of the system; threads change only where one waits. What the wait is for is told to the scheduler, so that a wait which
 * cannot end is a report with the threads' names, not a hang.
 * The order of the threads between two waits is the caller's choice (set_order): forward, reverse, or random, where the order
 * changes with every pass, some warps are held back for a while so that they drift apart, and asynchronous copies land early or
 * late. A missing barrier shows up as a result that differs from one of them to another. */
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sim/copies.h"
#include "sim/fiber.h"
#include "sim/peers.h"
#include "sim/products.h"
#include "sim/vectors.h"

namespace lmi::sim {

constexpr unsigned kWarpSize = 32, kGroupSize = 128; /* threads of a warp, and of the four warps that share a wgmma */

struct Thread {
  Fiber fiber;
  dim3 index;
  unsigned linear = 0, lane = 0, warp = 0;
  bool is_done = true;
  const char *waits_in = nullptr;        /* name of the operation, for the report */
  const uint64_t *watched = nullptr;     /* asleep until *watched != seen; null: awake */
  uint64_t seen = 0;
  CopyGroups copies;
  ProductGroups products;
  std::vector<uint32_t> unfenced;        /* shared memory that it wrote, shared.h */
  std::vector<LateStore> late;           /* what it wrote for other GPUs, peers.h */
  uint64_t num_accesses = 0;             /* of global memory, counters.h */
};

/* Lanes of a warp that do one thing together. */
struct Meeting {
  unsigned mask = 0, num_arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  static constexpr int kMeetings = 8; /* different masks at a time */
  Meeting meetings[kMeetings];
  void *arguments[kWarpSize];
  const char *names[kWarpSize];
};

struct Group {
  unsigned num_arrived = 0, num_registers = 0; /* registers: of a thread, where the group has set them */
  uint64_t generation = 0;
  void *arguments[kGroupSize];
  const char *names[kGroupSize];
};

struct Barrier {
  unsigned num_arrived = 0;
  uint64_t generation = 0;
};

struct Launch {
  const char *kernel;
  dim3 grid, block;
  size_t shared_bytes;
};

extern Thread *current;
extern std::string launched; /* kernels by name, with commas between, while somebody counts (counters.h) */
extern dim3 block_index, block_size, grid_size;

/* Runs body once for each thread of each block, blocks in ascending order. Throws lmi::Error (LMI_DEVICE_ERROR) with a report when
 * the kernel does what a GPU would not survive. */
void launch(const Launch &where, const std::function<void()> &body);

/* "forward", "reverse", "random" or "random:SEED"; false if it is none of these. */
bool set_order(const std::string &name);
std::string order_name();
bool is_random();
uint64_t random_number();

/* Ends the launch with this report; for the thread that runs. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Something happened that others may wait for. */
void note_event();

/* Lets others run until *watched changes; null: until the next pass. */
void wait(const char *operation, const uint64_t *watched);

/* __syncthreads (id 0, all that have not returned) and bar.sync, bar.arrive on a number of threads. */
void sync_threads(const char *operation);
void sync_barrier(unsigned id, unsigned num_threads);
void arrive_barrier(unsigned id, unsigned num_threads);

Warp &current_warp();
Group &current_group();

/* Joins the lanes of mask; true for the last to arrive, which does the work for all and then lets them go (leave). */
bool join_warp(unsigned mask, void *argument, const char *operation);
void leave_warp(unsigned mask);
bool join_group(void *argument, const char *operation);
void leave_group();

/* setmaxnreg, for all 128 threads of a group: a block has 64 K registers in all. */
void set_registers(unsigned num_registers);

/* All lanes of mask hand in an argument, which lies on their own stack; the last to arrive runs together(arguments by lane). */
template <class Argument, class Together>
void with_warp(unsigned mask, Argument &argument, const char *operation, Together together) {
  if (!join_warp(mask, &argument, operation)) return;
  together(reinterpret_cast<Argument **>(current_warp().arguments));
  leave_warp(mask);
}

/* The same for the 128 threads of four warps. */
template <class Argument, class Together>
void with_group(Argument &argument, const char *operation, Together together) {
  if (!join_group(&argument, operation)) return;
  together(reinterpret_cast<Argument **>(current_group().arguments));
  leave_group();
}

}  // namespace lmi::sim
