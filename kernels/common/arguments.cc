#include "common/arguments.h"

#include <algorithm>
#include <cmath>

namespace lmi {
namespace {

bool any_given(std::initializer_list<const lmi_tensor *> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const lmi_tensor *tensor) { return is_given(*tensor); });
}

/* ---- norms ---- */

template <class Args>
void check_norm(const Args &args) {
  check_dims("x", args.x, 2);
  check_float("x", args.x);
  const Size tokens{"T", args.x.size[0]}, hidden{"E", args.x.size[1]};
  check("out", args.out, args.x.dtype, {tokens, hidden});
  check_optional("residual", args.residual, args.x.dtype, {tokens, hidden});
  check_optional("weight", args.weight, args.x.dtype, {hidden});
}

/* ---- caches ---- */

void check_cache(const std::string &name, const lmi_tensor &cache, int32_t dtype, const Size &heads, const Size &size, float scale) {
  check_dims(name.c_str(), cache, 4);
  const bool is_packed = cache.dtype == LMI_F8E4M3;
  check(name.c_str(), cache, is_packed ? LMI_F8E4M3 : dtype, {{"N", cache.size[0]}, heads, {"P", cache.size[2]}, size});
  if (is_packed && !(scale > 0.0f && std::isfinite(scale))) {
    refuse(name.substr(0, 1) + "_scale=" + std::to_string(scale) + " must be finite and above 0 where " + name + " is F8E4M3");
  }
}

/* Both, [N,K,P,D]: of dtype, or both F8E4M3. */
template <class Args>
void check_caches(const Args &args, int32_t dtype, const Size &heads, const Size &size) {
  check_cache("k_cache", args.k_cache, dtype, heads, size, args.k_scale);
  check_cache("v_cache", args.v_cache, dtype, heads, size, args.v_scale);
  check_dtype("v_cache", args.v_cache, args.k_cache.dtype);
  require(args.k_cache.size[0] == args.v_cache.size[0] && args.k_cache.size[2] == args.v_cache.size[2],
          "k_cache and v_cache must have the same shape [N, K, P, D]");
}

/* ---- rotary ---- */

void check_rotation(const lmi_rotary_args &args, int64_t num_tokens, int64_t head_size) {
  check_dims("cos", args.cos, 2);
  check("cos", args.cos, LMI_F32, {{"rows", args.cos.size[0]}, {"half", args.cos.size[1]}});
  check("sin", args.sin, LMI_F32, {{"rows", args.cos.size[0]}, {"half", args.cos.size[1]}});
  check_range("half (of cos [rows, half])", args.cos.size[1], 0, head_size / 2);
  check("rows", args.rows, LMI_I32, {{"T", num_tokens}});
}

void check_write(const lmi_rotary_args &args) {
  check_dims("k", args.k, 3);
  check_float("k", args.k);
  check("v", args.v, args.k.dtype, {{"T", args.k.size[0]}, {"K", args.k.size[1]}, {"D", args.k.size[2]}});
  check_caches(args, args.k.dtype, {"K", args.k.size[1]}, {"D", args.k.size[2]});
  check("slots", args.slots, LMI_I32, {{"T", args.k.size[0]}});
}

/* ---- attention ---- */

void check_bias(const lmi_attention_args &args) {
  if (!is_given(args.relative_bias)) return;
  check_dims("relative_bias", args.relative_bias, 2);
  const int64_t buckets = args.relative_bias.size[0];
  check("relative_bias", args.relative_bias, LMI_F32, {{"buckets", buckets}, {"H", args.q.size[1]}});
  require(buckets >= (args.causal ? 2 : 4), "relative_bias must have at least 2 buckets, 4 if not causal");
  check_range("max_distance", args.max_distance, buckets / (args.causal ? 2 : 4) + 1, 1 << 20);
}

/* ---- linear ---- */

void check_like_x(const char *name, const lmi_tensor &tensor, const lmi_tensor &x, const Size &tokens, const Size &outputs) {
  check_shape(name, tensor, {tokens, outputs});
  if (tensor.dtype != LMI_F32) check_dtype(name, tensor, x.dtype);
}

