/* Attention of a unit (16 rows) over tiles of 64 keys on tensor cores, bf16 and fp16, sm_80 and later. A KV head is read once for
 * all query heads of its group. Four warps share a unit: each makes the scores of 16 keys, all read all scores, and each sums the
 * values of a quarter of D, so that nothing is added across warps. Tiles of keys and values come in turn through a ring in shared
 * memory, several on their way at a time; those of an fp8 cache are widened to T, exactly, in a place of its own when their turn
 * comes. Bound by the reading of the cache. */
#pragma once
#include "cuda/attention_problem.cuh"
#include "cuda/attention_state.cuh"
#include "cuda/fp8.cuh"

namespace lmi::cuda {

constexpr int kScoreStride = 24; /* floats between rows of 16 scores: eight rows in different banks */

/* kPadded: D filled up to 64, 128 or 256. */
template <class T, class Cached, int kPadded>
struct TileShape {
  static constexpr bool kIsWidened = !std::is_same_v<T, Cached>;
  static constexpr int kEach = 16 / static_cast<int>(sizeof(Cached)); /* elements of a copy */
  static constexpr int kTileElements = kTile * kPadded;
  static constexpr int kSlots = kIsWidened ? (kPadded == 64 ? 16 : kPadded == 128 ? 8 : 3) : kPadded == 64 ? 8 : kPadded == 128 ? 6 : 3;
  /* tiles on their way; the slot before the current one is still read, unless it was widened */
  static constexpr int kAhead = kSlots - (kIsWidened ? 1 : 2);
  static constexpr int kColumns = kPadded / 4; /* of D that a warp sums */
  static constexpr int kRingBytes = kSlots * kTileElements * static_cast<int>(sizeof(Cached));
  static constexpr int kWidenedBytes = kIsWidened ? kTileElements * static_cast<int>(sizeof(T)) : 0;
  static constexpr int kScoreBytes = kIsWidened ? kTile * kScoreStride * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kSharedBytes = kRingBytes + kWidenedBytes + kScoreBytes;
  static_assert(kSharedBytes <= 96 << 10, "what every GPU has for a block");
};

/* The lane's two rows of q as the left side of products, 16 of D at a time; 0 beyond D and beyond the unit's rows. kWidth: numbers
 * read at once, 2 or 1. */
template <int kPadded, int kWidth, class T, class Cached>
__device__ __forceinline__ void read_queries(const Attention<T, Cached> &attention, const Unit &unit, uint32_t (&to)[kPadded / 16][4]) {
  const int lane = threadIdx.x % 32, first = attention.starts[unit.sequence];
  const T *from[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    from[r] = row < unit.rows ? attention.q.at(first + query_of(attention, unit, row), head_of(attention, unit, row)) : nullptr;
  }
#pragma unroll
  for (int k = 0; k < kPadded / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T *const row = from[i % 2];
      const int d = k * 16 + i / 2 * 8 + lane % 4 * 2;
      to[k][i] = 0;
      if (!row || d >= attention.size) continue;
      const Pack<T, 2> pair = kWidth == 2 ? load_pack<2>(row + d) : Pack<T, 2>{{row[d], row[d + 1]}};
      memcpy(&to[k][i], &pair, sizeof pair);
    }
  }
}

/* One unit at work; a thread's view. */
template <class T, class Cached, int kPadded>
class UnitAtWork {
  using Tiles = TileShape<T, Cached, kPadded>;
  static constexpr int kProducts = Tiles::kColumns / 8;

 public:
  using State = RowState<kProducts>;

  /* memory: kSharedBytes of shared memory */
  __device__ UnitAtWork(const Attention<T, Cached> &attention, const Piece &piece, char *memory)
      : attention_(attention), piece_(piece), unit_(piece.unit), memory_(memory), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {
    const UnitTiles tiles(attention, piece);
    needed_ = tiles.needed;
    first_tile_ = tiles.first;
    num_tiles_ = tiles.num;
    for (int r = 0; r < 2; ++r) {
      const int row = lane_ / 4 + 8 * r;
      if (row >= unit_.rows) continue;
      const int query = query_of(attention, unit_, row);
      seen_[r] = attention.seen(unit_.sequence, query);
      position_[r] = attention.position(unit_.sequence, query);
      head_[r] = head_of(attention, unit_, row);
    }
    read_queries<kPadded, 1>(attention, unit_, q_);
  }

