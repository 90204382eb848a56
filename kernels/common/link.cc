/* Layout: Control, then a Member a rank, then each rank's buffers. A rank that waits looks for a moment and then sleeps on a futex,
 * which it leaves every 50 ms to see whether the other still lives: the system gives up a process' file locks however it ends. */
#include "common/link.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <string>

#include "common/check.h"
#include "common/relax.h"

namespace lmi {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHeaderBytes = 64 << 10;
constexpr int64_t kBufferBytes = 2 * Link::kSmallBytes + 2 * Link::kRing * Link::kChunkBytes;
constexpr int64_t kStepTurns = 1 << 12; /* more than any rank can be ahead of rank 0 */
constexpr int64_t kReasonBytes = 480;
constexpr timespec kSleep = {0, 50 * 1000 * 1000};

/* Futexes are 32 bits: the lower half of a turn (these systems are little-endian), which changes whenever the turn does. */
long futex(std::atomic<int64_t> &word, int operation, int32_t value, const timespec *timeout) {
  return syscall(SYS_futex, reinterpret_cast<int32_t *>(&word), operation, value, timeout, nullptr, 0);
}

[[noreturn]] void fail(const std::string &message) { throw Error(LMI_RANK_ERROR, message); }

}  // namespace

struct alignas(128) Link::Control {
  std::atomic<int64_t> dropped; /* first turn of the last step that was dropped, times kMaxRanks, plus who did it */
};

struct alignas(128) Link::Member {
  std::atomic<int64_t> posted; /* turns up to this one are in the buffers */
  std::atomic<int32_t> sleepers;
  int64_t turn, first; /* its own: the last turn, and where the step began */
  char reason[kReasonBytes];
};

int64_t Link::bytes(int32_t size) { return kHeaderBytes + size * kBufferBytes; }

Link::Control &Link::control() const { return *static_cast<Control *>(link_.memory); }

Link::Member &Link::member(int32_t rank) const {
  static_assert(sizeof(Control) + kMaxRanks * sizeof(Member) <= kHeaderBytes && kHeaderBytes % kPage == 0);
  return reinterpret_cast<Member *>(&control() + 1)[rank];
}

char *Link::buffers(int32_t rank) const { return static_cast<char *>(link_.memory) + kHeaderBytes + rank * kBufferBytes; }

int64_t Link::begin(int64_t turn) {
  Member &me = member(link_.rank);
  me.first = me.turn = turn ? turn : me.turn + kStepTurns;
  return me.first;
}

void Link::drop(const char *reason) {
  Member &me = member(link_.rank);
  std::strncpy(me.reason, reason, kReasonBytes - 1);
  const int64_t mine = me.first * kMaxRanks + link_.rank;
  int64_t last = control().dropped.load();
  while (last / kMaxRanks < me.first && !control().dropped.compare_exchange_weak(last, mine)) { /* the first one counts */
  }
  for (int32_t rank = 0; rank < link_.size; ++rank) futex(member(rank).posted, FUTEX_WAKE, INT_MAX, nullptr);
}

int64_t Link::next_turn() {
  check_not_dropped();
  return ++member(link_.rank).turn;
}

void Link::post(int64_t turn) {
  Member &me = member(link_.rank);
  me.posted.store(turn); /* sequentially consistent, as is the sleepers' count: one of the two sees the other */
  if (me.sleepers.load() > 0) futex(me.posted, FUTEX_WAKE, INT_MAX, nullptr);
}

void Link::wait(int32_t rank, int64_t turn) const {
  Member &peer = member(rank);
  for (int32_t i = 0; i < link_.spins; ++i) {
    if (peer.posted.load(std::memory_order_acquire) >= turn) return;
    relax();
  }
  while (peer.posted.load(std::memory_order_acquire) < turn) {
    check_not_dropped();
    sleep(peer, turn);
    if (peer.posted.load(std::memory_order_acquire) < turn) check_alive(rank);
  }
}

void Link::wait_for_all(int64_t turn) const {
  for (int32_t rank = 0; rank < link_.size; ++rank) {
    if (rank != link_.rank) wait(rank, turn);
  }
}

void Link::sleep(Member &peer, int64_t turn) const {
  peer.sleepers.fetch_add(1);
  const int64_t seen = peer.posted.load();
  if (seen < turn) futex(peer.posted, FUTEX_WAIT, static_cast<int32_t>(seen), &kSleep);
  peer.sleepers.fetch_sub(1);
}

void Link::check_not_dropped() const {
  const int64_t dropped = control().dropped.load(std::memory_order_acquire);
  const int32_t rank = static_cast<int32_t>(dropped % kMaxRanks);
  if (dropped / kMaxRanks >= member(link_.rank).first) {
    fail("rank " + std::to_string(rank) + " has dropped the step: " + std::string(member(rank).reason));
  }
}

void Link::check_alive(int32_t rank) const {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  if (fcntl(link_.fd, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK) fail("rank " + std::to_string(rank) + " has ended");
}

}  // namespace lmi
