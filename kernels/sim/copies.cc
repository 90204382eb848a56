#include "sim/copies.h"

#include <cstring>
#include <utility>

#include "sim/block.h"

namespace lmi::sim {
namespace {

std::vector<std::function<void()>> bulk;

}  // namespace

void Copy::land() const {
  std::memcpy(to, from, num_read);
  std::memset(to + num_read, 0, num_bytes - num_read);
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

void add_bulk(std::function<void()> land) { bulk.push_back(std::move(land)); }

bool land_bulk() {
  if (bulk.empty()) return false;
  const size_t chosen = is_random() ? random_number() % bulk.size() : 0;
  const std::function<void()> land = std::move(bulk[chosen]);
  bulk.erase(bulk.begin() + static_cast<std::ptrdiff_t>(chosen));
  land();
  note_event();
  return true;
}

}  // namespace lmi::sim
