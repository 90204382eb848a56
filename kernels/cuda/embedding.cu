/* Rows of a table by id, and what is added to them. A block owns a row of out; bound by memory. */
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kMaxThreads = 256;

template <class T, int kNum>
__global__ void embedding_kernel(Rows<T> out, Rows<const T> table, Rows<const T> residual, const int *ids, int64_t first_id,
                                 int64_t num_rows, int width, float scale) {
  const int64_t t = blockIdx.x, from = ids[t] - first_id;
  const bool is_ours = from >= 0 && from < num_rows;
  for (int e = threadIdx.x * kNum; e < width; e += blockDim.x * kNum) {
    float row[kNum] = {}, other[kNum] = {};
    if (is_ours) read_floats(table.row(from) + e, row);
    if (residual.data) read_floats(residual.row(t) + e, other);
#pragma unroll
    for (int i = 0; i < kNum; ++i) row[i] = (is_ours ? scale * row[i] : 0.0f) + other[i];
    write_floats(out.row(t) + e, row);
  }
}

}  // namespace

void embedding(const lmi_embedding_args &args, cudaStream_t stream) {
  check_arguments(args);
  const int64_t tokens = args.ids.size[0], width = args.table.size[1];
  with_dtype(args.table.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(is_wide({&args.out, &args.table, &args.residual}), [&](auto num) {
      const Shape shape{static_cast<unsigned>(tokens), threads_for(width / num, kMaxThreads)};
      launch("embedding", embedding_kernel<T, num>, shape, stream, args.out, args.table, args.residual, vector_of<int>(args.ids),
             args.first_id, args.table.size[0], static_cast<int>(width), args.scale);
    });
  });
}

}  // namespace lmi::cuda
