/* Attention of prompts on sm_90a. A block owns units of 128 rows of one sequence and key head: four warps have the copy engine bring
 * tiles of 64 keys and values, block by block of the cache, through a ring in shared memory; two groups of four warps multiply 64
 * rows each (wgmma), queries, scores and weighted values in registers, the sums of earlier splits in shared memory. While a group works
 * on a tile's softmax, its products with the next tile's keys and with the values of the tile before are on their way. Bound by the
 * matrix units.
 *
 * Scores, weights and values are summed in the order of attention_tiles.cuh. */
#pragma once
#include "cuda/attention_boxes_sm90.cuh"
#include "cuda/attention_state.cuh"
#include "cuda/ring_sm90.cuh"

namespace lmi::cuda {

constexpr int kGroupRows = 64, kRowGroups = 2, kPromptRows = kRowGroups * kGroupRows;
constexpr unsigned kPromptThreads = ptx::kGroupThreads * (1 + kRowGroups);
constexpr int kRingTiles = 6; /* keys of tile i are step 2i, its values step 2i + 1; steps go on from unit to unit */
constexpr int kLoaderRegisters = 40, kRowRegisters = 232; /* of a thread; 64 K in all */

/* kPadded: D filled up to 64 or 128. */
template <class T, int kPadded>
struct PromptShape {
  static constexpr int kPanels = kPadded / kPanel;
  static constexpr int kTileBytes = kTile * kPadded * static_cast<int>(sizeof(T));
  static constexpr int kQueryBytes = kGroupRows * kPadded * static_cast<int>(sizeof(T));
  static constexpr int kTotalBytes = kGroupRows * kPadded * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kRingTiles * kTileBytes + kRowGroups * (kQueryBytes + kTotalBytes);
};

/* ---- warps that load ---- */

/* One of four: two have the even steps copied, keys, and two the odd ones, values. */
template <class T, int kPadded>
class TileLoader {
  using Tiles = PromptShape<T, kPadded>;
  static constexpr int kLoaders = 2; /* of each */

 public:
  /* landed: see below, for values */
  __device__ TileLoader(const Attention<T> &attention, const Boxes &boxes, const Ring<kRingTiles> &ring, uint32_t landed, int number)
      : attention_(attention), boxes_(boxes), copies_(attention, boxes.rows, number % kLoaders, kLoaders), ring_(ring), landed_(landed), number_(number), step_(number / kLoaders) {}

  __device__ void load(const Piece &piece) {
    const UnitTiles tiles(attention_, piece);
    const auto load_with = [&](const BoxCopies<kPadded> &copies, const TensorMap &map, int first_key, uint32_t barrier) {
      const int block = copies.block_of(piece.unit.sequence, first_key, tiles.needed, boxes_.num_blocks);
      ring_.await_empty(step_);
      copies.load(map, piece.unit.head, block, first_key, ring_.place(step_), barrier);
    };
    for (int tile = 0; tile < tiles.num; ++tile, step_ += 2) {
      const int first_key = (tiles.first + tile) * kTile;
      const bool is_whole = first_key >= tiles.needed.first && first_key + kTile <= tiles.needed.last;
      if (number_ < kLoaders) {
        load_with(copies_, boxes_.keys, first_key, ring_.full(step_));
      } else if (is_whole) {
        load_with(copies_, boxes_.values, first_key, ring_.full(step_));
      } else if (number_ == kLoaders) {
        load_with(BoxCopies<kPadded>(attention_, boxes_.rows, 0, 1), boxes_.values, first_key, landed_);
        clear_unneeded(first_key, tiles.needed);
      } else {
        ring_.await_empty(step_); /* a barrier tells two turns of the ring apart and no more */
      }
    }
  }

 private:
  /* Values of keys that no row sees become 0, for whatever lies there would be multiplied by 0; then the tile is full. */
  __device__ void clear_unneeded(int first_key, Range needed) {
    const int lane = threadIdx.x % 32;
    ptx::wait_mbarrier(landed_, landed_phase_);
    landed_phase_ ^= 1;
    for (int i = lane; i < Tiles::kTileBytes / 16; i += 32) {
      const int key = first_key + i / (kPanelRow / 16) % kTile;
      if (key < needed.first || key >= needed.last) ptx::clear_shared(ring_.place(step_) + i * 16);
    }
    ptx::fence_async();
    __syncwarp(); /* all lanes have cleared theirs */
    if (lane == 0) ptx::arrive_mbarrier(ring_.full(step_));
  }

