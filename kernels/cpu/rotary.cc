/* Rotary embedding of q and k in place, and the write of k and v into their cache slots. A token belongs to one thread. */
#include "common/arguments.h"
#include "common/rows.h"
#include "cpu/cache_order.h"

namespace lmi::LMI_LEVEL {
namespace {

/* One head of 2*half numbers: pairs (i, i+half), or (2i, 2i+1). */
void rotate(float *head, const float *cos, const float *sin, int64_t half, bool interleaved) {
  const int64_t first = interleaved ? 2 : 1, second = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float &a = head[first * i], &b = head[first * i + second];
    const float before = a;
    a = before * cos[i] - b * sin[i];
    b = b * cos[i] + before * sin[i];
  }
}

void rotate_heads(const lmi_rotary_args &args, const lmi_tensor &x, int64_t token, float *head) {
  const int64_t half = args.cos.size[1], row = integers(args.rows)[token];
  const float *cos = static_cast<const float *>(at(args.cos, row)), *sin = static_cast<const float *>(at(args.sin, row));
  for (int64_t h = 0; h < x.size[1]; ++h) {
    read_floats(at(x, token, h), x.dtype, 2 * half, head);
    rotate(head, cos, sin, half, args.interleaved != 0);
    write_floats(head, x.dtype, 2 * half, at(x, token, h));
  }
}

enum class Kind { kKey, kValue };

template <Kind kind, class Number>
void put(const lmi_tensor &cache, int64_t block, int64_t head, int64_t place, const void *from) {
  const Number *numbers = static_cast<const Number *>(from);
  if (kind == Kind::kKey) put_key(cache, block, head, place, numbers);
  else put_value(cache, block, head, place, numbers);
}

/* The token's heads, in the cache's dtype: fp8 holds x / scale. */
template <Kind kind>
void write_slot(const lmi_tensor &cache, const lmi_tensor &x, float scale, int64_t token, int64_t slot, float *scratch) {
  const int64_t block = slot / cache.size[2], place = slot % cache.size[2], size = x.size[2];
  for (int64_t h = 0; h < x.size[1]; ++h) {
    const void *from = at(x, token, h);
    if (cache.dtype != x.dtype) {
      read_floats(from, x.dtype, size, scratch);
      for (int64_t d = 0; d < size; ++d) scratch[d] /= scale;
      write_floats(scratch, cache.dtype, size, scratch + size);
      from = scratch + size;
    }
    switch (bytes_of(cache.dtype)) {
      case 1: put<kind, uint8_t>(cache, block, h, place, from); break;
      case 2: put<kind, uint16_t>(cache, block, h, place, from); break;
      default: put<kind, uint32_t>(cache, block, h, place, from);
    }
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
    Floats head(2 * one.size[2]);
    for (int64_t t = begin; t < end; ++t) {
      if (is_given(args.cos) && is_given(args.q)) rotate_heads(args, args.q, t, head);
      if (is_given(args.cos) && is_given(args.k)) rotate_heads(args, args.k, t, head);
      const int64_t slot = is_given(args.k) ? integers(args.slots)[t] : -1;
      if (slot < 0) continue;
      write_slot<Kind::kKey>(args.k_cache, args.k, args.k_scale, t, slot, head);
      write_slot<Kind::kValue>(args.v_cache, args.v, args.v_scale, t, slot, head);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
