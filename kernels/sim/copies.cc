#include "sim/copies.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "sim/block.h"
#include "sim/mbarrier.h"
#include "sim/shared.h"

namespace lmi::sim {
namespace {

struct BulkCopy {
  uint32_t barrier;
  int64_t num_bytes;
  std::function<void()> land;
};

std::vector<BulkCopy> bulk;

}  // namespace

void Copy::land() const {
  std::memcpy(to, from, num_read);
  std::memset(to + num_read, 0, num_bytes - num_read);
  mark_written(shared_address(to), num_bytes);
}

void CopyGroups::clear() {
  open_.clear();
  groups_.clear();
}

void CopyGroups::add(const Copy &copy) {
  if (is_random() && random_number() % 2) copy.land();
  else open_.push_back(copy);
}

void CopyGroups::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
}

void CopyGroups::wait(unsigned num_left) {
  while (groups_.size() > num_left) {
    for (const Copy &copy : groups_.front()) copy.land();
    groups_.erase(groups_.begin());
  }
}

void clear_bulk() { bulk.clear(); }

size_t num_bulk() { return bulk.size(); }

namespace {

void land(size_t chosen) {
  const BulkCopy copy = std::move(bulk[chosen]);
  bulk.erase(bulk.begin() + static_cast<std::ptrdiff_t>(chosen));
  copy.land();
  complete_mbarrier(copy.barrier, copy.num_bytes);
}

}  // namespace

void add_bulk(uint32_t barrier, int64_t num_bytes, std::function<void()> land_it) {
  bulk.push_back({barrier, num_bytes, std::move(land_it)});
  if (is_random() && random_number() % 2) land(random_number() % bulk.size());
}

bool land_bulk(uint32_t barrier) {
  const auto is_told = [=](const BulkCopy &copy) { return copy.barrier == barrier; };
  const auto first = is_random() ? bulk.begin() : std::find_if(bulk.begin(), bulk.end(), is_told);
  if (first == bulk.end()) return false;
  land(is_random() ? random_number() % bulk.size() : static_cast<size_t>(first - bulk.begin()));
  return true;
}

}  // namespace lmi::sim
