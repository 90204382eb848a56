#include "sim/block.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#include "common/check.h"
#include "sim/counters.h"
#include "sim/mbarrier.h"
#include "sim/shared.h"

namespace lmi::sim {

Thread *current = nullptr;
std::string launched;
dim3 block_index, block_size, grid_size;

namespace {

constexpr unsigned kMaxThreads = 1024, kBarriers = 16;
constexpr int kIdlePasses = 100; /* passes over all threads in which nothing happens, before it is called a deadlock */
constexpr int kMaxNamed = 8;     /* threads that a report names */

enum class Order { kForward, kReverse, kRandom };

struct Block {
  std::unique_ptr<Thread[]> threads{new Thread[kMaxThreads]};
  unsigned num_threads = 0, num_live = 0;
  Warp warps[kMaxThreads / kWarpSize];
  Group groups[kMaxThreads / kGroupSize];
  Barrier barriers[kBarriers];
  Fiber host;
  const char *kernel = "";
  const std::function<void()> *body = nullptr;
  std::string report; /* of what went wrong */

  /* the pass over the threads */
  std::vector<unsigned> order;
  unsigned position = 0;
  uint64_t num_events = 0, events_before = 0;
  int idle_passes = 0;
  uint32_t held_warps = 0; /* random order: kept waiting for some passes */
  int held_passes = 0;
};

std::mutex one_launch_at_a_time;
Order order = Order::kForward;
uint64_t random_seed = 1, random_state = 1;

Block &block() {
  static Block *const only = new Block; /* never deleted: fibers may hold what static objects own */
  return *only;
}

std::string where() {
  const Block &b = block();
  const std::string place = std::to_string(block_index.x) + "," + std::to_string(block_index.y) + "," + std::to_string(block_index.z);
  return std::string(b.kernel) + ", block (" + place + ")";
}

[[noreturn]] void leave(const std::string &report) {
  Block &b = block();
  b.report = report;
  Fiber::change(current->fiber, b.host);
  __builtin_unreachable();
}

[[noreturn]] void report_deadlock() {
  const Block &b = block();
  std::string text = "deadlock in " + where() + ": " + std::to_string(b.num_live) + " threads wait:";
  int named = 0;
  for (unsigned i = 0; i < b.num_threads && named < kMaxNamed; ++i) {
    const Thread &thread = b.threads[i];
    if (thread.is_done) continue;
    text += " t" + std::to_string(i) + " in " + (thread.waits_in ? thread.waits_in : "nothing") + ";";
    ++named;
  }
  leave(text);
}

/* ---- who is next ---- */

void hold_warps_back(bool is_idle) {
  Block &b = block();
  if (!is_idle && --b.held_passes >= 0) return;
  b.held_passes = static_cast<int>(1 + random_number() % 64);
  b.held_warps = is_idle ? 0 : static_cast<uint32_t>(random_number() & (random_number() >> 32));
}

void begin_pass() {
  Block &b = block();
  const bool is_idle = b.num_events == b.events_before;
  b.idle_passes = is_idle ? b.idle_passes + 1 : 0;
  if (b.idle_passes > kIdlePasses) report_deadlock();
  b.events_before = b.num_events;
  b.position = 0;
  if (order != Order::kRandom) return;
  for (unsigned i = b.num_threads - 1; i > 0; --i) std::swap(b.order[i], b.order[random_number() % (i + 1)]);
  hold_warps_back(is_idle);
}

bool can_run(const Thread &thread) {
  if (thread.is_done || (block().held_warps >> thread.warp & 1)) return false;
  return !thread.watched || *thread.watched != thread.seen;
}

Thread &next_thread() {
  Block &b = block();
  for (;; begin_pass()) {
    while (b.position < b.num_threads) {
      Thread &thread = b.threads[b.order[b.position++]];
      if (can_run(thread)) return thread;
    }
  }
}

void run(Thread &next) {
  Thread *const me = current;
  if (&next == me) return;
  current = &next;
  Fiber::change(me->fiber, next.fiber);
}

/* ---- a thread's life ---- */

void open_if_full(Barrier &barrier, unsigned num_threads) {
  if (barrier.num_arrived == 0 || barrier.num_arrived < num_threads) return;
  barrier.num_arrived = 0;
  ++barrier.generation;
  note_event();
  Block &b = block();
  for (unsigned i = 0; &barrier == b.barriers && i < b.num_threads; ++i) order_late_stores(b.threads[i]);
}

void thread_main() {
  Block &b = block();
  (*b.body)();
  if (current->products.are_pending()) fail("returns while its products are on their way");
  current->is_done = true;
  --b.num_live;
  note_event();
  open_if_full(b.barriers[0], b.num_live); /* who has returned is not waited for */
  if (b.num_live > 0) run(next_thread());
  else Fiber::change(current->fiber, b.host);
  __builtin_unreachable();
}

void start_threads() {
  Block &b = block();
  for (unsigned i = 0; i < kMaxThreads; ++i) clear_written(b.threads[i]); /* of a larger block before, too */
  for (unsigned i = 0; i < b.num_threads; ++i) {
    Thread &thread = b.threads[i];
    thread.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    thread.linear = i;
    thread.lane = i % kWarpSize;
    thread.warp = i / kWarpSize;
    thread.is_done = false;
    thread.waits_in = nullptr;
    thread.watched = nullptr;
    thread.num_accesses = 0;
    thread.copies.clear();
    thread.products.clear();
    thread.late.clear();
    thread.fiber.start(thread_main);
    b.order[i] = order == Order::kReverse ? b.num_threads - 1 - i : i;
  }
  b.num_live = b.num_threads;
}

void run_block(size_t shared_bytes) {
  Block &b = block();
  for (Warp &warp : b.warps) warp = Warp();
  for (Group &group : b.groups) group = Group();
  for (Barrier &barrier : b.barriers) barrier = Barrier();
  clear_bulk();
  clear_mbarriers();
  clear_counting();
  clear_shared(shared_bytes);
  start_threads();
  b.position = b.num_threads;
  b.num_events = 1;
  b.events_before = 0;
  b.idle_passes = 0;
  b.held_warps = 0;
  b.held_passes = 0;
  begin_pass();
  current = &next_thread();
  Fiber::change(b.host, current->fiber);
  current = nullptr;
  for (unsigned i = 0; i < b.num_threads; ++i) land_late_stores(b.threads[i]);
  if (!b.report.empty()) throw Error(LMI_DEVICE_ERROR, std::exchange(b.report, {}));
  finish_counting();
  if (num_bulk() > 0) throw Error(LMI_DEVICE_ERROR, where() + ": a bulk copy is on its way when the block ends");
  if (const std::string damage = shared_damage(); !damage.empty()) throw Error(LMI_DEVICE_ERROR, where() + ": " + damage);
}

void check_launch(const Launch &launch) {
  const uint64_t num_threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t num_blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const bool fits = num_threads >= 1 && num_threads <= kMaxThreads && num_blocks >= 1 && launch.grid.y <= 65535 &&
                    launch.grid.z <= 65535 && launch.shared_bytes <= kMaxShared;
  if (fits) return;
  throw Error(LMI_DEVICE_ERROR, std::string(launch.kernel) + ": a launch of " + std::to_string(num_blocks) + " blocks of " +
                                    std::to_string(num_threads) + " threads with " + std::to_string(launch.shared_bytes) +
                                    " bytes of shared memory is more than a GPU takes");
}

}  // namespace

void launch(const Launch &launch, const std::function<void()> &body) {
  check_launch(launch);
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Block &b = block();
  b.kernel = launch.kernel;
  if (is_counting) launched += (launched.empty() ? "" : ",") + std::string(launch.kernel);
  b.body = &body;
  b.num_threads = launch.block.x * launch.block.y * launch.block.z;
  b.order.resize(b.num_threads);
  block_size = launch.block;
  grid_size = launch.grid;
  random_state = random_seed;
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; ++x) {
        block_index = dim3(x, y, z);
        run_block(launch.shared_bytes);
      }
    }
  }
}

