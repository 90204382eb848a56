/* Attention of prompts on sm_90a. A block owns units of 128 rows of one sequence and key head: one warp has the copy engine bring
 * tiles of 64 keys and values, block by block of the cache, through a ring in shared memory; two groups of four warps multiply 64
 * rows each (wgmma), their scores and weighted values in registers, the sums of earlier splits in shared memory. While a group works
 * on a tile's softmax, its products with the values of the tile before are on their way. Bound by the matrix units.
 *
 * Scores, weights and values are summed in the order of attention_tiles.cuh. */
#pragma once
#include "cuda/attention_problem.cuh"
#include "cuda/attention_state.cuh"
#include "cuda/ring_sm90.cuh"

namespace lmi::cuda {

constexpr int kGroupRows = 64, kRowGroups = 2, kPromptRows = kRowGroups * kGroupRows;
constexpr unsigned kPromptThreads = ptx::kGroupThreads * (1 + kRowGroups);
constexpr int kRingTiles = 6; /* keys of tile i are step 2i, its values step 2i + 1; steps go on from unit to unit */
constexpr int kPanel = 64, kPanelRow = 128;               /* columns of D whose rows lie together in shared memory; their bytes */
constexpr int kLoaderRegisters = 24, kRowRegisters = 240; /* of a thread; 64 K in all */

/* kPadded: D filled up to 64 or 128. */
template <class T, int kPadded>
struct PromptShape {
  static constexpr int kPanels = kPadded / kPanel;
  static constexpr int kTileBytes = kTile * kPadded * static_cast<int>(sizeof(T));
  static constexpr int kQueryBytes = kGroupRows * kPadded * static_cast<int>(sizeof(T));
  static constexpr int kTotalBytes = kGroupRows * kPadded * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kRingTiles * kTileBytes + kRowGroups * (kQueryBytes + kTotalBytes);
};

/* The part of a cache's block that one copy brings: 64 columns of `rows` tokens, which divide a tile. */
struct Boxes {
  TensorMap keys, values;
  int rows, num_blocks;
};

/* ---- the warp that loads ---- */

template <class T, int kPadded>
class TileLoader {
  using Tiles = PromptShape<T, kPadded>;

 public:
  __device__ TileLoader(const Attention<T> &attention, const Boxes &boxes, const Ring<kRingTiles> &ring, uint32_t landed)
      : attention_(attention), boxes_(boxes), ring_(ring), landed_(landed) {}

  __device__ void load(const Piece &piece) {
    const UnitTiles tiles(attention_, piece);
    for (int tile = 0; tile < tiles.num; ++tile) {
      const int first_key = (tiles.first + tile) * kTile;
      ring_.await_empty(step_);
      load_boxes(boxes_.keys, piece.unit, first_key, tiles.needed, ring_.full(step_));
      ++step_;
      ring_.await_empty(step_);
      const bool is_whole = first_key >= tiles.needed.first && first_key + kTile <= tiles.needed.last;
      load_boxes(boxes_.values, piece.unit, first_key, tiles.needed, is_whole ? ring_.full(step_) : landed_);
      if (!is_whole) clear_unneeded(first_key, tiles.needed);
      ++step_;
    }
  }

 private:
  /* A lane has one box copied; none of a block that nobody needs, which may not be there: beyond the cache all is 0. */
  __device__ void load_boxes(const TensorMap &map, const Unit &unit, int first_key, Range needed, uint32_t barrier) const {
    const int lane = threadIdx.x % 32, boxes = kTile / boxes_.rows, row = lane % boxes * boxes_.rows, panel = lane / boxes;
    if (lane == 0) ptx::arrive_expecting(barrier, Tiles::kTileBytes);
    if (panel >= Tiles::kPanels) return;
    const int key = first_key + row;
    const bool is_needed = key < needed.last && key + boxes_.rows > needed.first;
    const int *const table = attention_.tables + unit.sequence * attention_.tables_stride;
    const int block = is_needed ? table[key / attention_.block_size] : boxes_.num_blocks;
    const int at[] = {panel * kPanel, key % attention_.block_size, unit.head, block};
    ptx::copy_box(ring_.place(step_) + (panel * kTile + row) * kPanelRow, map, at, barrier);
  }

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
  const Ring<kRingTiles> &ring_;
  const uint32_t landed_; /* barrier that tells this warp of a tile which it wants to touch first */
  int step_ = 0, landed_phase_ = 0;
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

