/* What a kernel would pay for in memory traffic, counted where it goes through wrappers (ptx.cuh, memory.cuh): extra turns of
 * shared memory because lanes meet in a bank, and 32-byte sectors of global memory touched against those that the bytes need. */
#pragma once
#include <cstddef>
#include <cstdint>

namespace lmi::sim {

struct Counters {
  uint64_t bank_conflicts;  /* turns beyond those that the bytes need */
  uint64_t sectors_touched, sectors_needed;
};

extern Counters counters;
extern bool is_counting; /* off, since it takes as long as the kernel does */

/* Rows of 16 bytes at eight shared addresses, which a GPU serves in one turn if they lie in different banks. */
void count_rows(const uint32_t *addresses);

/* A lane's access of global memory. The n-th access of each lane of a warp are taken to be one instruction. */
void count_access(const void *address, size_t num_bytes);
void clear_counting();
void finish_counting();

}  // namespace lmi::sim
