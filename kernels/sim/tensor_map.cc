#include "sim/tensor_map.h"

#include <array>
#include <cstring>

#include "common/check.h"
#include "sim/block.h"
#include "sim/copies.h"
#include "sim/mbarrier.h"
#include "sim/shared.h"

namespace lmi::sim {
namespace {

constexpr uint32_t kElementBytes = 2;
constexpr size_t kAlignment = 128; /* of what a bulk copy of a box writes */
constexpr uint32_t kMaxBox = 256, kSwizzleBytes = 128;
constexpr uint64_t kMaxStride = uint64_t{1} << 40, kMaxSize = uint64_t{1} << 32;

uint32_t bytes_of_box(const TensorMap &map) {
  uint32_t bytes = kElementBytes;
  for (int i = 0; i < map.dims; ++i) bytes *= map.box[i];
  return bytes;
}

/* Row `row` of the box, which begins at these coordinates. */
void land_row(uint32_t to, const TensorMap &map, std::array<int, kMaxMapDims> at, uint32_t row) {
  const uint32_t row_bytes = map.box[0] * kElementBytes;
  to += row * row_bytes;
  bool exists = true;
  const char *from = map.data;
  for (int i = 1; i < map.dims; ++i) {
    at[i] += static_cast<int>(row % map.box[i]);
    row /= map.box[i];
    exists = exists && at[i] >= 0 && static_cast<uint64_t>(at[i]) < map.sizes[i];
    if (exists) from += static_cast<uint64_t>(at[i]) * map.strides[i];
  }
  constexpr int kChunk = 16 / kElementBytes;
  for (int i = 0; i < static_cast<int>(map.box[0]); i += kChunk) {
    uint16_t chunk[kChunk] = {};
    for (int j = 0; j < kChunk; ++j) {
      const int64_t column = int64_t{at[0]} + i + j;
      if (!exists || column < 0 || static_cast<uint64_t>(column) >= map.sizes[0]) continue;
      std::memcpy(&chunk[j], from + column * kElementBytes, kElementBytes);
    }
    const uint32_t place = to + static_cast<uint32_t>(i) * kElementBytes, swizzled = map.is_swizzled ? place ^ (place >> 7 & 7) << 4 : place;
    std::memcpy(shared_pointer(swizzled, sizeof chunk, sizeof chunk, "a tensor copy"), chunk, sizeof chunk);
  }
}

}  // namespace

void check_tensor_map(const TensorMap &map) {
  bool fits = map.dims >= 1 && map.dims <= kMaxMapDims && reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
  for (int i = 0; fits && i < map.dims; ++i) {
    fits = map.sizes[i] >= 1 && map.sizes[i] <= kMaxSize && map.box[i] >= 1 && map.box[i] <= kMaxBox &&
           (i == 0 || (map.strides[i] % 16 == 0 && map.strides[i] < kMaxStride));
  }
  const uint32_t row_bytes = map.box[0] * kElementBytes;
  if (!fits || row_bytes % 16 || (map.is_swizzled && row_bytes != kSwizzleBytes)) {
    throw Error(LMI_DEVICE_ERROR, "a tensor map that a driver refuses");
  }
}

void copy_box(uint32_t to, const TensorMap &map, const int *at, int dims, uint32_t barrier) {
  constexpr char kOperation[] = "a tensor copy";
  if (dims != map.dims) fail("%s of %d dimensions by a map of %d", kOperation, dims, map.dims);
  const uint32_t num_bytes = bytes_of_box(map), rows = num_bytes / (map.box[0] * kElementBytes);
  shared_pointer(to, num_bytes, kAlignment, kOperation);
  check_mbarrier(barrier, kOperation);
  std::array<int, kMaxMapDims> from{};
  std::memcpy(from.data(), at, sizeof(int) * static_cast<size_t>(dims));
  add_bulk(barrier, num_bytes, [=] {
    check_fenced(to, num_bytes, kOperation);
    for (uint32_t row = 0; row < rows; ++row) land_row(to, map, from, row);
  });
}

void copy_bulk(uint32_t to, const void *from, unsigned num_bytes, uint32_t barrier) {
  constexpr char kOperation[] = "a bulk copy";
  if (num_bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("%s of %u bytes: whole times 16, from a multiple of 16", kOperation, num_bytes);
  }
  char *const place = shared_pointer(to, num_bytes, 16, kOperation);
  check_mbarrier(barrier, kOperation);
  add_bulk(barrier, num_bytes, [=] {
    check_fenced(to, num_bytes, kOperation);
    std::memcpy(place, from, num_bytes);
  });
}

}  // namespace lmi::sim
