/* The choice of a token. A block owns a row and sorts nothing: top-k, top-p and typical-p are borders among keys (logits.cuh), and what is
 * left out is not removed but known by them (Left). A greedy row is read once, another twice more and two or three times for each filter.
 * Sums of weights are integers (weights times 2^40), so that they do not depend on the order in which threads add. A row that cannot be
 * drawn from gets the id -1. Bound by the second-level cache, where the row stays. */
#include "cuda/logits.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

constexpr float kUnit = 0x1p40f; /* 2^40 times 2^23 tokens stays below 2^64 */

struct Choice {
  Rows<float> logits;
  const float *temperature, *top_p, *typical_p, *min_p;
  const int *top_k, *positions;
  const unsigned long long *seeds;
  int *ids;
  int vocabulary;
};

/* ---- what is left to draw from ---- */

/* Tokens with these logits (relative to the greatest, divided by the temperature) whose keys are within the borders. */
template <int kNum>
struct Left {
  LogitRow<kNum> row;
  float least_logit = -INFINITY; /* top-k and top-p */
  double mean = 0.0;             /* typical-p: those with |mean - logit| small */
  float farthest = INFINITY;
  float least_weight = 0.0f; /* min-p */

  __device__ __forceinline__ float far_from_mean(float logit) const { return static_cast<float>(fabs(mean - static_cast<double>(logit))); }
  __device__ __forceinline__ bool has(float logit) const {
    return logit >= least_logit && (farthest == INFINITY || far_from_mean(logit) <= farthest) &&
           (least_weight == 0.0f || expf(logit) >= least_weight);
  }

  /* fn(logit, id) */
  template <class Function>
  __device__ __forceinline__ void for_each(Function fn) const {
    row.for_each([&](float logit, int id) {
      if (has(logit)) fn(logit, id);
    });
  }
};

/* Bits that ascend as non-negative floats do, up to infinity. */
__device__ __forceinline__ unsigned key_of(float distance) { return __float_as_uint(distance) & 0x7fffffffu; }
constexpr unsigned kInfinity = 0x7f800000u;

/* The smallest distance within which amounts reach `wanted`; distance(logit) is not negative. */
template <int kNum, class Distance, class Amount, class Wanted>
__device__ float find_distance(const Left<kNum> &left, DigitSums &sums, Distance distance, Amount amount, Wanted wanted_of) {
  const auto walk = [&](auto visit) { left.for_each([&](float logit, int) { visit(key_of(distance(logit)), amount(logit)); }); };
  const auto coarse = [](unsigned key) { return digit_of_distance(__uint_as_float(key)); };
  return __uint_as_float(find_border({0, kInfinity, 0}, sums, walk, coarse, wanted_of).last);
}

/* At least one unit, so that a token without weight in this grid is still found. */
__device__ __forceinline__ unsigned long long units_of(float logit) { return static_cast<unsigned long long>(expf(logit) * kUnit) + 1; }

/* The sum that a share of all is; at least one unit. */
__device__ __forceinline__ unsigned long long share_of(unsigned long long total, float share) {
  const double units = ceil(static_cast<double>(share) * static_cast<double>(total));
  return units < 1.0 ? 1 : min(static_cast<unsigned long long>(units), total);
}

template <int kNum>
__device__ void keep_top_k(Left<kNum> &left, DigitSums &sums, int top_k) {
  if (top_k <= 0 || top_k >= left.row.num) return;
  left.least_logit = -find_distance(
      left, sums, [](float logit) { return -logit; }, [](float) { return 1ull; },
      [=](unsigned long long) { return static_cast<unsigned long long>(top_k); });
}

template <int kNum>
__device__ void keep_top_p(Left<kNum> &left, DigitSums &sums, float top_p) {
  if (!(top_p < 1.0f)) return;
  left.least_logit = -find_distance(
      left, sums, [](float logit) { return -logit; }, units_of, [=](unsigned long long total) { return share_of(total, top_p); });
}

/* With p = w / W: entropy = log W - sum(w l) / W, so that -log p - entropy = sum(w l) / W - l. */
template <int kNum>
__device__ void keep_typical(Left<kNum> &left, DigitSums &sums, float typical_p) {
  if (!(typical_p < 1.0f)) return;
  double total = 0.0, products = 0.0;
  left.for_each([&](float logit, int) {
    const float weight = expf(logit);
    total += static_cast<double>(weight);
    products += static_cast<double>(weight > 0.0f ? weight * logit : 0.0f);
  });
  total = sum_in_block(total);
  left.mean = sum_in_block(products) / total;
  const Left<kNum> all = left;
  left.farthest = find_distance(
      all, sums, [&](float logit) { return all.far_from_mean(logit); }, units_of,
      [=](unsigned long long sum) { return share_of(sum, typical_p); });
}

