/* Packing of weights (linear_layout.h). A block owns a packed row: it writes it if its output is among the given ones, or fills it
 * with zeros if it has none. Once a load; bound by memory. */
#include "cuda/linear_layout.h"
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kThreads = 128;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct Pack {
  char *packed;
  PackedLayout layout;
  const char *w, *scales;
  const uint8_t *zeros;
  int64_t w_stride, scales_stride, zeros_stride; /* in elements */
  int64_t first, num, out_features, in_features;
  int dtype, format, element_bytes;
  bool is_gated;
};

/* Byte i of a row's inputs. */
__device__ char packed_byte(const Pack &pack, const char *w, int64_t i) {
  if (pack.format != LMI_INT4) return i < pack.in_features * pack.element_bytes ? w[i] : 0;
  const int low = 2 * i < pack.in_features ? w[2 * i] & 15 : 0, high = 2 * i + 1 < pack.in_features ? w[2 * i + 1] & 15 : 0;
  return static_cast<char>(low | high << 4);
}

__device__ float scale_of(const Pack &pack, int64_t row, int64_t group) {
  const int64_t element = row * pack.scales_stride + group;
  if (pack.dtype == LMI_BF16) return to_float(reinterpret_cast<const bf16 *>(pack.scales)[element]);
  if (pack.dtype == LMI_F16) return to_float(reinterpret_cast<const f16 *>(pack.scales)[element]);
  return reinterpret_cast<const float *>(pack.scales)[element];
}

__global__ void pack_kernel(Pack pack) {
  const int64_t row = blockIdx.x, output = output_of_row(row, pack.out_features, pack.is_gated), from = output - pack.first;
  const bool is_empty = output >= pack.out_features;
  if (!is_empty && (from < 0 || from >= pack.num)) return;
  const char *const w = pack.w + from * pack.w_stride * pack.element_bytes;
  char *const to = pack.packed + row * pack.layout.row_bytes;
  for (int64_t i = threadIdx.x; i < pack.layout.row_bytes; i += kThreads) to[i] = is_empty ? 0 : packed_byte(pack, w, i);
  float *const scales = reinterpret_cast<float *>(pack.packed + pack.layout.scale_offset) + row * pack.layout.num_groups;
  float *const zeros = reinterpret_cast<float *>(pack.packed + pack.layout.zero_offset) + row * pack.layout.num_groups;
  for (int64_t group = threadIdx.x; group < pack.layout.num_groups; group += kThreads) {
    scales[group] = is_empty ? 0.0f : scale_of(pack, from, group);
    zeros[group] = is_empty ? 0.0f : static_cast<float>(pack.zeros[from * pack.zeros_stride + group]);
  }
}

}  // namespace

PackedLayout packed_layout(const LinearShape &shape) {
  PackedLayout layout;
  const int64_t outputs = shape.gated ? 2 * round_up(shape.out_features / 2, 8) : shape.out_features;
  const int64_t inputs = round_up(shape.in_features, kTileInputs);
  layout.num_rows = round_up(outputs, kTileOutputs);
  layout.row_bytes = shape.format == LMI_DENSE ? inputs * bytes_of(shape.dtype) : shape.format == LMI_INT8 ? inputs : inputs / 2;
  layout.num_groups = shape.format == LMI_DENSE ? 0 : shape.in_features / shape.group;
  layout.scale_offset = layout.num_rows * layout.row_bytes;
  layout.zero_offset = layout.scale_offset + layout.num_rows * layout.num_groups * static_cast<int64_t>(sizeof(float));
  layout.num_bytes = layout.zero_offset + (layout.zero_offset - layout.scale_offset);
  return layout;
}

int64_t packed_bytes(const LinearShape &shape) { return *why_unsupported(shape) ? 0 : packed_layout(shape).num_bytes; }

void linear_pack(const lmi_linear_pack_args &args, cudaStream_t stream) {
  const LinearShape shape = shape_of(args);
  check_arguments(args, packed_bytes(shape));
  const Pack pack{vector_of<char>(args.packed),
                  packed_layout(shape),
                  vector_of<char>(args.w),
                  vector_of<char>(args.scales),
                  vector_of<uint8_t>(args.zeros),
                  args.w.stride[0],
                  args.scales.stride[0],
                  args.zeros.stride[0],
                  args.row_offset,
                  args.w.size[0],
                  args.out_features,
                  args.in_features,
                  args.dtype,
                  args.format,
                  static_cast<int>(bytes_of(args.w.dtype)),
                  args.gated != 0};
  launch("linear_pack", pack_kernel, {static_cast<unsigned>(pack.layout.num_rows), kThreads}, stream, pack);
}

}  // namespace lmi::cuda
