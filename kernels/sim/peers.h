/* Memory that several stand-ins, each a process of its own, have mapped, as GPUs map each other's. What a thread stores there for the
 * others (store_late) is not seen by them before it is released: by the thread itself, or after a barrier by any thread of its block;
 * else it lands when the block ends. Who waits for another stand-in lets its block go on and does so for at most ten seconds, and
 * in the random order is late now and then. */
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lmi::sim {

struct Thread;

constexpr size_t kHandleBytes = 64;

/* num_bytes of zeros; handle, of kHandleBytes: for the others, while this process lives. */
char *create_shared_memory(size_t num_bytes, void *handle);
/* Throws lmi::Error if the process has gone. */
char *map_shared_memory(size_t num_bytes, const void *handle);

struct LateStore {
  char *to;
  std::vector<char> bytes;
};

void store_late(void *to, const void *from, size_t num_bytes);
/* A barrier of the block: what this thread has stored may be released by others. */
void order_late_stores(Thread &thread);
void land_late_stores(Thread &thread);

/* *place := value, after what this thread may release has landed. */
void release(uint32_t *place, uint32_t value);
/* Until *place has come to value, or gone past it. */
void await(const uint32_t *place, uint32_t value);

}  // namespace lmi::sim
