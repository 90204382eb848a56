/* Rows of logits: what penalties, draws and log probabilities share. A block owns a row, which stays in the second-level cache. */
#pragma once
#include "cuda/memory.cuh"
#include "cuda/reduce.cuh"

namespace lmi {

constexpr unsigned kRowThreads = 1024;

/* V, which the kernels count in 32 bits. Throws LMI_BAD_ARGUMENT. */
inline int vocabulary_of(const lmi_tensor &logits) {
  check_range("V", logits.size[1], 1, INT32_MAX);
  return static_cast<int>(logits.size[1]);
}

/* A row, read kNum logits at once. */
template <int kNum>
struct LogitRow {
  float *logits;
  int num;

  /* fn(pack of logits, id of the first): a thread always gets the same ones, in ascending order. Several loads are on their way at a time. */
  template <class Function>
  __device__ __forceinline__ void for_packs(Function fn) const {
    constexpr int kAtOnce = kNum == 1 ? 8 : 4;
    constexpr unsigned kStep = kRowThreads * kNum;
    for (unsigned first = threadIdx.x * kNum; first < static_cast<unsigned>(num); first += kAtOnce * kStep) {
      Pack<float, kNum> packs[kAtOnce] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j * kStep < static_cast<unsigned>(num)) packs[j] = load_pack<kNum>(logits + first + j * kStep);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j * kStep < static_cast<unsigned>(num)) fn(packs[j], static_cast<int>(first + j * kStep));
      }
    }
  }

  /* fn(logit, id) */
  template <class Function>
  __device__ __forceinline__ void for_each(Function fn) const {
    for_packs([&](const Pack<float, kNum> &pack, int first) {
#pragma unroll
      for (int i = 0; i < kNum; ++i) fn(pack.at[i], first + i);
    });
  }
};

/* Bits that ascend as numbers do; -0 counts as 0. Not for NaN. */
__device__ __forceinline__ unsigned ascending_bits(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float of_ascending_bits(unsigned bits) { return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits); }

/* A logit and where it stands. */
struct Candidate {
  float logit;
  int id;
};

/* Ascends as candidates get better: the greater logit wins, of equals the lower id. */
__device__ __forceinline__ unsigned long long order_of(Candidate candidate) {
  return static_cast<unsigned long long>(ascending_bits(candidate.logit)) << 32 | ~static_cast<unsigned>(candidate.id);
}

