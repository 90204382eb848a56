/* What AMX's tile instructions do (Intel, Software Developer's Manual, volume 2, TDPBF16PS and its neighbours), in C: for tests. Each
 * thread has its tiles. A use that the processor would answer with a fault ends the process. */
#pragma once
#include <cstdlib>

#include "common/dtype.h"

namespace lmi::LMI_LEVEL {

struct Tile {
  int rows = 0, row_bytes = 0;
  char data[16][64] = {};
};

inline Tile &tile(int index) {
  static thread_local Tile tiles[8];
  return tiles[index];
}

inline void fault_unless(bool holds) {
  if (!holds) std::abort();
}

inline void _tile_zero(int index) {
  fault_unless(tile(index).rows > 0);
  std::memset(tile(index).data, 0, sizeof tile(index).data);
}

inline void _tile_loadconfig(const void *config) {
  const uint8_t *bytes = static_cast<const uint8_t *>(config);
  fault_unless(bytes[0] == 1);
  for (int index = 0; index < 8; ++index) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * index, 2);
    fault_unless(row_bytes <= 64 && bytes[48 + index] <= 16);
    tile(index) = {bytes[48 + index], row_bytes, {}};
  }
}

inline void _tile_release() {
  for (int index = 0; index < 8; ++index) tile(index) = {};
}

inline void _tile_loadd(int to, const void *from, int64_t stride) {
  _tile_zero(to);
  for (int row = 0; row < tile(to).rows; ++row) {
    std::memcpy(tile(to).data[row], static_cast<const char *>(from) + row * stride, static_cast<size_t>(tile(to).row_bytes));
  }
}

inline void _tile_stream_loadd(int to, const void *from, int64_t stride) { _tile_loadd(to, from, stride); }

inline void _tile_stored(int from, void *to, int64_t stride) {
  fault_unless(tile(from).rows > 0);
  for (int row = 0; row < tile(from).rows; ++row) {
    std::memcpy(static_cast<char *>(to) + row * stride, tile(from).data[row], static_cast<size_t>(tile(from).row_bytes));
  }
}

/* sums[m][n] += sum_k a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]: even and odd ones apart, then added. */
inline void _tile_dpbf16ps(int sums, int a, int b) {
  const int num_pairs = tile(a).row_bytes / 4, num = tile(sums).row_bytes / 4;
  fault_unless(num > 0 && tile(sums).rows == tile(a).rows && tile(b).rows == num_pairs && tile(b).row_bytes == 4 * num);
  for (int m = 0; m < tile(sums).rows; ++m) {
    float even[16] = {}, odd[16] = {}, total[16];
    uint16_t left[32], right[32];
    std::memcpy(left, tile(a).data[m], sizeof left);
    std::memcpy(total, tile(sums).data[m], sizeof total);
    for (int k = 0; k < num_pairs; ++k) {
      std::memcpy(right, tile(b).data[k], sizeof right);
      for (int n = 0; n < num; ++n) {
        even[n] += float_of_bf16(left[2 * k]) * float_of_bf16(right[2 * n]);
        odd[n] += float_of_bf16(left[2 * k + 1]) * float_of_bf16(right[2 * n + 1]);
      }
    }
    for (int n = 0; n < num; ++n) total[n] += even[n] + odd[n];
    std::memcpy(tile(sums).data[m], total, sizeof total);
  }
}

}  // namespace lmi::LMI_LEVEL
