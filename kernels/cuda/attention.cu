/* Attention over blocks, for prefill and decode alike: checks, the choice of a kernel, memory for splits. Lengths, starts and
 * tables are on the device, so the host launches as many blocks as the GPU runs at once, and they find their work. Blocks that a
 * table names are taken as they are. */
#include <cmath>

#include "cuda/attention_bias.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/attention_splits_sm90.cuh"
#include "cuda/attention_tiles.cuh"

#include "cuda/attention_plain.cuh"
#include "cuda/operations.cuh"

namespace lmi::cuda {
namespace {

/* ---- relative bias ---- */

/* As the CPU column computes it, in float. */
int far_bucket(int size, int exact, int num_far, int max_distance) {
  const float ratio = std::log(static_cast<float>(size) / static_cast<float>(exact));
  const float range = static_cast<float>(std::log(static_cast<double>(max_distance) / static_cast<double>(exact)));
  return std::min(static_cast<int>(ratio / range * static_cast<float>(num_far)), num_far - 1);
}

Buckets buckets_of(int num_buckets, int max_distance, bool is_causal) {
  Buckets buckets{};
  buckets.is_causal = is_causal;
  buckets.half = is_causal ? num_buckets : num_buckets / 2;
  buckets.exact = buckets.half / 2;
  buckets.num_far = buckets.half - buckets.exact;
  for (int i = 0; i < buckets.num_far; ++i) {
    int low = buckets.exact, high = max_distance; /* the least size whose bucket is at least i; bucket(max_distance) is the last */
    while (low < high) {
      const int middle = (low + high) / 2;
      if (far_bucket(middle, buckets.exact, buckets.num_far, max_distance) >= i) high = middle;
      else low = middle + 1;
    }
    buckets.from[i] = low;
  }
  return buckets;
}

void make_bias(const lmi_attention_args &args, float *table, cudaStream_t stream) {
  const int num_buckets = static_cast<int>(args.relative_bias.size[0]);
  const Shape shape{static_cast<unsigned>(2 * args.max_distance + 1), threads_for(args.q.size[1], 128)};
  launch("attention bias", bias_kernel, shape, stream, table, args.relative_bias, buckets_of(num_buckets, args.max_distance, args.causal != 0),
         static_cast<int>(args.q.size[1]), args.max_distance);
}

/* ---- launches ---- */

template <class T, class Cached>
Attention<T, Cached> attention_of(const lmi_attention_args &args, const float *bias) {
  const bool is_scaled = !std::is_same_v<T, Cached>;
  return {{vector_of<int>(args.starts),
           vector_of<int>(args.key_lengths),
           vector_of<int>(args.tables),
           vector_of<float>(args.alibi),
           bias,
           args.tables.stride[0],
           0,
           static_cast<int>(args.q.size[1]),
           static_cast<int>(args.k_cache.size[1]),
           args.q.size[1] / args.k_cache.size[1],
           args.k_cache.size[2],
           static_cast<int>(args.q.size[2]),
           args.window,
           args.max_distance,
           is_scaled ? args.scale * args.k_scale : args.scale,
           is_scaled ? args.v_scale : 1.0f,
           args.soft_cap,
           args.causal != 0,
           is_wide({&args.k_cache, &args.v_cache})},
          args.out,
          args.q,
          args.k_cache,
          args.v_cache};
}

/* What is known on the host of how much work there can be. */
struct Bounds {
  int64_t num_rows; /* of all sequences, in one key head */
  int64_t num_splits;

