/* What is asked of attention, as kernels see it: who sees which keys, how a product becomes a score, and how the work is cut.
 *
 * A unit is up to 16 rows (a row is one query in one head) of one sequence and key head. Keys are cut at multiples of 64 (tiles)
 * and 512 (splits, each a softmax of its own, merged in ascending order), whatever the batch, so that a row's bits depend on its
 * query and keys alone. In a sequence with few rows each split of a unit is a piece of work, so that one long sequence among short
 * ones is shared by many blocks; in one with many rows (a prompt) a unit with all its splits is. */
#pragma once
#include "cuda/memory.cuh"

namespace lmi::cuda {

constexpr int kTile = 64, kSplit = 512, kUnitRows = 16;
constexpr int kFewRows = 64;       /* a sequence with at most so many rows a key head is cut by splits */
constexpr int kMaxSequences = 512; /* of a launch: their counts lie in shared memory */
constexpr unsigned kAttentionThreads = 128;
constexpr float kLog2e = 1.44269504f;

struct Range {
  int first, last;
  __device__ __forceinline__ bool is_empty() const { return first >= last; }
};

__device__ __forceinline__ Range common(Range a, Range b) { return {max(a.first, b.first), min(a.last, b.last)}; }

/* [rows, heads, D] of queries or results, or a cache [N, K, P, D]. */
template <class T>
struct Heads {
  T *data;
  int64_t strides[3];
  Heads(const lmi_tensor &x) : data(static_cast<T *>(x.data)), strides{x.stride[0], x.stride[1], x.stride[2]} {}
  __device__ __forceinline__ T *at(int64_t i, int64_t j, int64_t k = 0) const {
    return data + i * strides[0] + j * strides[1] + k * strides[2];
  }
};

/* Division of numbers from 0 to 2^31 - 1 by one that the host knows: a product and a shift, exact for all of them. */
struct Divisor {
  int by;
  uint32_t factor, shift;

  Divisor(int64_t number) : by(static_cast<int>(number)), shift(31) {
    while (int64_t{1} << (shift - 31) < number) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + static_cast<uint64_t>(number) - 1) / static_cast<uint64_t>(number));
  }
  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * factor >> shift);
  }
  __device__ __forceinline__ int rest(int n) const { return n - quotient(n) * by; }
};

/* What is asked but for the tensors of floats: the same for every dtype. */
struct Question {
  const int *starts, *key_lengths, *tables;
  const float *alibi, *bias; /* bias: [H, 2 max_distance + 1], by key minus query position */
  int64_t tables_stride;
  int num_sequences, num_heads, num_kv_heads;
  Divisor group, block_size;
  int size, window, max_distance;
  float scale, v_scale, soft_cap; /* of products, of what the values come to */
  bool is_causal, is_aligned;     /* is_aligned: rows of the caches lie on 16 bytes */

  __device__ int num_queries(int b) const { return starts[b + 1] - starts[b]; }
  __device__ int position(int b, int query) const { return key_lengths[b] - num_queries(b) + query; }

  /* Keys that a query sees, of num_keys. */
  __device__ Range seen(int b, int query) const { return seen_from(position(b, query), key_lengths[b]); }
  __device__ __forceinline__ Range seen_from(int position, int num_keys) const {
    return {window ? max(0, position - window + 1) : 0, is_causal ? position + 1 : num_keys};
  }

  /* Whether a score is but a scaled product; in powers of two. */
  __device__ __forceinline__ bool has_plain_scores() const { return !(soft_cap > 0.0f) && !alibi && !bias; }
  __device__ __forceinline__ float plain_score(float product) const { return product * (scale * kLog2e); }

  /* From a product of q and k to a score otherwise: scale, soft cap, biases. distance: key minus query position. */
  __device__ float mixed_score(float product, int head, int distance) const {
    float s = product * scale;
    if (soft_cap > 0.0f) s = soft_cap * tanhf(s / soft_cap);
    if (alibi) s += alibi[head] * static_cast<float>(distance);
    if (bias) s += bias[int64_t{head} * (2 * max_distance + 1) + max_distance + max(-max_distance, min(distance, max_distance))];
    return s * kLog2e;
  }

  __device__ float score(float product, int head, int distance) const {
    return has_plain_scores() ? plain_score(product) : mixed_score(product, head, distance);
  }

  /* What stands in a row of the result: the weighted sum of values by the sum of weights; without keys 0. */
  __device__ __forceinline__ float result(float value, float sum) const { return sum == 0.0f ? 0.0f : value / sum * v_scale; }
};

/* Cached: what the caches hold, T itself or e4m3. */
template <class T, class Cached = T>
struct Attention : Question {
  Heads<T> out;
  Heads<const T> q;
  Heads<const Cached> k_cache, v_cache;

  /* Where key j of sequence b lies in a cache. */
  __device__ const Cached *cached(const Heads<const Cached> &cache, int b, int head, int j) const {
    return cache.at(tables[b * tables_stride + block_size.quotient(j)], head, block_size.rest(j));
  }
};

/* Rows first .. first + rows - 1 of a sequence and key head; row r is query r / group in head r % group of the key head's group. */
struct Unit {
  int sequence, head, first, rows;
};

/* A unit against splits [first, last). */
struct Piece {
  Unit unit;
  Range splits;
};

__device__ inline int query_of(const Question &attention, const Unit &unit, int row) {
  return attention.group.quotient(unit.first + row);
}

__device__ inline int head_of(const Question &attention, const Unit &unit, int row) {
  return unit.head * attention.group.by + attention.group.rest(unit.first + row);
}

