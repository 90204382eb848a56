/* Asynchronous copies: cp.async, which a thread waits for by the number of groups still on their way, and bulk copies (TMA), which
 * tell an mbarrier. A copy lands when it is waited for, in the random order also as soon as it is issued or anywhere between. */
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
void add_bulk(std::function<void()> land);
/* One of them lands (the oldest; in the random order any); false if there is none. */
bool land_bulk();

}  // namespace lmi::sim