/* All but the bias. */
void check_linear(const lmi_linear_args &args, int64_t expected_bytes) {
  const char *reason = why_unsupported(shape_of(args));
  require(!*reason, reason);
  check_range("activation", args.activation, LMI_IDENTITY, LMI_QUICK_GELU);
  check_dims("x", args.x, 2);
  const Size tokens{"T", args.x.size[0]}, all{"F", args.out_features}, half{"F/2", args.out_features / 2};
  check("x", args.x, args.dtype, {tokens, {"E", args.in_features}});
  check_like_x("out", args.out, args.x, tokens, args.gated ? half : all);
  if (is_given(args.addend)) check_like_x("addend", args.addend, args.x, tokens, all);
  if (is_given(args.residual)) check_like_x("residual", args.residual, args.x, tokens, args.gated ? half : all);
  check("packed", args.packed, LMI_U8, {{"packed_bytes", expected_bytes}});
}

/* ---- mixture of experts ---- */

void check_order(const lmi_tensor &order, int64_t num_tokens) {
  check_dims("order", order, 1);
  check_dtype("order", order, LMI_I32);
  const int64_t num_pairs = order.size[0];
  require(num_tokens ? num_pairs > 0 && num_pairs % num_tokens == 0 : num_pairs == 0, "order must have T * top_k entries");
}

/* ---- rows of logits ---- */

void check_logits(const lmi_tensor &logits) {
  check_dims("logits", logits, 2);
  check_dtype("logits", logits, LMI_F32);
  require(logits.size[1] > 0, "V must be at least 1");
}

void check_pieces(const std::string &name, const lmi_tensor &starts, const lmi_tensor &ids, const lmi_tensor &logits) {
  check_dims((name + "_ids").c_str(), ids, 1);
  check_dtype((name + "_ids").c_str(), ids, LMI_I32);
  check((name + "_starts").c_str(), starts, LMI_I32, {{"R+1", logits.size[0] + 1}});
}

}  // namespace

const char *why_unsupported(const LinearShape &shape) {
  if (shape.out_features < 1 || shape.in_features < 1) return "out_features and in_features must be at least 1";
  if (shape.dtype != LMI_F32 && shape.dtype != LMI_BF16 && shape.dtype != LMI_F16) return "dtype must be F32, BF16 or F16";
  if (shape.format < LMI_DENSE || shape.format > LMI_INT4) return "format must be DENSE, INT8 or INT4";
  if (shape.format == LMI_DENSE && shape.group != 0) return "group must be 0 for DENSE weights";
  if (shape.format != LMI_DENSE && (shape.group < 1 || shape.in_features % shape.group)) return "group must divide in_features";
  if (shape.gated && shape.out_features % 2) return "out_features must be even for a gated weight";
  return "";
}

int64_t top_k_of(const lmi_tensor &order, int64_t num_tokens) { return num_tokens ? order.size[0] / num_tokens : 1; }

void check_arguments(const lmi_rms_norm_args &args) {
  check_norm(args);
  check_optional("addend", args.addend, args.x.dtype, {{"T", args.x.size[0]}, {"E", args.x.size[1]}});
}

void check_arguments(const lmi_layer_norm_args &args) {
  check_norm(args);
  check_optional("bias", args.bias, args.x.dtype, {{"E", args.x.size[1]}});
}

void check_arguments(const lmi_rotary_args &args) {
  const lmi_tensor &one = is_given(args.q) ? args.q : args.k;
  check_dims(&one == &args.q ? "q" : "k", one, 3);
  if (is_given(args.q)) check_float("q", args.q);
  if (any_given({&args.k, &args.v, &args.k_cache, &args.v_cache, &args.slots})) check_write(args);
  if (is_given(args.q) && is_given(args.k)) {
    check("k", args.k, args.q.dtype, {{"T", args.q.size[0]}, {"K", args.k.size[1]}, {"D", args.q.size[2]}});
  }
  if (any_given({&args.cos, &args.sin, &args.rows})) check_rotation(args, one.size[0], one.size[2]);
}

