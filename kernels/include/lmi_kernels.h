/* lmi_kernels.h: every operation of lmi-dist's kernels, once. A backend ("column") is one shared library that exports
 * exactly these functions; ops/abi.py reads this very file when it opens one.
 *
 * Shape letters: T tokens in the batch, B sequences, E hidden, H query heads, K key heads, D head size, F features out,
 * V vocabulary, N blocks, P tokens a block, X experts, R rows wanted. Rules that hold for every operation:
 *  - x, out and weights are F32, BF16 or F16 (one dtype a call unless a line says otherwise); sums are in float.
 *  - the last dimension of a tensor has stride 1; other strides are free. A tensor with dims == 0 is absent; one without elements
 *    needs no data. What is not called optional must be given.
 *  - sums are cut at fixed absolute positions, so a row's bits do not depend on the other rows, on how many there are or
 *    on the number of threads.
 *  - every operation takes one argument struct, which the caller keeps alive until the stream has run it, and returns
 *    LMI_OK, or an error whose sentence lmi_error_message() gives. Nothing throws, prints or exits.
 *  - out may alias x where a line says "in place".
 *  - shapes and dtypes are checked before anything runs. Values inside of tensors (rows, slots, ids, starts, lengths, tables, settings)
 *    are refused by the CPU column; a column on a device has not seen them when its call returns: entries out of range are passed over, and
 *    a row of logits that cannot be drawn from gets a negative id or rank.
 */
#ifndef LMI_KERNELS_H
#define LMI_KERNELS_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LMI_API __attribute__((visibility("default")))
#define LMI_ABI_VERSION 3

enum lmi_status_code { LMI_OK = 0, LMI_BAD_ARGUMENT = 1, LMI_UNSUPPORTED = 2, LMI_DEVICE_ERROR = 3, LMI_RANK_ERROR = 4 };
enum lmi_dtype { LMI_F32 = 0, LMI_BF16 = 1, LMI_F16 = 2, LMI_I32 = 3, LMI_I64 = 4, LMI_U8 = 5, LMI_U64 = 6, LMI_F8E4M3 = 7 };
enum lmi_activation_kind { LMI_IDENTITY = 0, LMI_SILU = 1, LMI_GELU = 2, LMI_GELU_TANH = 3, LMI_RELU = 4, LMI_QUICK_GELU = 5,
                           LMI_SOFT_CAP = 6, LMI_CLAMP = 7, LMI_SCALE = 8 }; /* the last three: lmi_activation's alone */
enum lmi_weight_format { LMI_DENSE = 0, LMI_INT8 = 1, LMI_INT4 = 2 };

/* F8E4M3 is for caches alone. A byte s eeee mmm is (-1)^s 2^(e-7) (1 + m/8), or (-1)^s 2^-6 m/8 where e is 0; 0x7f and 0xff are NaN and
 * nothing is infinite (E4M3 of OCP's 8-bit floating point). A float becomes the nearest of them, of two that are as near the one with
 * even m; what is beyond 448, infinities too, becomes 448 with its sign; NaN stays NaN. A cache holds x / scale of what is written
 * (divided in float, then rounded) and stands for scale times what it holds; keys and values have a scale each, finite and
 * above 0. Caches of other dtypes have no use for the scales. */

typedef int32_t lmi_status;
typedef void *lmi_stream; /* CUDA stream; NULL on a CPU, where a call has run when it returns */

typedef struct {
  void *data;
  int64_t size[4];
  int64_t stride[4]; /* in elements */
  int32_t dims;
  int32_t dtype;
} lmi_tensor;

/* ---- the library itself ---- */

LMI_API int32_t lmi_abi_version(void);
/* The sentence that belongs to this thread's last error; empty before the first one. */
LMI_API const char *lmi_error_message(void);
/* What was compiled in and what this machine chose, for people: "cpu avx512 (base avx2 avx512 avx512bf16 amx)". */
LMI_API const char *lmi_describe(void);
/* Number of threads that share an operation, from now on (1 to 256). Not while another thread is in a call. No effect on a device. */
LMI_API lmi_status lmi_set_threads(int32_t num_threads);
/* Caps the instruction set to "base", "avx2", "avx512", "avx512bf16", "amx" or, with "best", to what this machine has; LMI_UNSUPPORTED if
 * it lacks the level. Packed weights are the same at every level. On CUDA "best", "sm_80" (the kernels that every GPU runs) or
 * "sm_90a" (those for compute capability 9.0 too): that there is a device which runs this library. */