/* Keys that any row of the unit sees: both ends grow with the query. */
__device__ inline Range seen_by_unit(const Question &attention, const Unit &unit) {
  const Range first = attention.seen(unit.sequence, query_of(attention, unit, 0));
  const Range last = attention.seen(unit.sequence, query_of(attention, unit, unit.rows - 1));
  return {first.first, max(first.first, last.last)};
}

/* Splits that any row of the sequence needs; at least one. */
__device__ inline Range splits_of(const Question &attention, int b) {
  const int first = attention.seen(b, 0).first / kSplit, last = attention.seen(b, attention.num_queries(b) - 1).last;
  return {first, max(first + 1, (last + kSplit - 1) / kSplit)};
}

/* Keys that a piece needs, and the tiles that have them. */
struct UnitTiles {
  Range needed;
  int first, num;

  __device__ UnitTiles(const Question &attention, const Piece &piece)
      : needed(common(seen_by_unit(attention, piece.unit), {piece.splits.first * kSplit, piece.splits.last * kSplit})) {
    first = needed.first / kTile;
    num = needed.is_empty() ? 0 : (needed.last + kTile - 1) / kTile - first;
  }
};

/* ---- the list of pieces ---- */

/* How a launch's sequences are cut: those with few rows by splits, or the others by units of kRows rows. Prefix sums over the
 * sequences lie in shared memory; every thread of the block must build it. */
template <int kRows = kUnitRows, unsigned kThreads = kAttentionThreads>
class Schedule {
 public:
  __device__ static int num_rows(const Question &attention, int b) {
    return attention.num_queries(b) * attention.group.by;
  }

  __device__ static bool is_cut_by_splits(const Question &attention, int b) {
    return num_rows(attention, b) <= kFewRows;
  }

  __device__ Schedule(const Question &attention, bool by_splits) : by_splits_(by_splits) {
    using Firsts = int[kMaxSequences + 1];
    LMI_SHARED(Firsts, firsts);
    firsts_ = firsts;
    constexpr int kEach = (kMaxSequences + static_cast<int>(kThreads) - 1) / static_cast<int>(kThreads);
    int counts[kEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int b = threadIdx.x * kEach + i;
      counts[i] = b < attention.num_sequences ? num_pieces(attention, b) : 0;
      sum += counts[i];
    }
    int first = sum_before(sum);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (threadIdx.x * kEach + i < kMaxSequences) firsts[threadIdx.x * kEach + i] = first;
      first += counts[i];
    }
    if (threadIdx.x == kThreads - 1) firsts[kMaxSequences] = first;
    __syncthreads();
    num_sequences_ = attention.num_sequences;
  }

  __device__ int num_pieces() const { return firsts_[kMaxSequences]; }

  __device__ Piece piece(const Question &attention, int index) const {
    int b = 0; /* the last sequence that begins at or before index */
    for (int step = kMaxSequences / 2; step > 0; step /= 2) {
      if (b + step < num_sequences_ && firsts_[b + step] <= index) b += step;
    }
    const int units = num_units(attention, b), own = index - firsts_[b], rest = own / units;
    const int first = own % units * kRows;
    const Unit unit{b, rest % attention.num_kv_heads, first, min(kRows, num_rows(attention, b) - first)};
    const Range all = splits_of(attention, b);
    if (!by_splits_) return {unit, all};
    const int split = all.first + rest / attention.num_kv_heads;
    return {unit, {split, split + 1}};
  }

  /* Index of the piece with this row of a sequence that is cut by splits; the next split's stands `splits_apart` further. */
  __device__ int index_of(const Question &attention, int b, int head, int row) const {
    return firsts_[b] + head * num_units(attention, b) + row / kRows;
  }
  __device__ int splits_apart(const Question &attention, int b) const {
    return attention.num_kv_heads * num_units(attention, b);
  }

 private:
  __device__ static int num_units(const Question &attention, int b) {
    return (num_rows(attention, b) + kRows - 1) / kRows;
  }

  __device__ int num_pieces(const Question &attention, int b) const {
    const int units = num_units(attention, b) * attention.num_kv_heads;
    if (units == 0 || is_cut_by_splits(attention, b) != by_splits_) return 0;
    const Range splits = splits_of(attention, b);
    return by_splits_ ? units * (splits.last - splits.first) : units;
  }

  /* Sum of the values of lower threads. */
  __device__ static int sum_before(int value) {
    using Sums = int[kThreads / 32];
    LMI_SHARED(Sums, sums);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int upto = value;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, upto, lanes);
      if (lane >= lanes) upto += other;
    }
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    int before = upto - value;
    for (int i = 0; i < warp; ++i) before += sums[i];
    return before;
  }

  const int *firsts_;
  int num_sequences_;
  bool by_splits_;
};

/* ---- two softmaxes become one ---- */

/* Factors of what was there and of what comes: weights are powers of two relative to each side's greatest score. A sum of 0 says
 * that no key was seen. */
struct Merge {
  float keep, add, max;
  __device__ Merge(float max_before, float sum_before, float max_part, float sum_part) {
    max = sum_before == 0.0f ? max_part : sum_part == 0.0f ? max_before : fmaxf(max_before, max_part);
    keep = sum_before == 0.0f ? 0.0f : exp2f(max_before - max);
    add = sum_part == 0.0f ? 0.0f : exp2f(max_part - max);
  }
  /* one order of roundings wherever it stands */
  __device__ __forceinline__ float operator()(float before, float part) const { return fmaf(keep, before, add * part); }
};

}  // namespace lmi::cuda