void check_arguments(const lmi_attention_args &args) {
  check_dims("q", args.q, 3);
  check_dims("k_cache", args.k_cache, 4);
  check_dims("starts", args.starts, 1);
  check_dims("tables", args.tables, 2);
  const int64_t *q = args.q.size, *cache = args.k_cache.size, sequences = args.starts.size[0] - 1;
  check_float("q", args.q);
  check("out", args.out, args.q.dtype, {{"T", q[0]}, {"H", q[1]}, {"D", q[2]}});
  check_caches(args, args.q.dtype, {"K", cache[1]}, {"D", q[2]});
  check("key_lengths", args.key_lengths, LMI_I32, {{"B", sequences}});
  check("tables", args.tables, LMI_I32, {{"B", sequences}, {"max_blocks", args.tables.size[1]}});
  check_dtype("starts", args.starts, LMI_I32);
  check_optional("alibi", args.alibi, LMI_F32, {{"H", q[1]}});
  require(q[2] > 0 && q[2] <= 256 && q[2] % 8 == 0, "D must be a multiple of 8 up to 256");
  require(cache[1] > 0 && q[1] % cache[1] == 0, "K must divide H");
  require(cache[2] > 0, "P must be at least 1");
  require(args.window >= 0, "window must be at least 0");
  check_bias(args);
}

void check_arguments(const lmi_linear_pack_args &args, int64_t packed_bytes) {
  const char *reason = why_unsupported(shape_of(args));
  require(!*reason, reason);
  check_dims("w", args.w, 2);
  const bool dense = args.format == LMI_DENSE;
  const Size rows{"rows", args.w.size[0]}, groups{"E/group", dense ? 0 : args.in_features / args.group};
  check("w", args.w, dense ? args.dtype : LMI_U8, {rows, {"E", args.in_features}});
  check_range("row_offset", args.row_offset, 0, args.out_features - args.w.size[0]);
  if (!dense) {
    check("scales", args.scales, args.dtype, {rows, groups});
    check("zeros", args.zeros, LMI_U8, {rows, groups});
  }
  check("packed", args.packed, LMI_U8, {{"packed_bytes", packed_bytes}});
}

void check_arguments(const lmi_linear_args &args, int64_t packed_bytes) {
  check_linear(args, packed_bytes);
  check_optional("bias", args.bias, args.dtype, {{"F", args.out_features}});
}

void check_arguments(const lmi_grouped_linear_args &args, int64_t packed_bytes) {
  check_dims("starts", args.starts, 1);
  check_dtype("starts", args.starts, LMI_I32);
  const int64_t num_experts = args.starts.size[0] - 1;
  require(args.expert_bytes >= packed_bytes, "expert_bytes must be at least the packed bytes of one weight");
  check_linear(args.linear, num_experts * args.expert_bytes);
  check_optional("bias", args.linear.bias, args.linear.dtype, {{"X", num_experts}, {"F", args.linear.out_features}});
}

void check_arguments(const lmi_lora_args &args) {
  check_dims("x", args.x, 2);
  check_float("x", args.x);
  check_dims("a", args.a, 3);
  check_dims("b", args.b, 3);
  const Size adapters{"A", args.a.size[0]}, rank{"rank", args.a.size[1]}, outputs{"F", args.b.size[1]};
  check("a", args.a, args.x.dtype, {adapters, rank, {"E", args.x.size[1]}});
  check("b", args.b, args.x.dtype, {adapters, outputs, rank});
  check("scales", args.scales, LMI_F32, {adapters});
  check("adapters", args.adapters, LMI_I32, {{"T", args.x.size[0]}});
  check_shape("out", args.out, {{"T", args.x.size[0]}, outputs});
  if (args.out.dtype != LMI_F32) check_dtype("out", args.out, args.x.dtype);
}

void check_arguments(const lmi_activation_args &args) {
  check_dims("x", args.x, 2);
  check_float("x", args.x);
  check_range("activation", args.activation, LMI_IDENTITY, LMI_SCALE);
  const bool is_bounded = args.activation == LMI_SOFT_CAP || args.activation == LMI_CLAMP;
  require(!is_bounded || args.parameter > 0.0f, "parameter must be above 0 for a soft cap and a clamp");
  const int64_t width = args.x.size[1];
  require(!args.gated || width % 2 == 0, "x must have an even number of columns, gate and up");
  check("out", args.out, args.x.dtype, {{"T", args.x.size[0]}, {"F", args.gated ? width / 2 : width}});
}

