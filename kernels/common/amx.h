/* The tile instructions of AMX, by Intel's names (_tile_loadd and so on), where this level has them: LMI_AMX says so. A build with
 * LMI_AMX_TWIN has them in C (amx_twin.h), so that the same sources are tested on a machine without them. */
#pragma once
#if defined(LMI_AMX_TWIN)
#define LMI_AMX 1
#include "common/amx_twin.h"
#elif defined(__AMX_BF16__)
#define LMI_AMX 1
#include <immintrin.h>

#include "common/level.h"
#endif

#if defined(LMI_AMX)
namespace lmi::LMI_LEVEL {

/* The operand of LDTILECFG: all eight tiles with 64 bytes a row; accumulators (0 to 3) and left factors (4, 5) with num_rows rows,
 * right factors (6, 7) with 16 pairs. The tiles are zero afterwards. has_short: factors 5 and 7 are half as deep, 8 pairs. */
inline void configure_tiles(int num_rows, bool has_short) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? num_rows : 16);
  }
  if (has_short) {
    config.row_bytes[5] = 32;
    config.rows[7] = 8;
  }
  asm volatile("" : : "r"(&config) : "memory"); /* gcc 12 takes the stores above for dead */
  _tile_loadconfig(&config);
}

/* The calling thread's tiles, as long as the object lives. has_short: as above. */
template <bool has_short>
class ThreadTiles {
 public:
  ThreadTiles() = default;
  ThreadTiles(const ThreadTiles &) = delete;
  ThreadTiles &operator=(const ThreadTiles &) = delete;
  ~ThreadTiles() {
    if (num_rows_) _tile_release();
  }

  /* Costs nothing when they are so already. */
  void configure(int64_t num_rows) {
    if (num_rows == num_rows_) return;
    configure_tiles(static_cast<int>(num_rows), has_short);
    num_rows_ = num_rows;
  }

 private:
  int64_t num_rows_ = 0; /* 0: not configured */
};

}  // namespace lmi::LMI_LEVEL
#endif