  /* Leaves the unit's state in `total`; all threads of the block must call. */
  __device__ void attend(State &total) {
    State part;
    total.clear();
    part.clear();
    find_blocks(0);
    for (int step = 0; step < Tiles::kAhead; ++step) stage(step);
    for (int tile = 0; tile < num_tiles_; ++tile) {
      if (tile > 0 && (first_tile_ + tile) % (kSplit / kTile) == 0) {
        total.merge(part);
        part.clear();
      }
      T *const keys = await(2 * tile);
      score_keys(keys, tile);
      const T *const values = await(2 * tile + 1);
      add_values(keys, values, part);
    }
    total.merge(part);
    __syncthreads(); /* the ring is free for the next unit */
  }

 private:
  /* ---- tiles on their way: keys of tile i are step 2i, its values step 2i + 1 ---- */

  __device__ Cached *slot(int step) const { return reinterpret_cast<Cached *>(memory_) + step % Tiles::kSlots * Tiles::kTileElements; }
  __device__ T *widened() const { return reinterpret_cast<T *>(memory_ + Tiles::kRingBytes); }

  /* Scores of a warp's 16 keys, [16 rows, kScoreStride]: in a place of its own, or over the keys, which no other warp reads. */
  __device__ float *scores_of(int warp, T *keys) const {
    if constexpr (!Tiles::kIsWidened) return reinterpret_cast<float *>(keys + warp * 16 * kPadded);
    return reinterpret_cast<float *>(memory_ + Tiles::kRingBytes + Tiles::kWidenedBytes) + warp * 16 * kScoreStride;
  }

  /* Where chunk c, eight elements of T, of row r lies in a tile: exchanged so that eight rows of a column of chunks lie in different
   * banks. */
  __device__ static int offset(int row, int chunk) { return row * kPadded + (chunk ^ (row & 7)) * 8; }

  /* A thread copies the same column of each kRowsApart-th row of every tile. */
  static constexpr int kCopies = kPadded / Tiles::kEach, kRowsApart = kAttentionThreads / kCopies, kRows = kTile / kRowsApart;
  __device__ static int row_of(int i) { return threadIdx.x / kCopies + i * kRowsApart; }

  __device__ bool is_needed(int key) const { return key >= needed_.first && key < needed_.last; }

