/* Mixture of experts: which experts a token goes to, its rows ordered by expert, and the weighted sum of what they gave. All are
 * small or bound by memory. */
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"
#include "cuda/reduce.cuh"

namespace lmi::cuda {
namespace {

constexpr unsigned kOrderThreads = 256, kMaxThreads = 256;
constexpr int64_t kMaxExperts = 8192; /* logits of a token, in shared memory */

/* ---- routing: a warp owns a token ---- */

struct Best {
  float logit;
  int expert;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  return b.logit > a.logit || (b.logit == a.logit && b.expert < a.expert) ? b : a;
}

__device__ Best join_best(Best mine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    mine = better(mine, {__shfl_xor_sync(0xffffffffu, mine.logit, lanes), __shfl_xor_sync(0xffffffffu, mine.expert, lanes)});
  }
  return mine;
}

template <class T>
__global__ void route_kernel(Rows<const T> logits, Rows<float> weights, Rows<int> experts, int num_experts, int top_k, bool renormalize) {
  float *const left = dynamic_shared<float>(); /* logits; -infinity once taken */
  const int lane = threadIdx.x;
  const int64_t token = blockIdx.x;
  float largest = -INFINITY, sum = 0.0f, kept = 0.0f;
  for (int x = lane; x < num_experts; x += 32) {
    left[x] = to_float(logits.row(token)[x]);
    largest = fmaxf(largest, left[x]);
  }
  largest = join_warp(largest, [](float a, float b) { return fmaxf(a, b); });
  for (int x = lane; x < num_experts; x += 32) sum += expf(left[x] - largest);
  sum = join_warp(sum, [](float a, float b) { return a + b; });
  for (int j = 0; j < top_k; ++j) {
    Best best{-INFINITY, num_experts};
    for (int x = lane; x < num_experts; x += 32) {
      if (left[x] == left[x]) best = better(best, {left[x], x}); /* NaN: taken */
    }
    best = join_best(best);
    const float weight = expf(best.logit - largest) / sum;
    kept += weight;
    if (best.expert % 32 == lane) left[best.expert] = NAN;
    if (lane == 0) experts.row(token)[j] = best.expert;
    if (lane == 0) weights.row(token)[j] = weight;
  }
  __syncwarp();
  for (int j = lane; renormalize && j < top_k; j += 32) weights.row(token)[j] /= kept;
}

/* ---- order: a block owns an expert and finds its pairs, in their order ---- */

__device__ __forceinline__ int expert_of(const Rows<const int> &experts, int pair, int top_k) {
  return experts.row(pair / top_k)[pair % top_k];
}

/* Number of flags in lower threads of the block, and in all of it. */
struct Count {
  int before, total;
};

__device__ Count count_flags(bool flag) {
  using Parts = int[kOrderThreads / 32];
  LMI_SHARED(Parts, parts);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned flags = __ballot_sync(0xffffffffu, flag);
  if (lane == 0) parts[warp] = __popc(flags);
  __syncthreads();
  Count count{__popc(flags & ((1u << lane) - 1)), 0};
  for (int i = 0; i < static_cast<int>(kOrderThreads / 32); ++i) {
    count.before += i < warp ? parts[i] : 0;
    count.total += parts[i];
  }
  __syncthreads(); /* parts may be used again */
  return count;
}

__global__ void order_kernel(Rows<const int> experts, int *order, int *starts, int num_pairs, int top_k) {
  const int expert = blockIdx.x, thread = threadIdx.x;
  int lower = 0;
  for (int pair = thread; pair < num_pairs; pair += kOrderThreads) lower += expert_of(experts, pair, top_k) < expert;
  int place = sum_in_block(lower);
  if (thread == 0) starts[expert] = place;
  for (int first = 0; first < num_pairs; first += kOrderThreads) {
    const int pair = first + thread;
    const bool is_mine = pair < num_pairs && expert_of(experts, pair, top_k) == expert;
    const Count count = count_flags(is_mine);
    if (is_mine) order[place + count.before] = pair;
    place += count.total;
  }
}

/* ---- rows ---- */

template <class T, int kNum>
__global__ void gather_kernel(Rows<T> out, Rows<const T> x, const int *order, int num_pairs, int top_k, int width) {
  const int64_t i = blockIdx.x;
  const int pair = order[i];
  if (pair < 0 || pair >= num_pairs) return;
  for (int e = threadIdx.x * kNum; e < width; e += blockDim.x * kNum) {
    store_pack<kNum>(out.row(i) + e, load_pack<kNum>(x.row(pair / top_k) + e));
  }
}

__global__ void place_kernel(const int *order, int *places, int num_pairs) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < num_pairs && order[i] >= 0 && order[i] < num_pairs) places[order[i]] = i;
}

