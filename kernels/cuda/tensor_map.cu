#include "cuda/tensor_map.cuh"

#include <string>

namespace lmi {
namespace {

/* Sizes, strides in bytes and box, the innermost dimension first, as a map is told them. */
struct Described {
  uint64_t sizes[4], strides[4];
  uint32_t box[4], steps[4] = {1, 1, 1, 1};

  Described(const lmi_tensor &tensor, std::initializer_list<int> wanted) {
    for (int i = 0; i < tensor.dims; ++i) {
      const int from = tensor.dims - 1 - i;
      sizes[i] = static_cast<uint64_t>(tensor.size[from]);
      strides[i] = static_cast<uint64_t>(tensor.stride[from] * bytes_of(tensor.dtype));
      box[i] = static_cast<uint32_t>(wanted.begin()[from]);
    }
  }
};

#if !defined(LMI_SIM)

/* The driver's function, without a link to the driver. */
auto encoder() {
  static const auto function = [] {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) {
      throw Error(LMI_DEVICE_ERROR, "the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12.0 or later");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

#endif

}  // namespace

TensorMap tensor_map(const lmi_tensor &tensor, std::initializer_list<int> box) {
  const Described as(tensor, box);
  TensorMap map{};
#if defined(LMI_SIM)
  map.data = static_cast<const char *>(tensor.data);
  map.dims = tensor.dims;
  map.is_swizzled = true;
  for (int i = 0; i < tensor.dims; ++i) {
    map.sizes[i] = as.sizes[i];
    map.strides[i] = as.strides[i];
    map.box[i] = as.box[i];
  }
  sim::check_tensor_map(map);
#else
  const CUtensorMapDataType type = tensor.dtype == LMI_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encoder()(&map, type, static_cast<uint32_t>(tensor.dims), tensor.data, as.sizes, as.strides + 1, as.box, as.steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw Error(LMI_DEVICE_ERROR, "cuTensorMapEncodeTiled: error " + std::to_string(result));
#endif
  return map;
}

}  // namespace lmi
