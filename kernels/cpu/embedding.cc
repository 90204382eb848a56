/* Rows of a table by id, and what is added to them. A row of out belongs to one thread. */
#include <algorithm>
#include <cstring>

#include "common/arguments.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

/* from: a row of the table, or -1 for zeros. row, other: scratch. */
void write_sum(const lmi_embedding_args &args, int64_t from, int64_t to, float *row, float *other) {
  const int64_t num = args.table.size[1];
  if (from < 0) std::fill(row, row + num, 0.0f);
  else read_row(args.table, from, row);
  for (int64_t e = 0; e < num; ++e) row[e] *= args.scale;
  if (is_given(args.residual)) {
    read_row(args.residual, to, other);
    for (int64_t e = 0; e < num; ++e) row[e] += other[e];
  }
  write_row(row, args.out, to);
}

}  // namespace

void embedding(const lmi_embedding_args &args) {
  check_arguments(args);
  const int64_t num_rows = args.table.size[0], num = args.table.size[1];
  const size_t row_bytes = static_cast<size_t>(num * bytes_of(args.table.dtype));
  parallel_for(args.ids.size[0], rows_a_share(num), [&](int64_t begin, int64_t end) {
    Floats row(num), other(num);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = integers(args.ids)[t] - args.first_id;
      const bool is_ours = from >= 0 && from < num_rows;
      if (is_given(args.residual) || (is_ours && args.scale != 1.0f)) {
        write_sum(args, is_ours ? from : -1, t, row, other);
      } else if (is_ours) {
        std::memcpy(at(args.out, t), at(args.table, from), row_bytes);
      } else {
        std::memset(at(args.out, t), 0, row_bytes);
      }
    }
  });
}

}  // namespace lmi::LMI_LEVEL