  /* Queries to shared memory, 0 where there is none; what the lane's rows see. */
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
    for (int r = 0; r < 2; ++r) {
      const int of_unit = min(group_ * kGroupRows + warp_ * 16 + lane_ / 4 + 8 * r, unit.rows - 1); /* one too many does as the last does */
      const int query = query_of(attention_, unit, of_unit);
      position_[r] = attention_.position(unit.sequence, query);
      head_[r] = head_of(attention_, unit, of_unit);
    }
    num_keys_ = attention_.key_lengths[unit.sequence];
    const int first_row = min(group_ * kGroupRows, unit.rows - 1), last_row = min((group_ + 1) * kGroupRows, unit.rows) - 1;
    seen_by_all_ = {attention_.seen(unit.sequence, query_of(attention_, unit, last_row)).first,
                    attention_.seen(unit.sequence, query_of(attention_, unit, first_row)).last};
    ptx::wait_copies<0>();
    ptx::fence_async();
    sync_group();
  }

  /* ---- tiles ---- */

  __device__ void attend_tiles(const UnitTiles &tiles, State &part) const {
    Softmax total; /* of the splits that are done, whose values are in shared memory */
    bool is_first_split = true;
    float scores[8][4], keep[2];
    uint32_t weights[kTile / 16][4];
    total.clear();
    multiply_keys(step_, scores);
    ptx::wait_products<0>();
    ptx::hold_registers(scores);
    ring_.release(step_);
    score(scores, tiles.first * kTile);
    part.weigh(scores, keep); /* nothing is there to keep */
    round_weights(scores, weights);
    for (int tile = 1; tile < tiles.num; ++tile) {
      const int step = step_ + 2 * tile;
      multiply_keys(step, scores);
      add_values(step - 1, weights, part.values);
      ptx::wait_products<1>();
      ptx::hold_registers(scores);
      ring_.release(step);
      const bool begins_split = (tiles.first + tile) % (kSplit / kTile) == 0;
      Softmax next = part;
      if (begins_split) next.clear();
      score(scores, (tiles.first + tile) * kTile);
      next.weigh(scores, keep);
      ptx::wait_products<0>();
      ptx::hold_registers(part.values);
      ptx::hold_registers(weights);
      ring_.release(step - 1);
      if (begins_split) {
        merge(total, is_first_split, part);
        is_first_split = false;
        for_values(part, [&](float &value, int i) {
          total_[i * ptx::kGroupThreads] = value;
          value = 0.0f;
        });
      } else {
        part.scale(keep);
      }
      static_cast<Softmax &>(part) = next;
      round_weights(scores, weights);
    }
    add_values(step_ + 2 * tiles.num - 1, weights, part.values);
    ptx::wait_products<0>();
    ptx::hold_registers(part.values);
    ring_.release(step_ + 2 * tiles.num - 1);
    merge(total, is_first_split, part);
    static_cast<Softmax &>(part) = total;
  }

  /* total and part together; values: in part. */
  __device__ void merge(Softmax &total, bool is_first_split, State &part) const {
    const Merge both[2] = {{total.max[0], total.sum[0], part.max[0], part.sum[0]}, {total.max[1], total.sum[1], part.max[1], part.sum[1]}};
    for_values(part, [&](float &value, int i) {
      const float before = is_first_split ? 0.0f : total_[i * ptx::kGroupThreads];
      value = both[i / 2 % 2](before, value);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total.sum[r] = both[r](total.sum[r], part.sum[r]);
      total.max[r] = both[r].max;
    }
  }

  /* fn(value, its number) */
  template <class Function>
  __device__ static __forceinline__ void for_values(State &state, Function fn) {
#pragma unroll
    for (int i = 0; i < kPadded / 2; ++i) fn(state.values[i / 4][i % 4], i);
  }

  /* scores = queries * keys, 16 of D at a time in ascending order */
  __device__ void multiply_keys(int step, float (&scores)[8][4]) const {
    ring_.await_full(step);
    const uint32_t queries = ptx::shared_address(queries_), keys = ring_.place(step);
    ptx::fence_products();
#pragma unroll
    for (int k = 0; k < kPadded / 16; ++k) {
      const uint32_t column = k % 4 * 32;
      const uint64_t left = ptx::matrix_at(queries + k / 4 * kGroupRows * kPanelRow + column);
      ptx::multiply_async<T, kTile>(scores, left, ptx::matrix_at(keys + k / 4 * kTile * kPanelRow + column), k > 0);
    }
    ptx::commit_products();
  }

  /* values += weights * the tile's values, 16 keys at a time in ascending order */
  __device__ void add_values(int step, uint32_t (&weights)[kTile / 16][4], float (&values)[kPadded / 8][4]) const {
    ring_.await_full(step);
    const uint32_t tile = ring_.place(step);
    ptx::hold_registers(weights);
    ptx::hold_registers(values);
    ptx::fence_products();
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      ptx::multiply_async<T, kPadded, true>(values, weights[k], ptx::matrix_at(tile + k * 16 * kPanelRow, kTile * kPanelRow), true);
    }
    ptx::commit_products();
  }

