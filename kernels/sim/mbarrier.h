/* Barriers in shared memory (PTX mbarrier) as the block knows them: a phase is complete once all arrivals and all bytes that were
 * announced have come. What a GPU leaves undefined is reported: a barrier that nobody made or that was written over, more arrivals
 * than it expects, one that the copy engine was not told of. */
#pragma once
#include <cstdint>

namespace lmi::sim {

void clear_mbarriers();
void init_mbarrier(uint32_t address, unsigned num_arrivals);
/* What this thread made is there for others and for the copy engine. */
void fence_mbarriers();
/* One arrival; before it, num_bytes more are announced. */
void arrive_mbarrier(uint32_t address, int64_t num_bytes);
/* Until the phase of this parity is complete, which copies that it waits for land for. */
void wait_mbarrier(uint32_t address, unsigned parity);

/* For copies: the barrier is one that the copy engine may use; num_bytes have landed. */
void check_mbarrier(uint32_t address, const char *operation);
void complete_mbarrier(uint32_t address, int64_t num_bytes);

}  // namespace lmi::sim