  /* Blocks of the thread's rows, asked for half a tile before stage needs them. */
  __device__ void find_blocks(int tile) {
    const int *const table = attention_.tables + unit_.sequence * attention_.tables_stride;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int key = (first_tile_ + tile) * kTile + row_of(i);
      blocks_[i] = is_needed(key) ? table[attention_.block_size.quotient(key)] : 0;
    }
  }

  __device__ void stage(int step) {
    if (step < 2 * num_tiles_) {
      const Heads<const Cached> &cache = step % 2 ? attention_.v_cache : attention_.k_cache;
      const int first_key = (first_tile_ + step / 2) * kTile, column = threadIdx.x % kCopies * Tiles::kEach;
      const Cached *const of_head = cache.at(0, unit_.head) + column;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = row_of(i), key = first_key + row;
        const bool exists = is_needed(key) && column < attention_.size;
        const Cached *const from = of_head + blocks_[i] * cache.strides[0] + attention_.block_size.rest(key) * cache.strides[2];
        stage_chunk(slot(step) + (Tiles::kIsWidened ? row * kPadded + column : offset(row, column / 8)), exists ? from : cache.data, column, exists);
      }
      if (step % 2) find_blocks(step / 2 + 1);
    }
    ptx::commit_copies(); /* of nothing beyond the last tile, so that a group is a step */
  }

  /* 16 bytes of a key, or zeros. */
  __device__ void stage_chunk(Cached *to, const Cached *from, int column, bool exists) const {
    if (attention_.is_aligned) {
      ptx::copy_async(ptx::shared_address(to), from, exists ? 16 : 0);
      return;
    }
    for (int i = 0; i < Tiles::kEach; ++i) to[i] = exists && column + i < attention_.size ? from[i] : from_float<Cached>(0.0f);
  }

  /* This step's tile once it is there for all threads; what they have read makes room for another. */
  __device__ T *await(int step) {
    ptx::wait_copies<Tiles::kAhead - 1>();
    __syncthreads();
    stage(step + Tiles::kAhead);
    if constexpr (Tiles::kIsWidened) {
      widen_tile(slot(step));
      __syncthreads();
      return widened();
    } else {
      return slot(step);
    }
  }

  /* All threads: the tile of fp8 as one of T. */
  __device__ void widen_tile(const Cached *from) const {
    constexpr int kChunks = kPadded / 8;
#pragma unroll 1 /* registers are few */
    for (int i = threadIdx.x; i < kTile * kChunks; i += kAttentionThreads) {
      const Pack<uint32_t, 2> bytes = *reinterpret_cast<const Pack<uint32_t, 2> *>(from + i * 8);
      Pack<uint32_t[2], 2> numbers;
      widen<T>(bytes.at[0], numbers.at[0]);
      widen<T>(bytes.at[1], numbers.at[1]);
      *reinterpret_cast<Pack<uint32_t[2], 2> *>(widened() + offset(i / kChunks, i % kChunks)) = numbers;
    }
  }

  /* ---- scores ---- */

  /* Scores of this warp's 16 keys, for all rows. */
  __device__ void score_keys(T *keys, int tile) const {
    float products[2][4] = {};
    const int own = warp_ * 16;
#pragma unroll
    for (int k = 0; k < kPadded / 16; ++k) {
      if (k * 16 >= attention_.size) break;
      uint32_t b[4];
      ptx::load_matrices<4>(b, ptx::shared_address(keys + offset(own + lane_ / 16 * 8 + lane_ % 8, 2 * k + lane_ / 8 % 2)));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
      ptx::multiply<T>(products[0], q_[k], left);
      ptx::multiply<T>(products[1], q_[k], right);
    }
    __syncwarp(); /* all lanes have read the keys */
    float *const scores = scores_of(warp_, keys);
    const int first_key = (first_tile_ + tile) * kTile + own;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i / 2, column = n * 8 + lane_ % 4 * 2 + i % 2, key = first_key + column;
        const bool counts = key >= seen_[r].first && key < seen_[r].last;
        const float score = counts ? attention_.score(products[n][i], head_[r], key - position_[r]) : -INFINITY;
        scores[(lane_ / 4 + 8 * r) * kScoreStride + column] = score;
      }
    }
  }

  /* ---- softmax and values ---- */

  /* Scores of all 64 keys of the lane's two rows, in the layout of products: eight of 8 keys. */
  __device__ void read_scores(T *keys, float (&scores)[8][4]) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float *const of_warp = scores_of(n / 2, keys);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = of_warp[(lane_ / 4 + i / 2 * 8) * kScoreStride + n % 2 * 8 + lane_ % 4 * 2 + i % 2];
      }
    }
  }

  /* state.values += weights * values, 16 keys at a time in ascending order. */
  __device__ void add_values(T *keys, const T *values, State &state) const {
    float scores[8][4];
    read_scores(keys, scores);
    float keep[2];
    state.weigh(scores, keep);
    state.scale(keep);
    const int own = warp_ * Tiles::kColumns / 8; /* first chunk of the warp's columns */
    if (own * 8 >= attention_.size) return;      /* the whole warp: these columns only fill D up */
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      const float(&low)[4] = scores[2 * k], (&high)[4] = scores[2 * k + 1];
      const uint32_t weights[4] = {pair_of<T>(low[0], low[1]), pair_of<T>(low[2], low[3]), pair_of<T>(high[0], high[1]),
                                   pair_of<T>(high[2], high[3])};
#pragma unroll
      for (int n = 0; n < kProducts; n += 2) {
        uint32_t b[4];
        ptx::load_matrices<4, true>(b, ptx::shared_address(values + offset(k * 16 + lane_ % 16, own + n + lane_ / 16)));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        ptx::multiply<T>(state.values[n], weights, left);
        ptx::multiply<T>(state.values[n + 1], weights, right);
      }
    }
  }

  const Attention<T, Cached> &attention_;
  const Piece &piece_;
  const Unit &unit_;
  char *const memory_;
  const int lane_, warp_;
  Range needed_, seen_[2] = {};
  int first_tile_, num_tiles_, position_[2] = {}, head_[2] = {}, blocks_[kRows];
  uint32_t q_[kPadded / 16][4];
};