bool set_order(const std::string &name) {
  const std::string kind = name.substr(0, name.find(':'));
  if (name == "forward") order = Order::kForward;
  else if (name == "reverse") order = Order::kReverse;
  else if (kind == "random") order = Order::kRandom;
  else return false;
  const uint64_t seed = name.size() > kind.size() ? std::strtoull(name.c_str() + kind.size() + 1, nullptr, 10) : 0;
  random_seed = (seed + 1) * 0x9E3779B97F4A7C15u;
  return true;
}

std::string order_name() {
  return order == Order::kForward ? "forward" : order == Order::kReverse ? "reverse" : "random";
}

bool is_random() { return order == Order::kRandom; }

uint64_t random_number() { /* xorshift64 (Marsaglia 2003) */
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void fail(const char *format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  leave(where() + ", thread " + std::to_string(current->linear) + ": " + text);
}

void note_event() { ++block().num_events; }

void wait(const char *operation, const uint64_t *watched) {
  Thread *const me = current;
  me->waits_in = operation;
  me->watched = watched;
  me->seen = watched ? *watched : 0;
  do run(next_thread());
  while (watched && *watched == me->seen);
  me->watched = nullptr;
  me->waits_in = nullptr;
}

/* ---- barriers ---- */

void sync_threads(const char *operation) {
  Block &b = block();
  Barrier &barrier = b.barriers[0];
  ++barrier.num_arrived;
  note_event();
  const uint64_t before = barrier.generation;
  open_if_full(barrier, b.num_live);
  if (barrier.generation == before) wait(operation, &barrier.generation);
}

void arrive_barrier(unsigned id, unsigned num_threads) {
  if (id >= kBarriers || num_threads % kWarpSize || num_threads == 0) fail("bar %u with %u threads: 16 barriers, whole warps", id, num_threads);
  Barrier &barrier = block().barriers[id];
  ++barrier.num_arrived;
  note_event();
  if (barrier.num_arrived > num_threads) fail("bar %u: %u arrive where %u are expected", id, barrier.num_arrived, num_threads);
  open_if_full(barrier, num_threads);
}

void sync_barrier(unsigned id, unsigned num_threads) {
  if (id >= kBarriers) fail("bar %u: there are 16 barriers", id);
  Barrier &barrier = block().barriers[id];
  const uint64_t before = barrier.generation;
  arrive_barrier(id, num_threads);
  if (barrier.generation == before) wait("bar.sync", &barrier.generation);
}

/* ---- warps ---- */

Warp &current_warp() { return block().warps[current->warp]; }
Group &current_group() { return block().groups[current->linear / kGroupSize]; }

namespace {

/* The meeting of these lanes; a mask that nobody waits under may give its place away. */
Meeting &meeting_of(unsigned mask) {
  Warp &warp = current_warp();
  for (Meeting &each : warp.meetings) {
    if (each.mask == mask) return each;
  }
  for (Meeting &each : warp.meetings) {
    if (each.num_arrived > 0) continue;
    each.mask = mask;
    return each;
  }
  fail("more than %d masks at a time", Warp::kMeetings);
}

}  // namespace

bool join_warp(unsigned mask, void *argument, const char *operation) {
  Warp &warp = current_warp();
  const unsigned lane = current->lane;
  if (!(mask >> lane & 1)) fail("%s: lane %u is not in its mask %08x", operation, lane, mask);
  Meeting &meeting = meeting_of(mask);
  warp.arguments[lane] = argument;
  warp.names[lane] = operation;
  ++meeting.num_arrived;
  note_event();
  if (meeting.num_arrived < static_cast<unsigned>(__builtin_popcount(mask))) {
    wait(operation, &meeting.generation);
    return false;
  }
  for (unsigned other = 0; other < kWarpSize; ++other) {
    if ((mask >> other & 1) && std::strcmp(warp.names[other], operation)) {
      fail("lanes of a warp meet in %s and %s", operation, warp.names[other]);
    }
  }
  return true;
}

void leave_warp(unsigned mask) {
  Meeting &meeting = meeting_of(mask);
  meeting.num_arrived = 0;
  ++meeting.generation;
}

bool join_group(void *argument, const char *operation) {
  Group &group = current_group();
  const unsigned place = current->linear % kGroupSize;
  group.arguments[place] = argument;
  group.names[place] = operation;
  note_event();
  if (++group.num_arrived < kGroupSize) {
    wait(operation, &group.generation);
    return false;
  }
  for (const char *name : group.names) {
    if (std::strcmp(name, operation)) fail("threads of a warp group meet in %s and %s", operation, name);
  }
  return true;
}

void leave_group() {
  Group &group = current_group();
  group.num_arrived = 0;
  ++group.generation;
}

void set_registers(unsigned num_registers) {
  constexpr unsigned kRegisters = 64 << 10;
  if (num_registers % 8 || num_registers < 24 || num_registers > 256) fail("setmaxnreg of %u: a multiple of 8, 24 to 256", num_registers);
  with_group(num_registers, "setmaxnreg", [](unsigned **asked) {
    current_group().num_registers = *asked[0];
    unsigned sum = 0;
    for (const Group &group : block().groups) sum += group.num_registers * kGroupSize;
    if (sum > kRegisters) fail("setmaxnreg: %u registers in all; there are %u", sum, kRegisters);
  });
}

}  // namespace lmi::sim
