/* Asynchronous copies: cp.async, which a thread waits for by the number of groups still on their way, and bulk copies (TMA), which
 * tell an mbarrier. A copy lands when it is waited for, in the random order also as soon as it is issued or anywhere between; one
 * that nobody has waited for when the block ends is reported. */
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace lmi::sim {

/* num_bytes to `to`: the first num_read from `from`, then zeros. */
struct Copy {
  char *to;
  const char *from;
  unsigned num_bytes, num_read;
  void land() const;
};

/* One thread's cp.async. */
class CopyGroups {
 public:
  void clear();
  void add(const Copy &copy);
  void commit();
  void wait(unsigned num_left); /* all but the newest num_left groups land */

 private:
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

/* The block's bulk copies. */
void clear_bulk();
size_t num_bulk();
/* num_bytes, which `land` brings and this mbarrier is told of. */
void add_bulk(uint32_t barrier, int64_t num_bytes, std::function<void()> land);
/* One of them lands: the oldest that tells this mbarrier; in the random order any. False if there is none. */
bool land_bulk(uint32_t barrier);

}  // namespace lmi::sim