/* ---- what is written ---- */

/* One float state of 16 rows for each piece that is not its unit's only split: sums, greatest scores, then values [16, kPadded]. */
template <int kPadded>
struct PieceStates {
  static constexpr int kFloats = kUnitRows * (kPadded + 2);
  float *data;
  __device__ float *sum(int piece, int row) const { return data + int64_t{piece} * kFloats + row; }
  __device__ float *max(int piece, int row) const { return sum(piece, row) + kUnitRows; }
  __device__ float *values(int piece, int row) const { return data + int64_t{piece} * kFloats + 2 * kUnitRows + row * kPadded; }
};

/* fn(row, column, value, r) for each of the lane's values of rows and columns that exist. kColumns: of D that a warp has. */
template <int kColumns, class State, class Function>
__device__ void for_values(const Question &attention, const Unit &unit, const State &state, Function fn) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = warp * kColumns + n * 8 + lane % 4 * 2 + i % 2;
      if (row < unit.rows && column < attention.size) fn(row, column, state.values[n][i], i / 2);
    }
  }
}

template <int kColumns, class T, class Cached, class State>
__device__ void write_out(const Attention<T, Cached> &attention, const Unit &unit, const State &state) {
  for_values<kColumns>(attention, unit, state, [&](int row, int column, float value, int r) {
    const int token = attention.starts[unit.sequence] + query_of(attention, unit, row);
    attention.out.at(token, head_of(attention, unit, row))[column] = from_float<T>(attention.result(value, state.sum[r]));
  });
}

template <int kColumns, int kPadded, class State>
__device__ void write_state(const Question &attention, const Unit &unit, const State &state, PieceStates<kPadded> states, int piece) {
  for_values<kColumns>(attention, unit, state, [&](int row, int column, float value, int) { states.values(piece, row)[column] = value; });
  if (threadIdx.x % 4 != 0 || threadIdx.x >= 32) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    *states.sum(piece, threadIdx.x / 4 + 8 * r) = state.sum[r];
    *states.max(piece, threadIdx.x / 4 + 8 * r) = state.max[r];
  }
}

/* ---- kernels ---- */

/* Blocks take pieces in turn, two on a multiprocessor. by_splits: the sequences with few rows; else the others. */
template <class T, class Cached, int kPadded>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attend_kernel(Attention<T, Cached> attention, PieceStates<kPadded> states, bool by_splits) {
  char *const memory = dynamic_shared<char>();
  const Schedule<> schedule(attention, by_splits);
  for (int index = blockIdx.x; index < schedule.num_pieces(); index += gridDim.x) {
    const Piece piece = schedule.piece(attention, index);
    const Range all = splits_of(attention, piece.unit.sequence);
    typename UnitAtWork<T, Cached, kPadded>::State state;
    UnitAtWork<T, Cached, kPadded>(attention, piece, memory).attend(state);
    if (by_splits && all.last - all.first > 1) write_state<kPadded / 4>(attention, piece.unit, state, states, index);
    else write_out<kPadded / 4>(attention, piece.unit, state);
  }
}