/* The greatest logit, 0, is left by all but typical-p. */
template <int kNum>
__device__ void keep_min_p(Left<kNum> &left, float min_p) {
  if (!(min_p > 0.0f)) return;
  float greatest = left.farthest == INFINITY ? 0.0f : -INFINITY;
  if (left.farthest != INFINITY) left.for_each([&](float logit, int) { greatest = fmaxf(greatest, logit); });
  left.least_weight = min_p * expf(join_block(greatest, [](float a, float b) { return fmaxf(a, b); }));
}

/* ---- the draw ---- */

/* Word 0 of Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counter (id, position, 0, 0). */
__device__ uint32_t philox(unsigned long long seed, uint32_t position, uint32_t id) {
  uint32_t c0 = id, c1 = position, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t high_a = __umulhi(0xD2511F53u, c0), low_a = 0xD2511F53u * c0;
    const uint32_t high_b = __umulhi(0xCD9E8D57u, c2), low_b = 0xCD9E8D57u * c2;
    c0 = high_b ^ c1 ^ k0;
    c1 = low_b;
    c2 = high_a ^ c3 ^ k1;
    c3 = low_a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

__device__ double gumbel(uint32_t word) { return -log(-log((static_cast<double>(word) + 0.5) * 0x1p-32)); }

/* The best of l + gumbel; equal ones go to the lower id. */
struct Draw {
  double score;
  int id;
};

__device__ __forceinline__ Draw better(Draw a, Draw b) { return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a; }

__device__ Draw draw_in_block(Draw mine) {
  struct Parts {
    Draw of_warp[kRowThreads / 32];
  };
  LMI_SHARED(Parts, parts);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    mine = better(mine, {__shfl_xor_sync(0xffffffffu, mine.score, lanes), __shfl_xor_sync(0xffffffffu, mine.id, lanes)});
  }
  if (threadIdx.x % 32 == 0) parts.of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  Draw best = parts.of_warp[0];
  for (unsigned i = 1; i < kRowThreads / 32; ++i) best = better(best, parts.of_warp[i]);
  return best;
}

/* l + gumbel(u) > s needs 1 - u < 1 - exp(-e^(l-s)) <= e^l * e^-s: a product instead of two logarithms leaves out most. */
template <int kNum>
__device__ int draw_token(const Left<kNum> &left, unsigned long long seed, uint32_t position) {
  Draw best{-INFINITY, left.row.num};
  float reach = INFINITY; /* e^-s, a bit more for what is rounded */
  left.for_each([&](float logit, int id) {
    const uint32_t word = philox(seed, position, static_cast<uint32_t>(id));
    const float tail = static_cast<float>(static_cast<int32_t>(~word >> 1)) * 0x1p-31f; /* at most 1 - u */
    const bool is_first = best.id == left.row.num;
    if (!is_first && tail > expf(logit) * reach) return;
    best = better(best, {static_cast<double>(logit) + gumbel(word), id});
    reach = static_cast<float>(exp(-best.score) * 1.001);
  });
  return draw_in_block(best).id;
}

template <int kNum>
__global__ void __launch_bounds__(kRowThreads) sample_kernel(Choice choice) {
  LMI_SHARED(DigitSums, sums);
  const int64_t index = blockIdx.x;
  const LogitRow<kNum> row{choice.logits.row(index), choice.vocabulary};
  const float temperature = choice.temperature[index];
  const Candidate first = best_of_row(row);
  int id = can_be_drawn(first.logit) ? first.id : -1;
  if (id >= 0 && temperature != 0.0f) {
    row.for_packs([&](Pack<float, kNum> pack, int place) {
#pragma unroll
      for (int i = 0; i < kNum; ++i) pack.at[i] = pack.at[i] == first.logit ? 0.0f : (pack.at[i] - first.logit) / temperature;
      store_pack<kNum>(row.logits + place, pack);
    }); /* no barrier: a thread reads the same places throughout */
    Left<kNum> left{row};
    keep_top_k(left, sums, choice.top_k[index]);
    keep_top_p(left, sums, choice.top_p[index]);
    keep_typical(left, sums, choice.typical_p[index]);
    keep_min_p(left, choice.min_p[index]);
    id = draw_token(left, choice.seeds[index], static_cast<uint32_t>(choice.positions[index]));
  }
  if (threadIdx.x == 0) choice.ids[index] = id;
}

}  // namespace

void sample(const lmi_sample_args &args, cudaStream_t stream) {
  check_arguments(args);
  const Choice choice{args.logits,
                      vector_of<float>(args.temperature),
                      vector_of<float>(args.top_p),
                      vector_of<float>(args.typical_p),
                      vector_of<float>(args.min_p),
                      vector_of<int>(args.top_k),
                      vector_of<int>(args.positions),
                      vector_of<unsigned long long>(args.seeds),
                      vector_of<int>(args.ids),
                      vocabulary_of(args.logits)};
  with_width<float>(is_wide({&args.logits}), [&](auto num) {
    launch("sample", sample_kernel<num>, {static_cast<unsigned>(args.logits.size[0]), kRowThreads}, stream, choice);
  });
}

}  // namespace lmi::cuda
