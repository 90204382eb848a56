/* A tensor map (CUtensorMap) and the copies that it describes: a box of a tensor of 16-bit elements in global memory to shared
 * memory, zeros where the box leaves the tensor. */
#pragma once
#include <cstdint>

namespace lmi::sim {

constexpr int kMaxMapDims = 5;

/* By dimension, the innermost first, whose elements lie together. Strides in bytes. */
struct alignas(64) TensorMap {
  const char *data;
  int dims;
  bool is_swizzled; /* 128 bytes */
  uint64_t sizes[kMaxMapDims], strides[kMaxMapDims];
  uint32_t box[kMaxMapDims];
};

/* Throws lmi::Error (LMI_DEVICE_ERROR) where the driver would refuse. */
void check_tensor_map(const TensorMap &map);

/* The box that begins at these coordinates; for the thread that runs. */
void copy_box(uint32_t to, const TensorMap &map, const int *at, int dims, uint32_t barrier);

/* num_bytes that lie together. */
void copy_bulk(uint32_t to, const void *from, unsigned num_bytes, uint32_t barrier);

}  // namespace lmi::sim
