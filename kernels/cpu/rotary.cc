/* Rotary embedding of q and k in place, and the write of k and v into their cache slots. A token belongs to one thread. */
#include <algorithm>
#include <cstring>

#include "common/rows.h"

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

void write_slot(const lmi_tensor &cache, const lmi_tensor &x, int64_t token, int64_t slot) {
  const int64_t block = slot / cache.size[2], place = slot % cache.size[2];
  const size_t num_bytes = static_cast<size_t>(x.size[2] * bytes_of(x.dtype));
  for (int64_t h = 0; h < x.size[1]; ++h) std::memcpy(at(cache, block, h, place), at(x, token, h), num_bytes);
}

void check_indices(const char *name, const lmi_tensor &indices, int64_t minimum, int64_t end) {
  for (int64_t t = 0; t < indices.size[0]; ++t) check_range(name, integers(indices)[t], minimum, end - 1);
}

void check_rotation(const lmi_rotary_args &args, int64_t num_tokens, int64_t head_size) {
  check_dims("cos", args.cos, 2);
  check("cos", args.cos, LMI_F32, {{"rows", args.cos.size[0]}, {"half", args.cos.size[1]}});
  check("sin", args.sin, LMI_F32, {{"rows", args.cos.size[0]}, {"half", args.cos.size[1]}});
  check_range("half (of cos [rows, half])", args.cos.size[1], 0, head_size / 2);
  check("rows", args.rows, LMI_I32, {{"T", num_tokens}});
  check_indices("an entry of rows", args.rows, 0, args.cos.size[0]);
}

void check_cache(const char *name, const lmi_tensor &cache, const lmi_tensor &x) {
  check_dims(name, cache, 4);
  check(name, cache, x.dtype, {{"N", cache.size[0]}, {"K", x.size[1]}, {"P", cache.size[2]}, {"D", x.size[2]}});
}

void check_write(const lmi_rotary_args &args) {
  check_dims("k", args.k, 3);
  check_float("k", args.k);
  check("v", args.v, args.k.dtype, {{"T", args.k.size[0]}, {"K", args.k.size[1]}, {"D", args.k.size[2]}});
  check_cache("k_cache", args.k_cache, args.k);
  check_cache("v_cache", args.v_cache, args.k);
  require(args.k_cache.size[0] == args.v_cache.size[0] && args.k_cache.size[2] == args.v_cache.size[2],
          "k_cache and v_cache must have the same shape [N, K, P, D]");
  check("slots", args.slots, LMI_I32, {{"T", args.k.size[0]}});
  check_indices("an entry of slots", args.slots, INT32_MIN, args.k_cache.size[0] * args.k_cache.size[2]);
}

bool any_given(std::initializer_list<const lmi_tensor *> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const lmi_tensor *tensor) { return is_given(*tensor); });
}

void check_all(const lmi_rotary_args &args, const lmi_tensor &one) {
  check_dims(&one == &args.q ? "q" : "k", one, 3);
  if (is_given(args.q)) check_float("q", args.q);
  if (any_given({&args.k, &args.v, &args.k_cache, &args.v_cache, &args.slots})) check_write(args);
  if (is_given(args.q) && is_given(args.k)) {
    check("k", args.k, args.q.dtype, {{"T", args.q.size[0]}, {"K", args.k.size[1]}, {"D", args.q.size[2]}});
  }
  if (any_given({&args.cos, &args.sin, &args.rows})) check_rotation(args, one.size[0], one.size[2]);
}

}  // namespace

void rotary(const lmi_rotary_args &args) {
  const lmi_tensor &one = is_given(args.q) ? args.q : args.k;
  check_all(args, one);
  const int64_t heads = (is_given(args.q) ? args.q.size[1] : 0) + (is_given(args.k) ? 2 * args.k.size[1] : 0);
  parallel_for(one.size[0], rows_a_share(heads * one.size[2]), [&](int64_t begin, int64_t end) {
    Floats head(one.size[2]);
    for (int64_t t = begin; t < end; ++t) {
      if (is_given(args.cos) && is_given(args.q)) rotate_heads(args, args.q, t, head);
      if (is_given(args.cos) && is_given(args.k)) rotate_heads(args, args.k, t, head);
      const int64_t slot = is_given(args.k) ? integers(args.slots)[t] : -1;
      if (slot < 0) continue;
      write_slot(args.k_cache, args.k, t, slot);
      write_slot(args.v_cache, args.v, t, slot);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
