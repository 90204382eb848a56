/* Memory of the operations: scratch that a thread keeps between calls, and large pages for weights. Compiled once, for any CPU. */
#pragma once
#include <cstdint>

namespace lmi {

/* What scratch is for; each purpose has a piece of its own in each thread. */
enum class Purpose { kInputs, kSums, kTile, kParts, kCount };

/* num floats on a cache line, uninitialised, this thread's until it asks again for the same purpose. Kept, since memory fresh from the
 * system costs more to touch than a linear does to compute. Throws std::bad_alloc. */
float *kept_floats(Purpose purpose, int64_t num);

/* Asks for 2 MiB pages where the memory was not touched yet: reading weights through 4 KiB pages takes 5 to 10 % longer. */
void ask_for_huge_pages(void *data, int64_t num_bytes);

}  // namespace lmi