  int64_t max_pieces(int num_sequences, int num_kv_heads) const {
    const int64_t units = std::min<int64_t>(int64_t{num_sequences} * (kFewRows / kUnitRows), num_rows / kUnitRows + num_sequences);
    return units * num_kv_heads * num_splits;
  }
};

template <int kPadded, class T>
void run_splits(const Attention<T> &attention, const Boxes &boxes, PieceStates<kPadded> states, cudaStream_t stream) {
  const Shape shape{static_cast<unsigned>(num_processors()), kAllSplitThreads, SplitShape<T, kPadded>::kSharedBytes};
  launch("attention of splits", split_kernel<T, kPadded>, shape, stream, attention, boxes, states);
}

template <int kPadded, class T>
void run_prompts(const Attention<T> &attention, const Boxes &boxes, cudaStream_t stream) {
  const Shape shape{static_cast<unsigned>(num_processors()), kPromptThreads, PromptShape<T, kPadded>::kSharedBytes};
  launch("attention of prompts", prompt_kernel<T, kPadded>, shape, stream, attention, boxes);
}

/* boxes: how caches are loaded on sm_90a; null: all goes the way of sm_80. */
template <int kPadded, class T, class Cached>
void run_tiles(const Attention<T, Cached> &attention, const Bounds &bounds, const Boxes *boxes, cudaStream_t stream) {
  const int64_t pieces = bounds.num_splits > 1 ? bounds.max_pieces(attention.num_sequences, attention.num_kv_heads) : 0;
  const Scratch scratch(static_cast<size_t>(pieces * PieceStates<kPadded>::kFloats) * sizeof(float), stream);
  const PieceStates<kPadded> states{scratch.as<float>()};
  const unsigned processors = static_cast<unsigned>(num_processors());
  const auto attend = [&](bool by_splits) {
    const Shape shape{2 * processors, kAttentionThreads, TileShape<T, Cached, kPadded>::kSharedBytes};
    if constexpr (std::is_same_v<T, Cached>) {
      if (boxes && by_splits) return run_splits<kPadded>(attention, *boxes, states, stream);
      if constexpr (kPadded <= 128) { /* a state of 64 rows is in registers */
        if (boxes) return run_prompts<kPadded>(attention, *boxes, stream);
      }
    }
    launch("attention", attend_kernel<T, Cached, kPadded>, shape, stream, attention, states, by_splits);
  };
  attend(true);
  const Shape small{8 * processors, kAttentionThreads};
  if (bounds.num_splits > 1) launch("attention merge", merge_kernel<T, kPadded>, small, stream, attention, attention.out, states);
  if (bounds.num_rows > kFewRows) attend(false);
}

template <class T, class Cached>
void run(const Attention<T, Cached> &attention, const Bounds &bounds, const Boxes *boxes, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    const unsigned blocks = static_cast<unsigned>(8 * num_processors());
    launch("attention", plain_attend_kernel<Cached>, {blocks, kAttentionThreads}, stream, attention);
  } else {
    if (attention.size <= 64) run_tiles<64>(attention, bounds, boxes, stream);
    else if (attention.size <= 128) run_tiles<128>(attention, bounds, boxes, stream);
    else run_tiles<256>(attention, bounds, boxes, stream);
  }
}

}  // namespace

void attention(const lmi_attention_args &args, cudaStream_t stream) {
  check_arguments(args);
  if (is_given(args.relative_bias)) check_range("buckets of relative_bias", args.relative_bias.size[0], 2, 2 * kMaxFarBuckets);
  const int64_t num_sequences = args.starts.size[0] - 1, num_tokens = args.q.size[0];
  if (num_tokens == 0) return;
  const bool has_bias = is_given(args.relative_bias);
  const Scratch bias(has_bias ? args.q.size[1] * (2 * int64_t{args.max_distance} + 1) * sizeof(float) : 0, stream);
  if (has_bias) make_bias(args, bias.as<float>(), stream);
  const int64_t max_keys = args.tables.size[1] * args.k_cache.size[2];
  const Bounds bounds{num_tokens * (args.q.size[1] / args.k_cache.size[1]), std::max<int64_t>(1, (max_keys + kSplit - 1) / kSplit)};
  const bool has_boxes = are_boxes_for_sm90(args);
  const Boxes boxes = has_boxes ? boxes_of(args) : Boxes();
  with_cached(args.q.dtype, args.k_cache.dtype, [&](auto zero, auto cached) {
    auto part = attention_of<decltype(zero), decltype(cached)>(args, has_bias ? bias.as<float>() : nullptr);
    for (int64_t first = 0; first < num_sequences; first += kMaxSequences) {
      part.num_sequences = static_cast<int>(std::min<int64_t>(kMaxSequences, num_sequences - first));
      part.starts = vector_of<int>(args.starts) + first;
      part.key_lengths = vector_of<int>(args.key_lengths) + first;
      part.tables = vector_of<int>(args.tables) + first * args.tables.stride[0];
      run(part, bounds, has_boxes ? &boxes : nullptr, stream);
    }
  });
}

}  // namespace lmi::cuda