  const Attention<T> &attention_;
  const Boxes &boxes_;
  const BoxCopies<kPadded> copies_;
  const Ring<kRingTiles> &ring_;
  const uint32_t landed_; /* barrier that tells one warp of a tile which it wants to touch first, and has copied alone */
  const int number_;
  int step_, landed_phase_ = 0;
};

/* ---- a group of four warps at its 64 rows; a thread's view ---- */

template <class T, int kPadded>
class RowGroup {
  using Tiles = PromptShape<T, kPadded>;
  using State = RowState<kPadded / 8>;

 public:
  /* queries, totals: the group's places in shared memory */
  __device__ RowGroup(const Attention<T> &attention, const Ring<kRingTiles> &ring, T *queries, float *totals)
      : attention_(attention), ring_(ring), queries_(queries), total_(totals + threadIdx.x % ptx::kGroupThreads),
        group_(threadIdx.x / ptx::kGroupThreads - 1), lane_(threadIdx.x % 32), warp_(threadIdx.x % ptx::kGroupThreads / 32) {}

  __device__ void attend(const Piece &piece) {
    const UnitTiles tiles(attention_, piece);
    start(piece.unit);
    State state;
    state.clear();
    if (tiles.num > 0) attend_tiles(tiles, state);
    step_ += 2 * tiles.num;
    write_out(piece.unit, state);
  }

 private:
  /* ---- rows ---- */

  __device__ void sync_group() const { ptx::sync_barrier(1 + group_, ptx::kGroupThreads); }

  /* Where chunk c of row r of the queries or results lies, as the copy engine would have laid it down. */
  __device__ T *place(int row, int chunk) const { return queries_ + (chunk / 8 * kGroupRows + row) * kPanel + ((chunk ^ row) & 7) * 8; }

  /* Queries through shared memory to registers, 0 where there is none; what the lane's rows see. */
  __device__ void start(const Unit &unit) {
    constexpr int kChunks = kPadded / 8;
    const int first_token = attention_.starts[unit.sequence];
    for (int i = threadIdx.x % ptx::kGroupThreads; i < kGroupRows * kChunks; i += ptx::kGroupThreads) {
      const int row = i / kChunks, chunk = i % kChunks, of_unit = group_ * kGroupRows + row;
      const bool exists = of_unit < unit.rows && chunk * 8 < attention_.size;
      const T *from = attention_.q.data;
      if (exists) from = attention_.q.at(first_token + query_of(attention_, unit, of_unit), head_of(attention_, unit, of_unit)) + chunk * 8;
      ptx::copy_async(ptx::shared_address(place(row, chunk)), from, exists ? 16 : 0);
    }
    ptx::commit_copies();
    const int first_row = group_ * kGroupRows;
    rows_ = ScoredRows(attention_, unit, first_row + warp_ * 16 + lane_ / 4, {first_row, first_row + kGroupRows});
    ptx::wait_copies<0>();
    sync_group();
#pragma unroll
    for (int k = 0; k < kPadded / 16; ++k) {
      ptx::load_matrices<4>(q_[k], ptx::shared_address(place(warp_ * 16 + lane_ % 16, 2 * k + lane_ / 16)));
    }
  }

  /* ---- tiles ---- */

  /* What a thread holds from tile to tile. */
  struct Work {
    float products[8][4], scores[8][4];  /* with the next tile's keys; of this tile */
    uint32_t weights[kTile / 16][4];     /* of the tile before */
    Softmax total;                       /* of the splits that are done, whose values are in shared memory */
    bool has_total = false;
  };

  __device__ void attend_tiles(const UnitTiles &tiles, State &part) const {
    Work work;
    work.total.clear();
    multiply_keys(step_, work.products);
    await_products(work, part);
    ring_.release(step_);
    rows_.score(attention_, work.products, tiles.first * kTile, work.scores);
    const int last = tiles.num - 1;
    if (last == 0) {
      attend_tile<false, false>(tiles, 0, work, part);
    } else {
      attend_tile<false, true>(tiles, 0, work, part);
      for (int tile = 1; tile < last; ++tile) attend_tile<true, true>(tiles, tile, work, part);
      attend_tile<true, false>(tiles, last, work, part);
    }
    add_values(step_ + 2 * last + 1, work.weights, part.values);
    await_products(work, part);
    ring_.release(step_ + 2 * last + 1);
    merge(work, part);
    static_cast<Softmax &>(part) = work.total;
  }

