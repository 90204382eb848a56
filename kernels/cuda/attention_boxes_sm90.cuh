/* How the copy engine of sm_90a brings tiles of a cache, block by block: rows of 64 columns of D, a panel, lie one behind the other in
 * shared memory, their 16-byte chunks exchanged as a map with a 128-byte swizzle does. */
#pragma once
#include <algorithm>

#include "cuda/attention_problem.cuh"
#include "cuda/ptx_sm90.cuh"

namespace lmi::cuda {

constexpr int kPanel = 64, kPanelRow = 128; /* columns whose rows lie together; their bytes */

/* The part of a cache's block that one copy brings: 64 columns of `rows` tokens, which divide a tile. */
struct Boxes {
  TensorMap keys, values;
  int rows, num_blocks;
};

/* Bytes from a tile's border to chunk c, eight columns, of row r; kRows: of the tile. */
template <int kRows = kTile>
__device__ __forceinline__ int place_in_panels(int row, int chunk) {
  return (chunk / 8 * kRows + row) * kPanelRow + ((chunk ^ row) & 7) * 16;
}

/* The boxes of tiles which a warp has copied, one a lane. Several warps share a tile, since lanes issue copies one after the other. */
template <int kPadded>
class BoxCopies {
 public:
  /* rows: of a box; part: of the warps that share a tile, this one */
  __device__ BoxCopies(const Question &attention, int rows, int part, int num_parts)
      : attention_(attention), rows_(rows), is_first_(part == 0 && threadIdx.x % 32 == 0) {
    const int box = part + static_cast<int>(threadIdx.x) % 32 * num_parts, boxes_down = kTile / rows;
    row_ = box % boxes_down * rows;
    panel_ = box / boxes_down;
  }

  /* Where the lane's rows of a tile are. A block that nobody needs may not be there: beyond the cache all is 0. */
  __device__ int block_of(int sequence, int first_key, Range needed, int num_blocks) const {
    const int key = first_key + row_;
    const bool is_needed = key < needed.last && key + rows_ > needed.first;
    return is_needed ? attention_.tables[sequence * attention_.tables_stride + attention_.block_size.quotient(key)] : num_blocks;
  }

  /* For all lanes. place: of the tile; the barrier is told of all its bytes by the first warp. */
  __device__ void load(const TensorMap &map, int head, int block, int first_key, uint32_t place, uint32_t barrier) const {
    if (is_first_) ptx::arrive_expecting(barrier, kTile * kPadded * 2);
    if (panel_ >= kPadded / kPanel) return;
    const int at[] = {panel_ * kPanel, attention_.block_size.rest(first_key + row_), head, block};
    ptx::copy_box(place + (panel_ * kTile + row_) * kPanelRow, map, at, barrier);
  }

 private:
  const Question &attention_;
  const int rows_;
  const bool is_first_;
  int row_, panel_;
};

/* Whether the copy engine takes these caches, in kernels for a device that has it: bf16 or fp16 with a cache of the same, all tensors on
 * borders of 16 bytes, and blocks of 8, 16, 32 or a multiple of 64 tokens, whose rows fill a swizzle. */
inline bool are_boxes_for_sm90(const lmi_attention_args &args) {
  const int64_t block_size = args.k_cache.size[2];
  const bool fits_tiles = block_size % kTile == 0 || (block_size >= 8 && kTile % block_size == 0);
  const bool is_of_halves = args.q.dtype != LMI_F32 && args.k_cache.dtype == args.q.dtype;
  return has_sm90a() && is_of_halves && fits_tiles && args.k_cache.size[0] > 0 && is_wide({&args.out, &args.q, &args.k_cache, &args.v_cache});
}

inline Boxes boxes_of(const lmi_attention_args &args) {
  const int rows = static_cast<int>(std::min<int64_t>(args.k_cache.size[2], kTile));
  return {tensor_map(args.k_cache, {1, 1, rows, kPanel}), tensor_map(args.v_cache, {1, 1, rows, kPanel}), rows,
          static_cast<int>(args.k_cache.size[0])};
}

}  // namespace lmi::cuda
