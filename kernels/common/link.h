/* The segment of shared memory between ranks: who has come how far, and the buffers. Compiled once, for any CPU.
 *
 * Every rank counts its turns: it fills one of its buffers, then posts the turn's number; who needs the buffer waits for that number.
 * All ranks make the same calls in a step, so that the numbers agree. Each writes only its own part of the segment. */
#pragma once
#include <cstdint>

#include "lmi_kernels.h"

namespace lmi {

class Link {
 public:
  static constexpr int64_t kSmallBytes = 64 << 10;  /* a message up to this goes whole to everyone */
  static constexpr int64_t kChunkBytes = 256 << 10; /* a larger one in chunks, which stay in the second cache */
  static constexpr int32_t kRing = 3;               /* chunks on their way at the same time */
  static constexpr int32_t kMaxRanks = 64;

  explicit Link(const lmi_link &link) : link_(link) {}

  static int64_t bytes(int32_t size);
  int64_t begin(int64_t turn);
  void drop(const char *reason);

  int32_t rank() const { return link_.rank; }
  int32_t size() const { return link_.size; }
  char *small(int32_t rank, int64_t turn) const { return buffers(rank) + turn % 2 * kSmallBytes; }
  char *chunk(int32_t rank, int64_t index) const { return buffers(rank) + 2 * kSmallBytes + index % kRing * kChunkBytes; }
  char *sums(int32_t rank, int64_t index) const { return chunk(rank, index) + kRing * kChunkBytes; }

  int64_t next_turn(); /* throws Error if the step has been dropped */
  void post(int64_t turn);
  void wait(int32_t rank, int64_t turn) const; /* throws Error if it will never come */
  void wait_for_all(int64_t turn) const;

 private:
  struct Member;
  struct Control;

  Member &member(int32_t rank) const;
  Control &control() const;
  char *buffers(int32_t rank) const;
  void sleep(Member &peer, int64_t turn) const;
  void check_not_dropped() const;
  void check_alive(int32_t rank) const;

  const lmi_link &link_;
};

}  // namespace lmi