  /* While the softmax of a tile is at work, the products with the next tile's keys and those with the values of the tile before are on
   * their way. None is from one tile to the next: the compiler would have each wait for itself. */
  template <bool kHasPrevious, bool kHasNext>
  __device__ __forceinline__ void attend_tile(const UnitTiles &tiles, int tile, Work &work, State &part) const {
    const int step = step_ + 2 * tile;
    const bool begins_split = kHasPrevious && (tiles.first + tile) % (kSplit / kTile) == 0;
    if constexpr (kHasNext) multiply_keys(step + 2, work.products);
    if constexpr (kHasPrevious) add_values(step - 1, work.weights, part.values);
    Softmax softmax = part;
    float keep[2];
    if (begins_split) softmax.clear();
    softmax.weigh(work.scores, keep);
    ptx::hold_registers(work.scores);
    /* The wait stands behind a branch, for within one block of code the compiler has the softmax wait for the products, too. */
    if (begins_split) {
      await_products(work, part);
      merge(work, part);
      for_values(part, [&](float &value, int i) {
        total_[i * ptx::kGroupThreads] = value;
        value = 0.0f;
      });
    } else {
      await_products(work, part);
      part.scale(keep);
    }
    if constexpr (kHasPrevious) ring_.release(step - 1);
    static_cast<Softmax &>(part) = softmax;
    round_weights<T>(work.scores, work.weights);
    if constexpr (!kHasNext) return;
    ring_.release(step + 2);
    rows_.score(attention_, work.products, (tiles.first + tile + 1) * kTile, work.scores);
  }

  /* Total and part together; values: in part. */
  __device__ void merge(Work &work, State &part) const {
    Softmax &total = work.total;
    const Merge both[2] = {{total.max[0], total.sum[0], part.max[0], part.sum[0]}, {total.max[1], total.sum[1], part.max[1], part.sum[1]}};
    for_values(part, [&](float &value, int i) {
      const float before = work.has_total ? total_[i * ptx::kGroupThreads] : 0.0f;
      value = both[i / 2 % 2](before, value);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total.sum[r] = both[r](total.sum[r], part.sum[r]);
      total.max[r] = both[r].max;
    }
    work.has_total = true;
  }

  /* fn(value, its number) */
  template <class Function>
  __device__ static __forceinline__ void for_values(State &state, Function fn) {
#pragma unroll
    for (int i = 0; i < kPadded / 2; ++i) fn(state.values[i / 4][i % 4], i);
  }

  /* scores = queries * keys, 16 of D at a time in ascending order */
  __device__ __forceinline__ void multiply_keys(int step, float (&scores)[8][4]) const {
    ring_.await_full(step);
    const uint64_t keys = ptx::matrix_at(ring_.place(step));
    ptx::fence_products();
#pragma unroll
    for (int k = 0; k < kPadded / 16; ++k) {
      ptx::multiply_async<T, kTile>(scores, q_[k], ptx::matrix_beyond(keys, k / 4 * kTile * kPanelRow + k % 4 * 32), k > 0);
    }
    ptx::commit_products();
  }

  /* values += weights * the tile's values, 16 keys at a time in ascending order */
  __device__ __forceinline__ void add_values(int step, uint32_t (&weights)[kTile / 16][4], float (&values)[kPadded / 8][4]) const {
    ring_.await_full(step);
    const uint64_t tile = ptx::matrix_at(ring_.place(step), kTile * kPanelRow);
    ptx::hold_registers(weights);
    ptx::hold_registers(values);
    ptx::fence_products();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      ptx::multiply_async<T, kPadded, true>(values, weights[k], ptx::matrix_beyond(tile, k * 16 * kPanelRow), true);
    }
    ptx::commit_products();
  }