template <class T, int kNum>
__global__ void combine_kernel(Rows<T> out, Rows<const T> y, Rows<const float> weights, const int *places, Rows<const T> residual,
                               int top_k, int width) {
  const int64_t t = blockIdx.x;
  for (int e = threadIdx.x * kNum; e < width; e += blockDim.x * kNum) {
    float sum[kNum] = {}, value[kNum];
    for (int j = 0; j < top_k; ++j) {
      const float weight = weights.row(t)[j];
      read_floats(y.row(places[t * top_k + j]) + e, value);
#pragma unroll
      for (int i = 0; i < kNum; ++i) sum[i] += weight * value[i];
    }
    if (residual.data) {
      read_floats(residual.row(t) + e, value);
#pragma unroll
      for (int i = 0; i < kNum; ++i) sum[i] += value[i];
    }
    write_floats(out.row(t) + e, sum);
  }
}

/* top_k, from the number of pairs. */
}  // namespace

void moe_route(const lmi_moe_route_args &args, cudaStream_t stream) {
  check_arguments(args);
  const int64_t num_tokens = args.logits.size[0], num_experts = args.logits.size[1], top_k = args.experts.size[1];
  check_range("X (of logits [T, X])", num_experts, 1, kMaxExperts);
  with_dtype(args.logits.dtype, [&](auto zero) {
    const Shape shape{static_cast<unsigned>(num_tokens), 32, num_experts * sizeof(float)};
    launch("moe_route", route_kernel<decltype(zero)>, shape, stream, args.logits, args.weights, args.experts,
           static_cast<int>(num_experts), static_cast<int>(top_k), args.renormalize != 0);
  });
  /* one block more: the end of the last expert's pairs */
  launch("moe_order", order_kernel, {static_cast<unsigned>(num_experts + 1), kOrderThreads}, stream, args.experts,
         vector_of<int>(args.order), vector_of<int>(args.starts), static_cast<int>(num_tokens * top_k), static_cast<int>(top_k));
}

void moe_gather(const lmi_moe_gather_args &args, cudaStream_t stream) {
  check_arguments(args);
  const int64_t top_k = top_k_of(args.order, args.x.size[0]), num_pairs = args.order.size[0], width = args.x.size[1];
  with_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(is_wide({&args.out, &args.x}), [&](auto num) {
      const Shape shape{static_cast<unsigned>(num_pairs), threads_for(width / num, kMaxThreads)};
      launch("moe_gather", gather_kernel<T, num>, shape, stream, args.out, args.x, vector_of<int>(args.order),
             static_cast<int>(num_pairs), static_cast<int>(top_k), static_cast<int>(width));
    });
  });
}

void moe_combine(const lmi_moe_combine_args &args, cudaStream_t stream) {
  check_arguments(args);
  const int64_t num_tokens = args.out.size[0], width = args.out.size[1], top_k = top_k_of(args.order, num_tokens);
  const int num_pairs = static_cast<int>(args.order.size[0]);
  const Scratch places(num_pairs * sizeof(int), stream);
  launch("moe_place", place_kernel, {ceil_div(num_pairs, kMaxThreads), kMaxThreads}, stream, vector_of<int>(args.order),
         places.as<int>(), num_pairs);
  with_dtype(args.out.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(is_wide({&args.out, &args.y, &args.residual}), [&](auto num) {
      const Shape shape{static_cast<unsigned>(num_tokens), threads_for(width / num, kMaxThreads)};
      launch("moe_combine", combine_kernel<T, num>, shape, stream, args.out, args.y, args.weights, places.as<int>(), args.residual,
             static_cast<int>(top_k), static_cast<int>(width));
    });
  });
}

}  // namespace lmi::cuda
