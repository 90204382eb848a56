/* Descriptions of tensors for the copy engine of sm_90 (TMA), made on the host and handed to a kernel as a `const __grid_constant__`
 * parameter. */
#pragma once
#include <initializer_list>

#include "cuda/memory.cuh"

#if defined(LMI_SIM)
#include "sim/tensor_map.h"
#else
#include <cuda.h>
#endif

namespace lmi {

#if defined(LMI_SIM)
using TensorMap = sim::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

/* A tensor of bf16 or fp16 and the box that one copy brings: as many elements of each dimension, in the tensor's order. Its last
 * dimension lies together and is taken by 64, which is a row of 128 bytes in shared memory; rows lie on a border of 16 bytes. Rows
 * of a copy lie one behind the other, their 16-byte chunks exchanged as wgmma takes them (128-byte swizzle). Throws
 * LMI_DEVICE_ERROR. */
TensorMap tensor_map(const lmi_tensor &tensor, std::initializer_list<int> box);

}  // namespace lmi