LMI_API lmi_status lmi_set_level(const char *level);

/* ---- norms ---- */

/* If residual is given: s = x + residual, residual := s (in place); else s = x.
 * out[t,e] = (weight[e] + weight_offset) * s[t,e] / sqrt(mean_e(s[t,e]^2) + eps) + addend[t,e]
 * s is rounded to x's dtype before it is used, as a separate addition would. In place. weight absent: 1, addend absent: 0.
 * out, x, residual, addend: [T,E]  weight: [E] */
typedef struct {
  lmi_tensor out, x, residual, weight, addend;
  float eps, weight_offset;
} lmi_rms_norm_args;
LMI_API lmi_status lmi_rms_norm(const lmi_rms_norm_args *args, lmi_stream stream);

/* As above, without an addend; out[t,e] = weight[e] * (s[t,e] - mean_e(s)) / sqrt(var_e(s) + eps) + bias[e]. weight, bias: [E] or absent. */
typedef struct {
  lmi_tensor out, x, residual, weight, bias;
  float eps;
} lmi_layer_norm_args;
LMI_API lmi_status lmi_layer_norm(const lmi_layer_norm_args *args, lmi_stream stream);

/* ---- caches of keys and values ---- */

/* [N,K,P,D] everywhere below. On a CPU the P x D numbers of a block and head lie in the order in which attention multiplies them, keys as
 * [D/2][P][2], values as [P/2][D][2]: P is a multiple of 16, and only the strides of N and K are free. */

/* ---- rotary embedding fused with the cache write ---- */

/* For each token t, with r = rows[t] and the first `2*half` entries of each head of q and k (half = cos.size[1]):
 *   interleaved 0:  (a, b) = (h[i], h[i+half])      interleaved 1:  (a, b) = (h[2i], h[2i+1])
 *   (a, b) := (a*cos[r,i] - b*sin[r,i], b*cos[r,i] + a*sin[r,i])
 * in place in q: [T,H,D]; the rotated k: [T,K,D] and v: [T,K,D] go to slot s = slots[t] of the caches [N,K,P,D]:
 *   cache[s / P, :, s % P, :]; s < 0 writes nothing. k itself is rotated in place too. The caches are of k's dtype, or both F8E4M3.
 * cos, sin: F32 [R,half], rows: I32 [T], or all three absent (no rotation). k, v, both caches and slots: I32 [T], or all absent (only q). q
 * absent: no q. An entry of rows outside of [0, R) or of slots from N*P on is refused. */
typedef struct {
  lmi_tensor q, k, v, cos, sin, rows, k_cache, v_cache, slots;
  int32_t interleaved;
  float k_scale, v_scale;
} lmi_rotary_args;
LMI_API lmi_status lmi_rotary(const lmi_rotary_args *args, lmi_stream stream);

/* ---- attention over blocks ---- */

/* Sequence b owns the query rows starts[b] .. starts[b+1]-1 and key_lengths[b] keys; key j is in block tables[b, j / P], slot j % P.
 * Query row i of L rows stands at position p = key_lengths[b] - L + i. With g = h / (H/K):
 *   s[j] = scale * q[i,h,:] . k[j,g,:];  s = soft_cap * tanh(s / soft_cap) if soft_cap > 0;
 *   s[j] += alibi[h] * (j - p)           if alibi is given:          F32 [H]
 *   s[j] += bias[bucket(j - p), h]       if relative_bias is given:  F32 [buckets,H], T5's bucket with max_distance;
 *                                        causal 0 uses half of the buckets for each direction
 *   key j counts if (causal == 0 or j <= p) and (window == 0 or p - window < j); out[i,h,:] = sum_j softmax(s)[j] v[j,g,:]
 * out, q: [T,H,D]; D a multiple of 8 up to 256; caches [N,K,P,D], of q's dtype, or both F8E4M3: then k is k_scale and v is v_scale times
 * what they hold, taken into scale and into the result; starts: I32 [B+1]; key_lengths: I32 [B];
 * tables: I32 [B,max_blocks], entries before the window may be negative. Keys are taken in tiles of 64 and splits of 512 that
 * are merged in ascending order. Where the processor multiplies BF16, softmax's weights are rounded to BF16 first. Cross attention:
 * causal 0, a table and lengths of the encoder's own. A row without keys gives 0.
 * At least 2 buckets (causal 0: 4), max_distance above the number of buckets for exact distances, half of a direction's. */
