/* Rows of a table by id. A row of out belongs to one thread. */
#include <cstring>

#include "common/arguments.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

void copy_scaled(const lmi_embedding_args &args, int64_t from, int64_t to, float *row) {
  read_row(args.table, from, row);
  for (int64_t e = 0; e < args.table.size[1]; ++e) row[e] *= args.scale;
  write_row(row, args.out, to);
}

}  // namespace

void embedding(const lmi_embedding_args &args) {
  check_arguments(args);
  const int64_t num_rows = args.table.size[0], num = args.table.size[1];
  const size_t row_bytes = static_cast<size_t>(num * bytes_of(args.table.dtype));
  parallel_for(args.ids.size[0], rows_a_share(num), [&](int64_t begin, int64_t end) {
    Floats row(num);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = integers(args.ids)[t] - args.first_id;
      if (from < 0 || from >= num_rows) {
        std::memset(at(args.out, t), 0, row_bytes);
      } else if (args.scale == 1.0f) {
        std::memcpy(at(args.out, t), at(args.table, from), row_bytes);
      } else {
        copy_scaled(args, from, t, row);
      }
    }
  });
}

}  // namespace lmi::LMI_LEVEL
