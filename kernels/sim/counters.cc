#include "sim/counters.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "sim/block.h"

namespace lmi::sim {

Counters counters;
bool is_counting = false;

namespace {

constexpr uint64_t kSector = 32;
constexpr uint32_t kBankBytes = 128, kRowBytes = 16; /* all 32 banks; one row */

/* What the lanes of a warp did together so far. */
struct Instruction {
  unsigned num_lanes = 0;
  uint64_t num_bytes = 0;
  std::set<uint64_t> sectors;
};

std::map<std::pair<unsigned, uint64_t>, Instruction> open; /* by warp and number */

void count(const Instruction &instruction) {
  counters.sectors_touched += instruction.sectors.size();
  counters.sectors_needed += (instruction.num_bytes + kSector - 1) / kSector;
}

}  // namespace

void count_rows(const uint32_t *addresses) {
  if (!is_counting) return;
  unsigned users[kBankBytes / kRowBytes] = {};
  for (int i = 0; i < 8; ++i) {
    const bool is_again = std::find(addresses, addresses + i, addresses[i]) != addresses + i; /* one word serves all who want it */
    users[addresses[i] % kBankBytes / kRowBytes] += !is_again;
  }
  counters.bank_conflicts += *std::max_element(std::begin(users), std::end(users)) - 1;
}

void count_access(const void *address, size_t num_bytes) {
  if (!is_counting) return;
  const auto key = std::make_pair(current->warp, current->num_accesses++);
  Instruction &instruction = open[key];
  const uint64_t first = reinterpret_cast<uint64_t>(address);
  for (uint64_t sector = first / kSector; sector <= (first + num_bytes - 1) / kSector; ++sector) instruction.sectors.insert(sector);
  instruction.num_bytes += num_bytes;
  if (++instruction.num_lanes < kWarpSize) return;
  count(instruction);
  open.erase(key);
}

void clear_counting() { open.clear(); }

void finish_counting() {
  for (const auto &entry : open) count(entry.second);
  open.clear();
}

}  // namespace lmi::sim