typedef struct {
  lmi_tensor out, q, k_cache, v_cache, starts, key_lengths, tables, alibi, relative_bias;
  float scale, soft_cap;
  int32_t causal, window, max_distance;
  float k_scale, v_scale;
} lmi_attention_args;
LMI_API lmi_status lmi_attention(const lmi_attention_args *args, lmi_stream stream);

/* ---- linear on packed weights ---- */

/* Bytes of a packed [F,E] weight, 64-byte aligned; 0 if the combination is unsupported. dtype is that of the dense weights, or of the
 * scales. group: inputs that share a scale (LMI_INT8, LMI_INT4; must divide E), 0 for LMI_DENSE. gated: see lmi_linear. */
LMI_API int64_t lmi_linear_packed_bytes(int64_t out_features, int64_t in_features, int32_t dtype, int32_t format, int64_t group,
                                        int32_t gated);

/* Writes rows [row_offset, row_offset + rows) of a weight [F,E] into its packed place; pieces of a fused weight are packed one by one.
 * LMI_DENSE:  w: [rows,E].
 * LMI_INT8, LMI_INT4: w: U8 [rows,E], one value a byte (0..255, 0..15); scales: [rows,E/group] in dtype; zeros: U8, same shape,
 *             of LMI_INT4 at most 16: the weight is (w - zero) * scale, in float; the scale may come after the group's sum.
 * Every row must be written before the weight is used; the bytes need no other initialisation. */
typedef struct {
  lmi_tensor packed, w, scales, zeros;
  int64_t out_features, in_features, row_offset, group;
  int32_t dtype, format, gated;
} lmi_linear_pack_args;
LMI_API lmi_status lmi_linear_pack(const lmi_linear_pack_args *args, lmi_stream stream);

/* y[t,f] = sum_e x[t,e] w[f,e] + bias[f] + addend[t,f]
 * gated 0: out[t,f] = act(y[t,f]) + residual[t,f]                        out: [T,F]
 * gated 1: out[t,f] = act(y[t,f]) * y[t,f + F/2] + residual[t,f]         out: [T,F/2]
 * packed: U8, as lmi_linear_pack wrote it with the same out_features (F), in_features (E), dtype, format, group, gated.
 * x: [T,E] in dtype; bias: [F] in dtype; addend: [T,F]; residual: out's shape; out, addend and residual are of x's dtype or F32. residual may
 * be out. One instruction sequence over E for every T. */
typedef struct {
  lmi_tensor out, x, packed, bias, addend, residual;
  int64_t out_features, in_features, group;
  int32_t dtype, format, gated, activation;
} lmi_linear_args;
LMI_API lmi_status lmi_linear(const lmi_linear_args *args, lmi_stream stream);

/* The same for X weights, packed one after the other at a distance of expert_bytes: rows starts[x] .. starts[x+1]-1 of x, out, addend
 * and residual belong to expert x. starts: I32 [X+1]. bias: [X,F]. */
typedef struct {
  lmi_linear_args linear;
  lmi_tensor starts;
  int64_t expert_bytes;
} lmi_grouped_linear_args;
LMI_API lmi_status lmi_grouped_linear(const lmi_grouped_linear_args *args, lmi_stream stream);

/* out[t,f] += scales[a] * sum_r b[a,f,r] * round(sum_e a[a,r,e] x[t,e]) with a = adapters[t]; a < 0 adds nothing. The inner sum is rounded to
 * x's dtype. a: [A,rank,E]  b: [A,F,rank]  scales: F32 [A]  adapters: I32 [T]  out: [T,F] of x's dtype or F32. */
typedef struct {
  lmi_tensor out, x, a, b, scales, adapters;
} lmi_lora_args;
LMI_API lmi_status lmi_lora(const lmi_lora_args *args, lmi_stream stream);

/* ---- activation, embedding ---- */

/* gated 0: out[t,f] = act(x[t,f])   x: [T,F], in place;   gated 1: out[t,f] = act(x[t,f]) * x[t,f+F]   x: [T,2F].
 * With c = parameter, that the others have no use for: soft cap is c tanh(x / c), clamp min(max(x, -c), c), both with c > 0; scale is c x. */
