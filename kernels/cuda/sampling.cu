/* The choice of a token. A block owns a row and sorts nothing: the borders of top-k, top-p and typical-p are found digit by digit
 * in the keys' bits, from sums of weights per digit in shared memory. The sums are integers (weights times 2^40), so that they do
 * not depend on the order in which threads add. Most of a row's keys begin alike, and atomics on one place wait for each other: what
 * a warp has for one digit is summed before it is added. What is left out is not removed but known by its borders (Left). A row that
 * cannot be drawn from gets the id -1. Bound by the second-level cache, where the row stays: about four readings a filter. */
#include "cuda/logits.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits; /* one a thread */
static_assert(kDigits == kRowThreads, "a thread sums one digit");
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
struct Left {
  const float *logits;
  int num;
  float least_logit = -INFINITY; /* top-k and top-p */
  double mean = 0.0;             /* typical-p: those with |mean - logit| small */
  float farthest = INFINITY;
  float least_weight = 0.0f;     /* min-p */

  __device__ float far_from_mean(float logit) const { return static_cast<float>(fabs(mean - static_cast<double>(logit))); }
  __device__ bool has(float logit) const {
    return logit >= least_logit && far_from_mean(logit) <= farthest && expf(logit) >= least_weight;
  }
};

/* Bits that ascend as non-negative floats do, infinity included. */
__device__ __forceinline__ unsigned key_of(float size) { return __float_as_uint(size) & 0x7fffffffu; }

constexpr int kDigitsOfWarp = 32, kWarps = kDigits / kDigitsOfWarp;

struct Sums {
  unsigned long long of_digit[kDigits], of_warp[kWarps]; /* the latter of 32 digits each */
};

/* Which of the sums, added in ascending order to `below`, first reaches `wanted`; the last that is not 0 if none does. below becomes
 * what was added before it. */
__device__ int first_to_reach(const unsigned long long *sums, int num, unsigned long long &below, unsigned long long wanted) {
  int last = 0;
  unsigned long long sum = below, before_last = below;
  for (int i = 0; i < num; ++i) {
    if (sums[i] == 0) continue;
    last = i;
    before_last = sum;
    sum += sums[i];
    if (sum >= wanted) break;
  }
  below = before_last;
  return last;
}

/* The digit that reaches it. */
__device__ int find_digit(Sums &sums, unsigned long long &below, unsigned long long wanted) {
  const auto add = [](unsigned long long a, unsigned long long b) { return a + b; };
  const unsigned long long of_warp = join_warp(sums.of_digit[threadIdx.x], add);
  if (threadIdx.x % 32 == 0) sums.of_warp[threadIdx.x / 32] = of_warp;
  __syncthreads();
  const int warp = first_to_reach(sums.of_warp, kWarps, below, wanted);
  return warp * kDigitsOfWarp + first_to_reach(sums.of_digit + warp * kDigitsOfWarp, kDigitsOfWarp, below, wanted);
}

/* sums[digit] += amount in each lane that is_in; all lanes of the warp must call. */
__device__ void add_together(unsigned long long *sums, bool is_in, unsigned digit, unsigned long long amount) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kFew = 4; /* so many atomics on one place cost less than a sum over the warp */
  for (unsigned left = __ballot_sync(kAll, is_in); left != 0;) {
    const unsigned of_first = __shfl_sync(kAll, digit, __ffs(static_cast<int>(left)) - 1);
    const bool is_alike = is_in && digit == of_first;
    const unsigned alike = __ballot_sync(kAll, is_alike);
    if (__popc(alike) < kFew) break;
    const auto add = [](unsigned long long a, unsigned long long b) { return a + b; };
    const unsigned long long sum = join_warp(is_alike ? amount : 0ull, add);
    if (threadIdx.x % 32 == 0) atomicAdd(&sums[of_first], sum);
    is_in = is_in && !is_alike;
    left &= ~alike;
  }
  if (is_in) atomicAdd(&sums[digit], amount);
}

/* The smallest key at which amounts, added in ascending order of keys, reach `wanted`; the greatest key with an amount if they do
 * not. */
template <class Key, class Amount>
__device__ unsigned border(const Left &left, unsigned long long wanted, Key key, Amount amount) {
  LMI_SHARED(Sums, sums);
  unsigned prefix = 0;
  unsigned long long below = 0;
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    sums.of_digit[threadIdx.x] = 0;
    __syncthreads();
    for_places(left.logits, left.num, [&](float logit, int, bool is_there) {
      const unsigned own = key(logit);
      const bool is_inside = shift + kDigitBits == 32 || own >> (shift + kDigitBits) == prefix;
      const bool is_in = is_there && is_inside && left.has(logit);
      add_together(sums.of_digit, is_in, own >> shift & (kDigits - 1), is_in ? amount(logit) : 0ull);
    });
    __syncthreads();
    prefix = prefix << kDigitBits | static_cast<unsigned>(find_digit(sums, below, wanted));
    __syncthreads(); /* sums are cleared for the next digit */
  }
  return prefix;
}

