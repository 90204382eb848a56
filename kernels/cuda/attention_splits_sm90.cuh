/* Attention of sequences with few rows on sm_90a: decoding. A block owns pieces, each up to 16 rows of a sequence and key head against
 * a split of 512 keys. Two warps have the copy engine bring keys and two values, block by block of the cache, through two rings in
 * shared memory, as far ahead as there is room, from piece to piece. Of eight warps each makes the scores of one tile of 64 keys; they
 * tell each other the greatest and leave weights in shared memory; then each sums the values of an eighth of D, tile by tile. So they
 * meet twice a piece. Bound by the reading of the cache.
 *
 * Scores, weights and values are summed in the order of attention_tiles.cuh. */
#pragma once
#include "cuda/attention_boxes_sm90.cuh"
#include "cuda/attention_tiles.cuh"
#include "cuda/ring_sm90.cuh"

namespace lmi::cuda {

constexpr int kSplitTiles = kSplit / kTile;
constexpr int kSplitLoaders = 2;                      /* warps a ring */
constexpr unsigned kSplitThreads = 32 * kSplitTiles; /* a warp a tile */
constexpr unsigned kAllSplitThreads = kSplitThreads + 2 * 32 * kSplitLoaders;

/* kPadded: D filled up to 64, 128 or 256. */
template <class T, int kPadded>
struct SplitShape {
  static constexpr int kTileBytes = kTile * kPadded * static_cast<int>(sizeof(T));
  static constexpr int kSlots = (96 << 10) / kTileBytes; /* of each ring */
  static constexpr int kRingBytes = kSlots * kTileBytes;
  static constexpr int kWeightBytes = kSplit * kUnitRows * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = 2 * kRingBytes + kWeightBytes;
};

/* ---- a warp that loads: keys, or values ---- */

template <class T, int kPadded>
class SplitLoader {
  using Tiles = Ring<SplitShape<T, kPadded>::kSlots>;

 public:
  __device__ SplitLoader(const Attention<T> &attention, const Boxes &boxes, const TensorMap &map, Tiles ring, int part)
      : attention_(attention), copies_(attention, boxes.rows, part, kSplitLoaders), map_(map), num_blocks_(boxes.num_blocks), ring_(ring) {}

  __device__ void load(const Piece &piece) {
    const UnitTiles tiles(attention_, piece);
    int blocks[kSplitTiles]; /* of the whole piece, so that no copy waits for a table */
#pragma unroll
    for (int tile = 0; tile < kSplitTiles; ++tile) {
      blocks[tile] = num_blocks_;
      if (tile < tiles.num) blocks[tile] = copies_.block_of(piece.unit.sequence, (tiles.first + tile) * kTile, tiles.needed, num_blocks_);
    }
#pragma unroll
    for (int tile = 0; tile < kSplitTiles; ++tile) {
      if (tile >= tiles.num) continue;
      ring_.await_empty(step_);
      copies_.load(map_, piece.unit.head, blocks[tile], (tiles.first + tile) * kTile, ring_.place(step_), ring_.full(step_));
      ++step_;
    }
  }

 private:
  const Attention<T> &attention_;
  const BoxCopies<kPadded> copies_;
  const TensorMap &map_;
  const int num_blocks_;
  const Tiles ring_;
  unsigned step_ = 0;
};

/* ---- eight warps at a piece; a thread's view ---- */

/* What the warps tell each other of each tile and row. */
struct SplitExchange {
  float greatest[kSplitTiles][kUnitRows], sums[kSplitTiles][kUnitRows];
};

template <class T, int kPadded>
class SplitAtWork {
  using Tiles = Ring<SplitShape<T, kPadded>::kSlots>;

 public:
  static constexpr int kColumns = kPadded / kSplitTiles; /* of D that a warp sums */
  using State = RowState<kColumns / 8>;

  /* weights: shared memory for those of a piece */
  __device__ SplitAtWork(const Attention<T> &attention, Tiles keys, Tiles values, SplitExchange &exchange, char *weights)
      : attention_(attention), keys_(keys), values_(values), exchange_(exchange), weights_(weights), lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {}

  __device__ void attend(const Piece &piece, State &state) {
    const UnitTiles tiles(attention_, piece);
    const bool has_tile = warp_ < tiles.num;
    float scores[8][4], keep[kSplitTiles][2], base[2];
    if (has_tile) {
      make_scores(piece.unit, (tiles.first + warp_) * kTile, scores);
      tell_greatest(scores);
    }
    pass_keys(has_tile ? warp_ + 1 : 0, tiles.num);
    meet();
    compare(tiles.num, state, keep, base);
    if (has_tile) weigh(scores, base);
    meet();
    add_values(tiles, keep, state);
    step_ += tiles.num;
  }

