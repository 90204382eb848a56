/* The table of one instruction level. */
#include "common/operations.h"

#include "common/level.h"

namespace lmi::LMI_LEVEL {

#define LMI_DECLARE(name) void name(const lmi_##name##_args &args);
LMI_OPERATIONS(LMI_DECLARE)
#undef LMI_DECLARE

#define LMI_ENTRY(name) name,
extern const Operations operations = {LMI_OPERATIONS(LMI_ENTRY)};
#undef LMI_ENTRY

}  // namespace lmi::LMI_LEVEL