  /* Until none is on its way. */
  __device__ __forceinline__ void await_products(Work &work, State &part) const {
    ptx::wait_products<0>();
    ptx::hold_registers(work.products);
    ptx::hold_registers(work.weights);
    ptx::hold_registers(part.values);
  }

  /* ---- results ---- */

  /* Through the queries' place, so that rows are written 16 bytes at a time. A row without keys gives 0. */
  __device__ void write_out(const Unit &unit, const State &state) const {
    sync_group(); /* nobody reads the queries any more */
#pragma unroll
    for (int n = 0; n < kPadded / 8; n += 2) {
      uint32_t matrices[4]; /* rows 0-7 and 8-15 of columns 8n .., then of the next 8 */
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = j % 2;
        const float *const two = &state.values[n + j / 2][2 * r];
        const float sum = state.sum[r];
        matrices[j] = sum == 0.0f ? pair_of<T>(0.0f, 0.0f) : pair_of<T>(two[0] / sum, two[1] / sum);
      }
      ptx::store_matrices(ptx::shared_address(place(warp_ * 16 + lane_ % 16, n + lane_ / 16)), matrices);
    }
    __syncwarp(); /* a warp copies its own 16 rows */
    constexpr int kChunks = kPadded / 8;
    const int first_token = attention_.starts[unit.sequence];
    for (int i = lane_; i < 16 * kChunks; i += 32) {
      const int row = warp_ * 16 + i / kChunks, chunk = i % kChunks, of_unit = group_ * kGroupRows + row;
      if (of_unit >= unit.rows || chunk * 8 >= attention_.size) continue;
      T *const to = attention_.out.at(first_token + query_of(attention_, unit, of_unit), head_of(attention_, unit, of_unit)) + chunk * 8;
      store_pack<8>(to, *reinterpret_cast<const Pack<T, 8> *>(place(row, chunk)));
    }
    sync_group(); /* the place is free for the next unit's queries */
  }

  const Attention<T> &attention_;
  const Ring<kRingTiles> &ring_;
  T *const queries_;
  float *const total_; /* the thread's values of the splits that are done, kGroupThreads apart */
  const int group_, lane_, warp_;
  int step_ = 0;
  ScoredRows rows_;
  uint32_t q_[kPadded / 16][4]; /* the warp's rows, as the left side of products */
};

/* ---- the kernel ---- */

/* Sequences with many rows. Blocks take units in turn, those with the most keys first. */
template <class T, int kPadded>
__global__ void __launch_bounds__(kPromptThreads, 1) prompt_kernel(Attention<T> attention, const __grid_constant__ Boxes boxes) {
#if LMI_HAS_SM90A
  using Tiles = PromptShape<T, kPadded>;
  char *const shared = dynamic_shared<char>();
  LMI_SHARED(RingBarriers<kRingTiles>, barriers);
  LMI_SHARED(uint64_t, landed);
  const Ring<kRingTiles> ring(ptx::shared_address(shared), Tiles::kTileBytes, barriers);
  if (threadIdx.x == 0) {
    ptx::init_mbarrier(ptx::shared_address(&landed), 1);
    ring.init(kRowGroups * 4);
  }
  const Schedule<kPromptRows, kPromptThreads> schedule(attention, false); /* meets all threads */
  const int last = schedule.num_pieces() - 1 - static_cast<int>(blockIdx.x);
  if (threadIdx.x < ptx::kGroupThreads) {
    ptx::give_registers<kLoaderRegisters>();
    TileLoader<T, kPadded> loader(attention, boxes, ring, ptx::shared_address(&landed), threadIdx.x / 32);
    for (int index = last; index >= 0; index -= gridDim.x) loader.load(schedule.piece(attention, index));
  } else {
    ptx::take_registers<kRowRegisters>();
    const int group = threadIdx.x / ptx::kGroupThreads - 1;
    char *const queries = shared + kRingTiles * Tiles::kTileBytes, *const totals = queries + kRowGroups * Tiles::kQueryBytes;
    RowGroup<T, kPadded> rows(attention, ring, reinterpret_cast<T *>(queries + group * Tiles::kQueryBytes),
                              reinterpret_cast<float *>(totals + group * Tiles::kTotalBytes));
    for (int index = last; index >= 0; index -= gridDim.x) rows.attend(schedule.piece(attention, index));
  }
#endif
}

}  // namespace lmi::cuda