 private:
  __device__ static void meet() { ptx::sync_barrier(1, kSplitThreads); }

  /* ---- keys ---- */

  /* Tiles [first, last) of others: every warp waits for every tile, for a barrier tells two phases apart and no more. */
  __device__ void pass_keys(int first, int last) const {
    for (int tile = first; tile < last; ++tile) {
      keys_.await_full(step_ + tile);
      __syncwarp(); /* all lanes have seen it */
      keys_.release(step_ + tile);
    }
  }

  /* Of the warp's tile, for all rows. */
  __device__ void make_scores(const Unit &unit, int first_key, float (&scores)[8][4]) const {
    uint32_t q[kPadded / 16][4];
    read_queries<kPadded, 2>(attention_, unit, q);
    const ScoredRows rows(attention_, unit, lane_ / 4, {0, kUnitRows});
    float products[8][4] = {};
    pass_keys(0, warp_);
    keys_.await_full(step_ + warp_);
    const uint32_t tile = keys_.place(step_ + warp_);
#pragma unroll
    for (int k = 0; k < kPadded / 16; ++k) {
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        ptx::load_matrices<4>(b, tile + place_in_panels(n * 8 + lane_ / 16 * 8 + lane_ % 8, 2 * k + lane_ / 8 % 2));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        ptx::multiply<T>(products[n], q[k], left);
        ptx::multiply<T>(products[n + 1], q[k], right);
      }
    }
    __syncwarp(); /* all lanes have read the keys */
    keys_.release(step_ + warp_);
    rows.score(attention_, products, first_key, scores);
  }

  /* ---- softmax, as Softmax::weigh takes one tile after the other ---- */

  __device__ void tell_greatest(const float (&scores)[8][4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float greatest = -INFINITY;
#pragma unroll
      for (int n = 0; n < 8; ++n) greatest = fmaxf(greatest, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 1));
      greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 2));
      if (lane_ % 4 == 0) exchange_.greatest[warp_][lane_ / 4 + 8 * r] = greatest;
    }
  }

  /* The piece's greatest scores into the state; keep: what the values summed before each tile must be multiplied by; base: what the
   * warp's own weights are relative to. */
  __device__ void compare(int num_tiles, State &state, float (&keep)[kSplitTiles][2], float (&base)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float greatest = -INFINITY;
      base[r] = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kSplitTiles; ++tile) {
        if (tile >= num_tiles) continue;
        const float before = greatest;
        greatest = fmaxf(greatest, exchange_.greatest[tile][lane_ / 4 + 8 * r]);
        const float upto = greatest == -INFINITY ? 0.0f : greatest; /* no key seen yet: all weights are 0 */
        keep[tile][r] = ptx::exp2_fast(before - upto);
        if (tile == warp_) base[r] = upto;
      }
      state.max[r] = greatest;
    }
  }

  /* Where the lane's weights of 16 keys of a tile lie, as the left side of a product. */
  __device__ Pack<uint32_t, 4> *weights_of(int tile, int k) const {
    return reinterpret_cast<Pack<uint32_t, 4> *>(weights_) + (tile * (kTile / 16) + k) * 32 + lane_;
  }

  /* The scores of the warp's tile become weights, for all to see. */
  __device__ void weigh(float (&scores)[8][4], const float (&base)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        scores[n][2 * r] = ptx::exp2_fast(scores[n][2 * r] - base[r]);
        scores[n][2 * r + 1] = ptx::exp2_fast(scores[n][2 * r + 1] - base[r]);
        sum += scores[n][2 * r] + scores[n][2 * r + 1];
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane_ % 4 == 0) exchange_.sums[warp_][lane_ / 4 + 8 * r] = sum;
    }
    uint32_t weights[kTile / 16][4];
    round_weights<T>(scores, weights);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) *weights_of(warp_, k) = {{weights[k][0], weights[k][1], weights[k][2], weights[k][3]}};
  }

  /* ---- values ---- */

  /* Weights times the values of the warp's columns, tile by tile in ascending order. */
  __device__ void add_values(const UnitTiles &tiles, const float (&keep)[kSplitTiles][2], State &state) const {
    const float max[2] = {state.max[0], state.max[1]};
    state.clear();
#pragma unroll
    for (int r = 0; r < 2; ++r) state.max[r] = max[r];
#pragma unroll
    for (int tile = 0; tile < kSplitTiles; ++tile) {
      if (tile >= tiles.num) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) state.sum[r] = fmaf(keep[tile][r], state.sum[r], exchange_.sums[tile][lane_ / 4 + 8 * r]);
      state.scale(keep[tile]);
      values_.await_full(step_ + tile);
      if (warp_ * kColumns < attention_.size) add_tile(tile, tiles, state); /* else these columns only fill D up */
      __syncwarp();                                                         /* all lanes have read the values */
      values_.release(step_ + tile);
    }
  }

  __device__ __forceinline__ void add_tile(int number, const UnitTiles &tiles, State &state) const {
    const uint32_t tile = values_.place(step_ + number);
    const int first_key = (tiles.first + number) * kTile;
    const bool is_whole = first_key >= tiles.needed.first && first_key + kTile <= tiles.needed.last;
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      const Pack<uint32_t, 4> own = *weights_of(number, k);
      const uint32_t weights[4] = {own.at[0], own.at[1], own.at[2], own.at[3]};
      uint32_t b[kColumns / 8][2];
      load_values(tile, k, b);
      if (!is_whole) {
        const int key = first_key + k * 16 + lane_ % 4 * 2;
        const uint32_t masks[2] = {mask_of(key, tiles.needed), mask_of(key + 8, tiles.needed)};
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) b[n][0] &= masks[0], b[n][1] &= masks[1];
      }
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) ptx::multiply<T>(state.values[n], weights, b[n]);
    }
  }

  /* Values of 16 keys and the warp's columns, as the right side of products. */
  __device__ __forceinline__ void load_values(uint32_t tile, int k, uint32_t (&b)[kColumns / 8][2]) const {
    const int key = k * 16 + lane_ % 16, chunk = warp_ * kColumns / 8;
    if constexpr (kColumns == 8) {
      ptx::load_matrices<2, true>(b[0], tile + place_in_panels(key, chunk));
    } else {
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += 2) {
        uint32_t four[4];
        ptx::load_matrices<4, true>(four, tile + place_in_panels(key, chunk + n + lane_ / 16));
        b[n][0] = four[0], b[n][1] = four[1], b[n + 1][0] = four[2], b[n + 1][1] = four[3];
      }
    }
  }

  /* Of two keys: whatever lies where no row sees a key must not be multiplied by 0. */
  __device__ static uint32_t mask_of(int key, Range needed) {
    const uint32_t low = key >= needed.first && key < needed.last ? 0xffffu : 0u;
    return low | (key + 1 >= needed.first && key + 1 < needed.last ? 0xffff0000u : 0u);
  }

  const Attention<T> &attention_;
  const Tiles keys_, values_;
  SplitExchange &exchange_;
  char *const weights_;
  const int lane_, warp_;
  unsigned step_ = 0; /* tiles of earlier pieces */
};