/* The sequence of a token: the last that begins at or before it. */
__device__ inline int sequence_of(const int *starts, int num_sequences, int token) {
  int b = 0;
  for (int step = kMaxSequences / 2; step > 0; step /= 2) {
    if (b + step < num_sequences && starts[b + step] <= token) b += step;
  }
  return b;
}

/* Of 32 splits, one a lane: factors of what was there before and of the split itself, which Merge would find one after the other. */
struct Factors {
  float keep, add, sum;

  /* max: the greatest score so far, of all lanes; -infinity: no key was seen */
  __device__ Factors(float part_max, float part_sum, float &max) : sum(part_sum) {
    const int lane = threadIdx.x % 32;
    float upto = part_sum == 0.0f ? -INFINITY : part_max;
    if (lane == 0) upto = fmaxf(upto, max);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, upto, lanes);
      if (lane >= lanes) upto = fmaxf(upto, other);
    }
    const float other = __shfl_up_sync(0xffffffffu, upto, 1), before = lane == 0 ? max : other;
    keep = before == -INFINITY ? 0.0f : exp2f(before - upto);
    add = part_sum == 0.0f ? 0.0f : exp2f(part_max - upto);
    max = __shfl_sync(0xffffffffu, upto, 31);
  }
};

/* A warp owns 32 columns of a row whose splits were pieces of their own, and merges them in ascending order, up to 32 on their way at
 * a time. */
template <class T, int kPadded>
__global__ void __launch_bounds__(kAttentionThreads) merge_kernel(Question attention, Heads<T> outs, PieceStates<kPadded> states) {
  using Starts = int[kMaxSequences];
  LMI_SHARED(Starts, starts);
  for (int b = threadIdx.x; b < attention.num_sequences; b += kAttentionThreads) starts[b] = attention.starts[b];
  const Schedule<> schedule(attention, true); /* meets all threads */
  constexpr int kParts = kPadded / 32, kAtOnce = 32;
  const int lane = threadIdx.x % 32, num_warps = gridDim.x * kAttentionThreads / 32, first_token = starts[0];
  const int num_rows = (attention.starts[attention.num_sequences] - first_token) * attention.num_heads;
  for (int i = blockIdx.x * kAttentionThreads / 32 + threadIdx.x / 32; i < num_rows * kParts; i += num_warps) {
    const int token = first_token + i / kParts / attention.num_heads, head = i / kParts % attention.num_heads, column = i % kParts * 32 + lane;
    const int b = sequence_of(starts, attention.num_sequences, token);
    const Range splits = splits_of(attention, b);
    if (!Schedule<>::is_cut_by_splits(attention, b) || splits.last - splits.first == 1) continue;
    const int row = (token - starts[b]) * attention.group.by + attention.group.rest(head);
    const int piece = schedule.index_of(attention, b, attention.group.quotient(head), row), apart = schedule.splits_apart(attention, b);
    float value = 0.0f, sum = 0.0f, max = -INFINITY;
    for (int first = 0; first < splits.last - splits.first; first += kAtOnce) {
      const int num = min(kAtOnce, splits.last - splits.first - first), from = piece + first * apart;
      float parts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        parts[j] = j < num && column < attention.size ? states.values(from + j * apart, row % kUnitRows)[column] : 0.0f;
      }
      const bool has_split = lane < num;
      const Factors factors(has_split ? *states.max(from + lane * apart, row % kUnitRows) : -INFINITY,
                            has_split ? *states.sum(from + lane * apart, row % kUnitRows) : 0.0f, max);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float keep = __shfl_sync(0xffffffffu, factors.keep, j), add = __shfl_sync(0xffffffffu, factors.add, j);
        const float part_sum = __shfl_sync(0xffffffffu, factors.sum, j);
        if (j >= num) continue;
        value = fmaf(keep, value, add * parts[j]);
        sum = fmaf(keep, sum, add * part_sum);
      }
    }
    if (column < attention.size) outs.at(token, head)[column] = from_float<T>(attention.result(value, sum));
  }
}

}  // namespace lmi::cuda
