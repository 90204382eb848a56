/* Shared memory of the block that runs. The dynamic part comes first, then what kernels declare one by one; each piece has a
 * border. At the start of a block all of it is 0xff: NaN as a float, out of range as an index. Addresses are 32-bit offsets, as on
 * a GPU; with AddressSanitizer, reads and writes outside of a piece are caught where they happen, else writes into a border at the
 * block's end. */
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace lmi::sim {

struct Thread;

constexpr size_t kMaxShared = 227 << 10; /* of a block on sm_90 */

void clear_shared(size_t dynamic_bytes);
char *dynamic_shared_memory();
/* The piece that belongs to this declaration (key: any address of its own), made when the first thread asks. */
void *static_shared_memory(const void *key, size_t num_bytes, size_t alignment);
/* What was written beyond the pieces; empty if nothing was. */
std::string shared_damage();

uint32_t shared_address(const void *pointer);
/* Memory of num_bytes at an address, which must lie in one piece and be a multiple of `alignment`. */
char *shared_pointer(uint32_t address, size_t num_bytes, size_t alignment, const char *operation);


/* ---- what the copy engine and wgmma may see ---- */

/* Threads' own writes, as far as they go through wrappers (ptx*.cuh), are not seen by them until the thread fences. */
void mark_written(uint32_t address, size_t num_bytes);
void fence_written();
void clear_written(Thread &thread);
void check_fenced(uint32_t address, size_t num_bytes, const char *operation);

}  // namespace lmi::sim