/* ---- the kernel ---- */

/* Blocks take pieces in turn, one on a multiprocessor. */
template <class T, int kPadded>
__global__ void __launch_bounds__(kAllSplitThreads, 1)
    split_kernel(Attention<T> attention, const __grid_constant__ Boxes boxes, PieceStates<kPadded> states) {
#if LMI_HAS_SM90A
  using Shape = SplitShape<T, kPadded>;
  using Barriers = RingBarriers<Shape::kSlots>;
  char *const memory = dynamic_shared<char>();
  LMI_SHARED(Barriers, of_keys);
  LMI_SHARED(Barriers, of_values);
  LMI_SHARED(SplitExchange, exchange);
  const Ring<Shape::kSlots> keys(ptx::shared_address(memory), Shape::kTileBytes, of_keys);
  const Ring<Shape::kSlots> values(ptx::shared_address(memory) + Shape::kRingBytes, Shape::kTileBytes, of_values);
  if (threadIdx.x == 0) {
    keys.init(kSplitTiles);
    values.init(kSplitTiles);
  }
  const Schedule<kUnitRows, kAllSplitThreads> schedule(attention, true); /* meets all threads */
  if (threadIdx.x >= kSplitThreads) {
    const int number = (threadIdx.x - kSplitThreads) / 32;
    const bool loads_keys = number < kSplitLoaders;
    SplitLoader<T, kPadded> loader(attention, boxes, loads_keys ? boxes.keys : boxes.values, loads_keys ? keys : values,
                                   number % kSplitLoaders);
    for (int index = blockIdx.x; index < schedule.num_pieces(); index += gridDim.x) loader.load(schedule.piece(attention, index));
  } else {
    using Work = SplitAtWork<T, kPadded>;
    Work work(attention, keys, values, exchange, memory + 2 * Shape::kRingBytes);
    for (int index = blockIdx.x; index < schedule.num_pieces(); index += gridDim.x) {
      const Piece piece = schedule.piece(attention, index);
      const Range all = splits_of(attention, piece.unit.sequence);
      typename Work::State state;
      work.attend(piece, state);
      if (all.last - all.first > 1) write_state<Work::kColumns>(attention, piece.unit, state, states, index);
      else write_out<Work::kColumns>(attention, piece.unit, state);
    }
  }
#endif
}

}  // namespace lmi::cuda
