#include "sim/peers.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>

#include "common/check.h"
#include "sim/block.h"

namespace lmi::sim {
namespace {

constexpr std::chrono::seconds kPatience{10};
constexpr unsigned kPollUs = 20, kMaxLateUs = 1000;

struct Handle {
  int pid, fd;
};

std::vector<LateStore> ordered; /* of this block's threads, before its last barrier */

[[noreturn]] void fail_to(const char *what) { throw Error(LMI_DEVICE_ERROR, std::string(what) + ": " + std::strerror(errno)); }

char *map(int fd, size_t num_bytes) {
  void *const memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) fail_to("mmap of another rank's memory");
  return static_cast<char *>(memory);
}

void land(std::vector<LateStore> &stores) {
  for (const LateStore &store : stores) std::memcpy(store.to, store.bytes.data(), store.bytes.size());
  stores.clear();
}

/* Other numbers in each process: they are not to be late together. */
unsigned lateness_us() {
  static uint64_t state = 0x9E3779B97F4A7C15u * static_cast<uint64_t>(getpid());
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 62 ? 0 : static_cast<unsigned>(state >> 32) % kMaxLateUs;
}

}  // namespace

char *create_shared_memory(size_t num_bytes, void *handle) {
  const Handle own{getpid(), memfd_create("lmi-sim-peers", MFD_CLOEXEC)};
  if (own.fd < 0 || ftruncate(own.fd, static_cast<off_t>(num_bytes))) fail_to("memory for other ranks");
  std::memset(handle, 0, kHandleBytes);
  std::memcpy(handle, &own, sizeof own);
  return map(own.fd, num_bytes);
}

char *map_shared_memory(size_t num_bytes, const void *handle) {
  Handle other;
  std::memcpy(&other, handle, sizeof other);
  const std::string path = "/proc/" + std::to_string(other.pid) + "/fd/" + std::to_string(other.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) fail_to("another rank's memory");
  char *const memory = map(fd, num_bytes);
  close(fd);
  return memory;
}

void store_late(void *to, const void *from, size_t num_bytes) {
  const char *const bytes = static_cast<const char *>(from);
  current->late.push_back({static_cast<char *>(to), {bytes, bytes + num_bytes}});
}

void order_late_stores(Thread &thread) {
  for (LateStore &store : thread.late) ordered.push_back(std::move(store));
  thread.late.clear();
}

void land_late_stores(Thread &thread) {
  order_late_stores(thread);
  land(ordered);
}

void release(uint32_t *place, uint32_t value) {
  land_late_stores(*current);
  __atomic_store_n(place, value, __ATOMIC_RELEASE);
  note_event();
}

void await(const uint32_t *place, uint32_t value) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (static_cast<int32_t>(__atomic_load_n(place, __ATOMIC_ACQUIRE) - value) < 0) {
    if (std::chrono::steady_clock::now() > end) fail("has waited 10 s for another GPU to write %u", value);
    note_event(); /* it is not this block that it waits for */
    wait("await", nullptr);
    usleep(kPollUs);
  }
  if (is_random()) usleep(lateness_us());
}

}  // namespace lmi::sim