void check_arguments(const lmi_embedding_args &args) {
  check_dims("table", args.table, 2);
  check_float("table", args.table);
  check_dims("ids", args.ids, 1);
  check_dtype("ids", args.ids, LMI_I32);
  check("out", args.out, args.table.dtype, {{"T", args.ids.size[0]}, {"E", args.table.size[1]}});
  check_optional("residual", args.residual, args.table.dtype, {{"T", args.ids.size[0]}, {"E", args.table.size[1]}});
}

void check_arguments(const lmi_moe_route_args &args) {
  check_dims("logits", args.logits, 2);
  check_float("logits", args.logits);
  check_dims("experts", args.experts, 2);
  const int64_t num_tokens = args.logits.size[0], num_experts = args.logits.size[1], top_k = args.experts.size[1];
  check_range("top_k (of experts [T, top_k])", top_k, 1, num_experts);
  check("experts", args.experts, LMI_I32, {{"T", num_tokens}, {"top_k", top_k}});
  check("weights", args.weights, LMI_F32, {{"T", num_tokens}, {"top_k", top_k}});
  check("order", args.order, LMI_I32, {{"T*top_k", num_tokens * top_k}});
  check("starts", args.starts, LMI_I32, {{"X+1", num_experts + 1}});
}

void check_arguments(const lmi_moe_gather_args &args) {
  check_dims("x", args.x, 2);
  check_float("x", args.x);
  check_order(args.order, args.x.size[0]);
  check("out", args.out, args.x.dtype, {{"T*top_k", args.order.size[0]}, {"E", args.x.size[1]}});
}

void check_arguments(const lmi_moe_combine_args &args) {
  check_dims("out", args.out, 2);
  check_float("out", args.out);
  const int64_t num_tokens = args.out.size[0], num = args.out.size[1];
  check_order(args.order, num_tokens);
  const int64_t top_k = top_k_of(args.order, num_tokens);
  check("y", args.y, args.out.dtype, {{"T*top_k", num_tokens * top_k}, {"E", num}});
  check("weights", args.weights, LMI_F32, {{"T", num_tokens}, {"top_k", top_k}});
  check_optional("residual", args.residual, args.out.dtype, {{"T", num_tokens}, {"E", num}});
}

void check_arguments(const lmi_penalize_args &args) {
  check_logits(args.logits);
  const Size rows{"R", args.logits.size[0]};
  if (is_given(args.history_starts)) {
    check_pieces("history", args.history_starts, args.history_ids, args.logits);
    check("history_counts", args.history_counts, LMI_I32, {{"entries", args.history_ids.size[0]}});
    check("repetition", args.repetition, LMI_F32, {rows});
    check("presence", args.presence, LMI_F32, {rows});
    check("frequency", args.frequency, LMI_F32, {rows});
  }
  if (is_given(args.bias_starts)) {
    check_pieces("bias", args.bias_starts, args.bias_ids, args.logits);
    check("bias_values", args.bias_values, LMI_F32, {{"entries", args.bias_ids.size[0]}});
  }
}

void check_arguments(const lmi_sample_args &args) {
  check_logits(args.logits);
  const Size rows{"R", args.logits.size[0]};
  check("temperature", args.temperature, LMI_F32, {rows});
  check("top_k", args.top_k, LMI_I32, {rows});
  check("top_p", args.top_p, LMI_F32, {rows});
  check("typical_p", args.typical_p, LMI_F32, {rows});
  check("min_p", args.min_p, LMI_F32, {rows});
  check("seeds", args.seeds, LMI_U64, {rows});
  check("positions", args.positions, LMI_I32, {rows});
  check("ids", args.ids, LMI_I32, {rows});
}

void check_arguments(const lmi_logprobs_args &args) {
  check_logits(args.logits);
  const Size rows{"R", args.logits.size[0]};
  check("ids", args.ids, LMI_I32, {rows});
  check("values", args.values, LMI_F32, {rows});
  check("ranks", args.ranks, LMI_I32, {rows});
  if (!is_given(args.top_ids)) return;
  const Size top{"top", args.top_ids.size[1]};
  check_dims("top_ids", args.top_ids, 2);
  check_range("top", top.value, 0, args.logits.size[1]);
  check("top_ids", args.top_ids, LMI_I32, {rows, top});
  check("top_values", args.top_values, LMI_F32, {rows, top});
}

}  // namespace lmi
