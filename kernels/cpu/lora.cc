/* Low-rank adapters, each token with its own. A token belongs to one thread. */
#include "common/arguments.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

/* inner[r] = round(sum_e a[adapter,r,e] x[e]), rounded to x's dtype. */
void project_down(const lmi_lora_args &args, int64_t adapter, const float *x, float *weights, float *inner) {
  const int64_t rank = args.a.size[1], num_inputs = args.a.size[2];
  for (int64_t r = 0; r < rank; ++r) {
    read_floats(at(args.a, adapter, r), args.a.dtype, num_inputs, weights);
    inner[r] = dot(weights, x, num_inputs);
  }
  round_floats(inner, args.x.dtype, rank);
}

/* out[f] += scale * sum_r b[adapter,f,r] inner[r] */
void project_up(const lmi_lora_args &args, int64_t adapter, const float *inner, float *weights, float *out) {
  const int64_t num_outputs = args.b.size[1], rank = args.b.size[2];
  const float scale = static_cast<const float *>(args.scales.data)[adapter];
  for (int64_t f = 0; f < num_outputs; ++f) {
    read_floats(at(args.b, adapter, f), args.b.dtype, rank, weights);
    out[f] += scale * dot(weights, inner, rank);
  }
}

}  // namespace

void lora(const lmi_lora_args &args) {
  check_arguments(args);
  check_entries("an entry of adapters", args.adapters, INT32_MIN, args.a.size[0] - 1);
  const int64_t num_inputs = args.x.size[1], num_outputs = args.out.size[1], rank = args.a.size[1];
  parallel_for(args.x.size[0], rows_a_share(rank * (num_inputs + num_outputs)), [&](int64_t begin, int64_t end) {
    Floats x(num_inputs), out(num_outputs), inner(rank), weights(num_inputs > rank ? num_inputs : rank);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t adapter = integers(args.adapters)[t];
      if (adapter < 0) continue;
      read_row(args.x, t, x);
      read_row(args.out, t, out);
      project_down(args, adapter, x, weights, inner);
      project_up(args, adapter, inner, weights, out);
      write_row(out, args.out, t);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