/* The greatest logit and the lowest id that has it, a NaN if there is one among them; every thread of the block gets it. */
template <int kNum>
__device__ Candidate best_of_row(const LogitRow<kNum> &row) {
  Candidate mine{-INFINITY, row.num};
  int has_nan = 0;
  row.for_each([&](float logit, int id) {
    has_nan |= logit != logit;
    if (logit > mine.logit) mine = {logit, id};
  });
  const unsigned long long best = join_block(order_of(mine), [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
  if (sum_in_block(has_nan)) return {NAN, row.num};
  return {of_ascending_bits(static_cast<unsigned>(best >> 32)), static_cast<int>(~static_cast<unsigned>(best))};
}

__device__ __forceinline__ bool can_be_drawn(float max) { return max > -INFINITY; /* false for NaN */ }

/* ---- borders: what a sort would tell, found digit by digit ---- */

constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
static_assert(kDigits == 2 * kRowThreads, "a thread looks at two digits");

/* What the keys with each digit amount to, in 64 bits of two words: shared memory adds words at once. */
struct DigitSums {
  unsigned low[kDigits], high[kDigits];

  __device__ __forceinline__ void clear() {
    for (int digit = threadIdx.x; digit < kDigits; digit += kRowThreads) low[digit] = high[digit] = 0;
  }
  __device__ __forceinline__ void add(unsigned digit, unsigned long long amount) {
    const unsigned own = static_cast<unsigned>(amount), before = atomicAdd(&low[digit], own);
    const unsigned carried = static_cast<unsigned>(amount >> 32) + (before + own < before ? 1 : 0);
    if (carried) atomicAdd(&high[digit], carried);
  }
  __device__ __forceinline__ unsigned long long of(unsigned digit) const {
    return static_cast<unsigned long long>(high[digit]) << 32 | low[digit];
  }
};

/* Keys from first to last; what those below amount to. */
struct KeyRange {
  unsigned first, last;
  unsigned long long below;
};

/* The lowest key of the range whose digit is at least `digit`, one above the range if there is none. Digits do not descend. */
template <class Digit>
__device__ unsigned long long lowest_key(const KeyRange &range, Digit digit_of, unsigned digit) {
  unsigned long long low = range.first, high = static_cast<unsigned long long>(range.last) + 1;
  while (low < high) {
    const unsigned long long middle = (low + high) / 2;
    if (digit_of(static_cast<unsigned>(middle)) >= digit) high = middle;
    else low = middle + 1;
  }
  return low;
}

/* One digit more of a border, see below. True if the range's keys are all wanted. */
template <class Walk, class Digit, class Wanted>
__device__ bool narrow(KeyRange &range, DigitSums &sums, Walk walk, Digit digit_of, Wanted wanted_of) {
  struct Found {
    unsigned digit;
    unsigned long long below;
    bool is_reached;
  };
  LMI_SHARED(Found, found);
  sums.clear();
  __syncthreads();
  walk([&](unsigned key, unsigned long long amount) {
    if (key - range.first <= range.last - range.first) sums.add(digit_of(key), amount);
  });
  __syncthreads();
  const unsigned digit = 2 * threadIdx.x;
  const unsigned long long parts[2] = {sums.of(digit), sums.of(digit + 1)};
  const Prefix<unsigned long long> prefix = prefix_in_block(parts[0] + parts[1]);
  const unsigned long long wanted = wanted_of(prefix.total) - range.below;
  unsigned long long below = prefix.before;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (below < wanted && wanted <= below + parts[i]) found = {digit + i, range.below + below, wanted == below + parts[i]};
    below += parts[i];
  }
  __syncthreads();
  const KeyRange before = range;
  range.first = static_cast<unsigned>(lowest_key(before, digit_of, found.digit));
  range.last = static_cast<unsigned>(lowest_key(before, digit_of, found.digit + 1) - 1);
  range.below = found.below;
  return found.is_reached; /* which is written again behind the next digit's barriers */
}

/* Digits that cut a range into pieces of the same size. */
struct EvenDigits {
  unsigned first;
  int shift;

  __device__ __forceinline__ explicit EvenDigits(const KeyRange &range) : first(range.first) {
    const int bits = 32 - __clz(static_cast<int>(range.last - range.first));
    shift = bits > kDigitBits ? bits - kDigitBits : 0;
  }
  __device__ __forceinline__ unsigned operator()(unsigned key) const { return (key - first) >> shift; }
};

/* Where amounts, added in ascending order of keys, reach `wanted`: either all keys of the range that comes out are wanted, or it is one key,
 * of which some are. walk(visit): visit(key, amount) for each that counts, by all threads of the block together; keys lie in `range`, and
 * `wanted` counts what is below it, too. wanted_of(sum of all): above `below`, at most that with it. coarse: the first digit of a key,
 * below kDigits, which ascends as keys do and tells most of them apart. Sums are of integers, so that they do not depend on the order in
 * which threads add. */
template <class Walk, class Coarse, class Wanted>
__device__ KeyRange find_border(KeyRange range, DigitSums &sums, Walk walk, Coarse coarse, Wanted wanted_of) {
  unsigned long long wanted = 0;
  bool is_reached = narrow(range, sums, walk, coarse, [&](unsigned long long total) { return wanted = wanted_of(total); });
  while (!is_reached && range.first != range.last) {
    is_reached = narrow(range, sums, walk, EvenDigits(range), [=](unsigned long long) { return wanted; });
  }
  return range;
}

/* Digit of a distance, which is not negative. */
__device__ __forceinline__ unsigned digit_of_distance(float distance) {
  return static_cast<unsigned>(fminf(distance * 64.0f, static_cast<float>(kDigits - 1)));
}

}  // namespace lmi