/* At least one unit, so that a token without weight in this grid is still found. */
__device__ __forceinline__ unsigned long long units_of(float logit) {
  return static_cast<unsigned long long>(static_cast<double>(expf(logit)) * static_cast<double>(kUnit)) + 1;
}

template <class Term>
__device__ double sum_left(const Left &left, Term term) {
  double sum = 0.0;
  for_logits(left.logits, left.num, [&](float logit, int) {
    if (left.has(logit)) sum += static_cast<double>(term(logit));
  });
  return sum_in_block(sum);
}

__device__ unsigned long long sum_units(const Left &left) {
  unsigned long long sum = 0;
  for_logits(left.logits, left.num, [&](float logit, int) { sum += left.has(logit) ? units_of(logit) : 0; });
  return sum_in_block(sum);
}

/* The sum that a share of all is; at least one unit. */
__device__ unsigned long long share_of(unsigned long long total, float share) {
  const double units = ceil(static_cast<double>(share) * static_cast<double>(total));
  return units < 1.0 ? 1 : static_cast<unsigned long long>(units);
}

__device__ void keep_top_k(Left &left, int top_k) {
  if (top_k <= 0 || top_k >= left.num) return;
  const unsigned last = border(left, static_cast<unsigned long long>(top_k), [](float logit) { return key_of(-logit); },
                               [](float) { return 1ull; });
  left.least_logit = -__uint_as_float(last);
}

__device__ void keep_top_p(Left &left, float top_p) {
  if (!(top_p < 1.0f)) return;
  const unsigned long long wanted = share_of(sum_units(left), top_p);
  left.least_logit = -__uint_as_float(border(left, wanted, [](float logit) { return key_of(-logit); }, units_of));
}

/* With p = w / W: entropy = log W - sum(w l) / W, so that -log p - entropy = sum(w l) / W - l. */
__device__ void keep_typical(Left &left, float typical_p) {
  if (!(typical_p < 1.0f)) return;
  const double total = sum_left(left, [](float logit) { return expf(logit); });
  const double products = sum_left(left, [](float logit) { return expf(logit) > 0.0f ? expf(logit) * logit : 0.0f; });
  const unsigned long long wanted = share_of(sum_units(left), typical_p);
  left.mean = products / total;
  const Left all = left;
  left.farthest = __uint_as_float(border(left, wanted, [=](float logit) { return key_of(all.far_from_mean(logit)); }, units_of));
}

__device__ void keep_min_p(Left &left, float min_p) {
  if (!(min_p > 0.0f)) return;
  float greatest = 0.0f;
  for_logits(left.logits, left.num, [&](float logit, int) {
    if (left.has(logit)) greatest = fmaxf(greatest, expf(logit));
  });
  left.least_weight = min_p * join_block(greatest, [](float a, float b) { return fmaxf(a, b); });
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
__device__ int draw_token(const Left &left, unsigned long long seed, uint32_t position) {
  Draw best{-INFINITY, left.num};
  float reach = INFINITY; /* e^-s, a bit more for what is rounded */
  for_logits(left.logits, left.num, [&](float logit, int id) {
    if (!left.has(logit)) return;
    const uint32_t word = philox(seed, position, static_cast<uint32_t>(id));
    const float tail = static_cast<float>(static_cast<int32_t>(~word >> 1)) * 0x1p-31f; /* at most 1 - u */
    const bool is_first = best.id == left.num;
    if (!is_first && tail > expf(logit) * reach) return;
    best = better(best, {static_cast<double>(logit) + gumbel(word), id});
    reach = static_cast<float>(exp(-best.score) * 1.001);
  });
  return draw_in_block(best).id;
}

__global__ void __launch_bounds__(kRowThreads, 2) sample_kernel(Choice choice) {
  const int64_t row = blockIdx.x;
  float *const logits = choice.logits.row(row);
  const float temperature = choice.temperature[row];
  const Candidate first = best_of_row(logits, choice.vocabulary);
  int id = can_be_drawn(first.logit) ? first.id : -1;
  if (id >= 0 && temperature != 0.0f) {
    for_logits(logits, choice.vocabulary, [&](float logit, int i) {
      logits[i] = logit == first.logit ? 0.0f : (logit - first.logit) / temperature;
    }); /* no barrier: a thread reads the same places throughout */
    Left left{logits, choice.vocabulary};
    keep_top_k(left, choice.top_k[row]);
    keep_top_p(left, choice.top_p[row]);
    keep_typical(left, choice.typical_p[row]);
    keep_min_p(left, choice.min_p[row]);
    id = draw_token(left, choice.seeds[row], static_cast<uint32_t>(choice.positions[row]));
  }
  if (threadIdx.x == 0) choice.ids[row] = id;
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
  launch("sample", sample_kernel, {static_cast<unsigned>(args.logits.size[0]), kRowThreads}, stream, choice);
}

}  // namespace lmi::cuda
