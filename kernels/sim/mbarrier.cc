#include "sim/mbarrier.h"

#include <cstring>
#include <map>

#include "sim/block.h"
#include "sim/copies.h"
#include "sim/shared.h"

namespace lmi::sim {
namespace {

constexpr unsigned kMaxArrivals = (1u << 20) - 1;
constexpr int64_t kMaxBytes = (1 << 20) - 1;
constexpr char kMark[] = "mbarrier"; /* stands in shared memory: who writes over it is found out */
constexpr size_t kBytes = 8;

struct Mbarrier {
  unsigned num_arrivals, pending, phase = 0, maker;
  int64_t bytes = 0; /* announced and not landed; negative: the other way round */
  bool is_fenced = false;
  uint64_t num_events = 0;
};

std::map<uint32_t, Mbarrier> mbarriers;

Mbarrier &mbarrier(uint32_t address, const char *operation) {
  const char *const place = shared_pointer(address, kBytes, kBytes, operation);
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) fail("%s: there is no mbarrier at shared address %u", operation, address);
  if (std::memcmp(place, kMark, kBytes)) fail("%s: the mbarrier at shared address %u was written over", operation, address);
  return found->second;
}

void note_change(Mbarrier &each) {
  if (each.pending == 0 && each.bytes == 0) {
    each.phase ^= 1;
    each.pending = each.num_arrivals;
  }
  ++each.num_events;
  note_event();
}

}  // namespace

void clear_mbarriers() { mbarriers.clear(); }

void init_mbarrier(uint32_t address, unsigned num_arrivals) {
  char *const place = shared_pointer(address, kBytes, kBytes, "mbarrier.init");
  if (num_arrivals == 0 || num_arrivals > kMaxArrivals) fail("mbarrier.init of %u arrivals", num_arrivals);
  Mbarrier made{};
  made.num_arrivals = made.pending = num_arrivals;
  made.maker = current->linear;
  if (!mbarriers.emplace(address, made).second) fail("mbarrier.init: there is one at shared address %u", address);
  std::memcpy(place, kMark, kBytes);
}

void fence_mbarriers() {
  for (auto &each : mbarriers) {
    if (each.second.maker == current->linear) each.second.is_fenced = true;
  }
}

void arrive_mbarrier(uint32_t address, int64_t num_bytes) {
  Mbarrier &each = mbarrier(address, "mbarrier.arrive");
  if (each.pending == 0) fail("mbarrier.arrive: more arrivals than the %u that the mbarrier expects", each.num_arrivals);
  each.bytes += num_bytes;
  if (each.bytes > kMaxBytes) fail("mbarrier.arrive.expect_tx: %lld bytes are more than an mbarrier counts", static_cast<long long>(each.bytes));
  --each.pending;
  note_change(each);
}

void wait_mbarrier(uint32_t address, unsigned parity) {
  constexpr char kOperation[] = "mbarrier.try_wait";
  Mbarrier &each = mbarrier(address, kOperation);
  while (each.phase == parity) {
    if (is_random() && random_number() % 2) wait(kOperation, nullptr);
    else if (!land_bulk(address)) wait(kOperation, &each.num_events);
  }
}

void check_mbarrier(uint32_t address, const char *operation) {
  if (!mbarrier(address, operation).is_fenced) fail("%s: the mbarrier's making was not fenced (fence_mbarriers)", operation);
  ++mbarrier(address, operation).num_events; /* who waits there may let the copy land */
}

void complete_mbarrier(uint32_t address, int64_t num_bytes) {
  Mbarrier &each = mbarrier(address, "complete_tx");
  each.bytes -= num_bytes;
  note_change(each);
}

}  // namespace lmi::sim