  /* Products become scores; those that a row does not see, -infinity. */
  __device__ void score(float (&scores)[8][4], int first_key) const {
    if (attention_.has_plain_scores()) for_scores(scores, [&](float &score, int, int) { score = attention_.plain_score(score); });
    else for_scores(scores, [&](float &score, int r, int i) { score = attention_.score(score, head_[r], first_key + i - position_[r]); });
    if (first_key >= seen_by_all_.first && first_key + kTile <= seen_by_all_.last) return;
    const Range seen[2] = {attention_.seen_from(position_[0], num_keys_), attention_.seen_from(position_[1], num_keys_)};
    for_scores(scores, [&](float &score, int r, int column) {
      const int key = first_key + column;
      if (key < seen[r].first || key >= seen[r].last) score = -INFINITY;
    });
  }

  /* fn(score, which of the lane's rows, key in the tile) */
  template <class Function>
  __device__ __forceinline__ void for_scores(float (&scores)[8][4], Function fn) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 16; ++i) fn(scores[i / 2][2 * r + i % 2], r, i / 2 * 8 + lane_ % 4 * 2 + i % 2);
    }
  }

  /* As the left side of products, 16 keys at a time. */
  __device__ static void round_weights(const float (&scores)[8][4], uint32_t (&weights)[kTile / 16][4]) {
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      const float(&low)[4] = scores[2 * k], (&high)[4] = scores[2 * k + 1];
      weights[k][0] = pair_of<T>(low[0], low[1]);
      weights[k][1] = pair_of<T>(low[2], low[3]);
      weights[k][2] = pair_of<T>(high[0], high[1]);
      weights[k][3] = pair_of<T>(high[2], high[3]);
    }
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
  int step_ = 0, num_keys_, position_[2], head_[2];
  Range seen_by_all_; /* keys that all rows of the group see */
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
    if (threadIdx.x >= 32) return;
    TileLoader<T, kPadded> loader(attention, boxes, ring, ptx::shared_address(&landed));
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

/* ---- which prompts ---- */

/* Whether sequences with many rows (Schedule) go to prompt_kernel: on a device that has it, bf16 or fp16 with a cache of the same, D
 * up to 128 (a state of 64 rows in registers), all tensors on borders of 16 bytes, and blocks of 8, 16, 32 or a multiple of 64
 * tokens, whose rows fill a swizzle. */
inline bool are_prompts_for_sm90(const lmi_attention_args &args) {
  const int64_t block_size = args.k_cache.size[2];
  const bool fits_tiles = block_size % kTile == 0 || (block_size >= 8 && kTile % block_size == 0);
  const bool is_of_halves = args.q.dtype != LMI_F32 && args.k_cache.dtype == args.q.dtype;
  return has_sm90a() && is_of_halves && args.q.size[2] <= 128 && fits_tiles && args.k_cache.size[0] > 0 &&
         is_wide({&args.out, &args.q, &args.k_cache, &args.v_cache});
}

inline Boxes boxes_of(const lmi_attention_args &args) {
  const int rows = static_cast<int>(std::min<int64_t>(args.k_cache.size[2], kTile));
  return {tensor_map(args.k_cache, {1, 1, rows, kPanel}), tensor_map(args.v_cache, {1, 1, rows, kPanel}), rows,
          static_cast<int>(args.k_cache.size[0])};
}

}  // namespace lmi::cuda
