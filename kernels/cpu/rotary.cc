/* Rotary embedding of q and k in place, and the write of k and v into their cache slots. A token belongs to one thread. */
#include "common/arguments.h"
#include "common/rows.h"
#include "cpu/cache_order.h"

namespace lmi::LMI_LEVEL {
namespace {

/* One head of 2*half numbers: pairs (i, i+half), or (2i, 2i+1). */
template <bool kInterleaved>
void rotate(float *head, const float *cos, const float *sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    float &a = head[kInterleaved ? 2 * i : i], &b = head[kInterleaved ? 2 * i + 1 : i + half];
    const float before = a;
    a = before * cos[i] - b * sin[i];
    b = b * cos[i] + before * sin[i];
  }
}

void rotate_heads(const lmi_rotary_args &args, const lmi_tensor &x, int64_t token, float *heads) {
  const int64_t half = args.cos.size[1], row = integers(args.rows)[token];
  const float *cos = static_cast<const float *>(at(args.cos, row)), *sin = static_cast<const float *>(at(args.sin, row));
  const bool is_dense = 2 * half == x.size[2] && x.stride[1] == x.size[2];
  const int64_t together = is_dense ? x.size[1] : 1; /* heads without a gap between what is turned */
  for (int64_t h = 0; h < x.size[1]; h += together) {
    read_floats(at(x, token, h), x.dtype, together * 2 * half, heads);
    for (int64_t i = 0; i < together; ++i) {
      if (args.interleaved) rotate<true>(heads + i * 2 * half, cos, sin, half);
      else rotate<false>(heads + i * 2 * half, cos, sin, half);
    }
    write_floats(heads, x.dtype, together * 2 * half, at(x, token, h));
  }
}

constexpr int64_t kRun = 16; /* tokens that are written together, at most */

/* Consecutive tokens whose slots follow one another in a block. */
struct Tokens {
  int64_t first, num, slot;
};

Tokens tokens_from(const lmi_rotary_args &args, int64_t first, int64_t end) {
  const int32_t *slots = integers(args.slots);
  const int64_t slot = slots[first], room = args.k_cache.size[2] - slot % args.k_cache.size[2];
  int64_t num = 1;
  while (slot >= 0 && num < std::min(room, kRun) && first + num < end && slots[first + num] == slot + num) ++num;
  return {first, num, slot};
}

enum class Kind { kKey, kValue };

/* The tokens' heads, in the cache's dtype: fp8 holds x / scale. A head at a time: its part of the block stays in a near cache. */
template <Kind kind, class Number>
void write_slots(const lmi_tensor &cache, const lmi_tensor &x, float scale, const Tokens &tokens, float *scratch) {
  const int64_t block = tokens.slot / cache.size[2], place = tokens.slot % cache.size[2], size = x.size[2];
  Number *const converted = reinterpret_cast<Number *>(scratch + size);
  for (int64_t h = 0; h < x.size[1]; ++h) {
    Run<Number> run = {static_cast<const Number *>(at(x, tokens.first, h)), tokens.num, x.stride[0]};
    if (cache.dtype != x.dtype) {
      for (int64_t token = 0; token < tokens.num; ++token) {
        read_floats(at(x, tokens.first + token, h), x.dtype, size, scratch);
        for (int64_t d = 0; d < size; ++d) scratch[d] /= scale;
        write_floats(scratch, cache.dtype, size, converted + token * size);
      }
      run = {converted, tokens.num, size};
    }
    if (kind == Kind::kKey) put_keys(cache, block, h, place, run);
    else put_values(cache, block, h, place, run);
  }
}

template <class Number>
void write_tokens(const lmi_rotary_args &args, const Tokens &tokens, float *scratch) {
  write_slots<Kind::kKey, Number>(args.k_cache, args.k, args.k_scale, tokens, scratch);
  write_slots<Kind::kValue, Number>(args.v_cache, args.v, args.v_scale, tokens, scratch);
}

void write_tokens(const lmi_rotary_args &args, const Tokens &tokens, float *scratch) {
  switch (bytes_of(args.k_cache.dtype)) {
    case 1: return write_tokens<uint8_t>(args, tokens, scratch);
    case 2: return write_tokens<uint16_t>(args, tokens, scratch);
    default: return write_tokens<uint32_t>(args, tokens, scratch);
  }
}

/* What the integers hold, and how the caches lie. */
void check_values(const lmi_rotary_args &args) {
  if (is_given(args.cos)) check_entries("an entry of rows", args.rows, 0, args.cos.size[0] - 1);
  if (is_given(args.k)) check_order("k_cache", args.k_cache);
  if (is_given(args.k)) check_order("v_cache", args.v_cache);
  if (is_given(args.k)) check_entries("an entry of slots", args.slots, INT32_MIN, args.k_cache.size[0] * args.k_cache.size[2] - 1);
}

}  // namespace

void rotary(const lmi_rotary_args &args) {
  check_arguments(args);
  check_values(args);
  const lmi_tensor &one = is_given(args.q) ? args.q : args.k;
  const int64_t heads = (is_given(args.q) ? args.q.size[1] : 0) + (is_given(args.k) ? 2 * args.k.size[1] : 0);
  parallel_for(one.size[0], rows_a_share(heads * one.size[2]), [&](int64_t begin, int64_t end) {
    Floats scratch(std::max(heads, 1 + kRun) * one.size[2]);
    for (int64_t t = begin; t < end;) {
      const Tokens tokens = is_given(args.k) ? tokens_from(args, t, end) : Tokens{t, 1, -1};
      for (const int64_t last = t + tokens.num; t < last; ++t) {
        if (is_given(args.cos) && is_given(args.q)) rotate_heads(args, args.q, t, scratch);
        if (is_given(args.cos) && is_given(args.k)) rotate_heads(args, args.k, t, scratch);
      }
      if (tokens.slot >= 0) write_tokens(args, tokens, scratch);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