typedef struct {
  lmi_tensor out, x;
  int32_t activation, gated;
  float parameter;
} lmi_activation_args;
LMI_API lmi_status lmi_activation(const lmi_activation_args *args, lmi_stream stream);

/* out[t,:] = scale * table[ids[t] - first_id, :] (+ residual[t,:]), with 0 for an id outside of the table (another rank's). ids: I32 [T]
 * table: [V,E]  residual: [T,E] */
typedef struct {
  lmi_tensor out, ids, table, residual;
  int64_t first_id;
  float scale;
} lmi_embedding_args;
LMI_API lmi_status lmi_embedding(const lmi_embedding_args *args, lmi_stream stream);

/* ---- mixture of experts ---- */

/* p = softmax(logits[t,:]); the top_k largest (ties: lowest expert) with weights p, divided by their sum if renormalize. Then the T*top_k
 * pairs are ordered by expert, then by pair: order[i] = pair (t*top_k + j), starts[x] = first i of expert x.
 * logits: [T,X]; weights: F32 [T,top_k]; experts: I32 [T,top_k]; order: I32 [T*top_k]; starts: I32 [X+1]. */
typedef struct {
  lmi_tensor logits, weights, experts, order, starts;
  int32_t renormalize;
} lmi_moe_route_args;
LMI_API lmi_status lmi_moe_route(const lmi_moe_route_args *args, lmi_stream stream);

/* out[i,:] = x[order[i] / top_k, :]      out: [T*top_k,E]  x: [T,E]  order: I32 [T*top_k] */
typedef struct {
  lmi_tensor out, x, order;
} lmi_moe_gather_args;
LMI_API lmi_status lmi_moe_gather(const lmi_moe_gather_args *args, lmi_stream stream);

/* out[t,:] = sum_j weights[t,j] * y[place of pair t*top_k+j in order, :] (+ residual[t,:]), j ascending.   y: [T*top_k,E]  out: [T,E] */
typedef struct {
  lmi_tensor out, y, weights, order, residual;
} lmi_moe_combine_args;
LMI_API lmi_status lmi_moe_combine(const lmi_moe_combine_args *args, lmi_stream stream);

/* ---- sampling ---- */

/* In place on logits: F32 [R,V], in this order. Row r's history is entries history_starts[r] .. history_starts[r+1]-1 of history_ids (each id
 * once) with history_counts (how often it was generated; 0: it stands only in the prompt):
 *   l = l > 0 ? l / repetition[r] : l * repetition[r]      for every id of the history
 *   l -= frequency[r] * count + presence[r] * (count > 0)
 * then l += bias_values[i] for bias_ids[i], i in bias_starts[r] .. bias_starts[r+1]-1.
 * history_*: I32; repetition, presence, frequency: F32 [R]; bias_starts, bias_ids: I32; bias_values: F32. Either group may be absent. */
typedef struct {
  lmi_tensor logits, history_starts, history_ids, history_counts, repetition, presence, frequency;
  lmi_tensor bias_starts, bias_ids, bias_values;
} lmi_penalize_args;
LMI_API lmi_status lmi_penalize(const lmi_penalize_args *args, lmi_stream stream);

/* ids[r] = argmax of logits[r,:] (ties: lowest id) where temperature[r] == 0. Else, with l = (logits - max) / temperature, 0 for the max
 * though it be infinite, tokens are left out by, in this order, each on what the one before has left, renormalised:
 *   top_k > 0:    all but the top_k largest (ties at the border stay)
 *   top_p < 1:    all but the most probable ones whose sum first reaches top_p (at least one; ties at the border stay)
 *   typical_p < 1: all but those with |-log p - entropy| smallest whose sum first reaches typical_p (at least one; ties stay)
 *   min_p > 0:    those with p < min_p * max p
 * and ids[r] = argmax_v (l[v] + gumbel(v)), gumbel(v) = -log(-log(u)), u = (x + 0.5) * 2^-32,
 * x = word 0 of Philox-4x32-10 (Salmon et al. 2011) with key (seed & 0xffffffff, seed >> 32) and counter (v, position, 0, 0).
 * logits: F32 [R,V]; temperature, top_p, typical_p, min_p: F32 [R]; top_k: I32 [R]; seeds: U64 [R]; positions, ids: I32 [R]. logits is scratch.
 * The id is -1 for a row with a NaN or without a logit above -infinity. */
