/* Activation of a matrix, alone or as the gate of its other half. A row belongs to one thread. */
#include "common/activate.h"
#include "common/arguments.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {

void activation(const lmi_activation_args &args) {
  check_arguments(args);
  const int64_t width = args.x.size[1], num = args.gated ? width / 2 : width;
  parallel_for(args.x.size[0], rows_a_share(4 * width), [&](int64_t begin, int64_t end) {
    Floats row(width);
    for (int64_t t = begin; t < end; ++t) {
      read_row(args.x, t, row);
      activate(row, num, args.activation, args.parameter);
      if (args.gated) {
        for (int64_t f = 0; f < num; ++f) row[f] *= row[num + f];
      }
      write_row(row, args.out, t);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