typedef struct {
  lmi_tensor logits, temperature, top_k, top_p, typical_p, min_p, seeds, positions, ids;
} lmi_sample_args;
LMI_API lmi_status lmi_sample(const lmi_sample_args *args, lmi_stream stream);

/* log_softmax(logits[r,:]): of ids[r] in values[r], its rank (number of larger logits) in ranks[r], and of the `top` largest (ties: lowest id)
 * in top_values, top_ids: [R,top], descending. logits: F32 [R,V], unchanged; values, top_values: F32; ids, ranks, top_ids: I32. top absent: none.
 * For such a row, and an id that is not 0 to V-1, the value is NaN and the rank -1, and nothing is told of the largest. */
typedef struct {
  lmi_tensor logits, ids, values, ranks, top_values, top_ids;
} lmi_logprobs_args;
LMI_API lmi_status lmi_logprobs(const lmi_logprobs_args *args, lmi_stream stream);

/* ---- a recorded forward ---- */

/* One call: the address of a function above or below that takes an argument struct, and the struct. */
typedef struct {
  void *operation, *args;
} lmi_call;

/* Runs the calls in order, up to the first that does not return LMI_OK, and returns what the last one did. Structs and all that they point
 * to are read anew each time. */
LMI_API lmi_status lmi_replay(const lmi_call *calls, int64_t num_calls, lmi_stream stream);

/* ---- between the ranks of one machine ---- */

/* One rank's view of a segment of shared memory, lmi_link_bytes(size) long, that all ranks have mapped; zeros at first. Rank r holds the
 * write lock (fcntl) of byte r of the segment's file fd while it lives. Who waits looks `spins` times and then sleeps; nobody waits
 * for a rank that has ended or has dropped the step, but gets LMI_RANK_ERROR. */
typedef struct {
  void *memory;
  int32_t rank, size, fd, spins;
} lmi_link;

LMI_API int64_t lmi_link_bytes(int32_t size);
/* Begins a step, in which all ranks make the same calls: rank 0 first, with turn 0; the others pass what rank 0 has got. */
LMI_API int64_t lmi_link_begin(const lmi_link *link, int64_t turn);
/* This rank will not go on with its step; the others' calls fail with the reason, until they begin the next. */
LMI_API lmi_status lmi_link_drop(const lmi_link *link, const char *reason);

/* x := sum over all ranks of their x, in place, added in rank order in float and rounded once: equal bits on every rank. The shape is
 * the same on all of them. x: any shape without gaps, on a CPU. */
typedef struct {
  lmi_link link;
  lmi_tensor x;
} lmi_all_reduce_args;
LMI_API lmi_status lmi_all_reduce(const lmi_all_reduce_args *args, lmi_stream stream);

/* out[:, starts[r] .. starts[r+1]-1] := x of rank r.    x: F32 [R, columns of this rank], without gaps; starts: I32 [size+1], the same on all
 * ranks; out: F32 [R,V] on rank 0, absent on the others, which return when rank 0 has all. */
typedef struct {
  lmi_link link;
  lmi_tensor out, x, starts;
} lmi_gather_args;
LMI_API lmi_status lmi_gather(const lmi_gather_args *args, lmi_stream stream);

/* ---- between the GPUs of one machine ---- */

/* This rank's part of what 2 to 8 ranks with a GPU each share: memory on the device in use, where the others read its messages of up to
 * max_bytes. Writes a handle of 64 bytes, by which they map it. NULL where it cannot be, and lmi_error_message() says why. It is there while
 * the process is. */
LMI_API void *lmi_peers_create(int32_t rank, int32_t size, int64_t max_bytes, void *handle);
/* Maps the memory of the others; handles: those of all ranks in order. */
LMI_API lmi_status lmi_peers_map(void *peers, void *handles);

/* As lmi_all_reduce, by the GPUs themselves. All ranks make the same calls in the same order. x: any shape without gaps, of up to
 * max_bytes. A call waits on the device for all ranks to make theirs. */
typedef struct {
  void *peers;
  lmi_tensor x;
} lmi_peer_all_reduce_args;
LMI_API lmi_status lmi_peer_all_reduce(const lmi_peer_all_reduce_args *args, lmi_stream stream);

#ifdef __cplusplus
}
#endif
#endif
