/* What the library exports: the header's functions, each handed on to the instruction level that was chosen, with errors
 * turned into a status and a message of this thread. */
#include <cstring>
#include <string>

#if defined(LMI_HAS_AMX) && !defined(LMI_AMX_TWIN)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/link.h"
#include "common/operations.h"
#include "common/status.h"
#include "common/threads.h"
#include "cpu/linear_layout.h"
#include "lmi_kernels.h"

namespace {

using lmi::Operations;

struct Level {
  const char *name;
  const Operations *operations;
  bool (*runs_here)();
};

bool always() { return true; }

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(LMI_HAS_AMX) && !defined(LMI_AMX_TWIN)
/* The processor has tiles of bf16, and the system lends this process their registers. */
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kAskForState = 0x1023, kTileData = 18; /* ARCH_REQ_XCOMP_PERM */
  unsigned a, b, c, d;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kBf16) && (d & kTiles) && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

const Level kLevels[] = {
    {"base", &lmi::base::operations, always},
#if defined(LMI_AMX_TWIN)
    {"amx-emulated", &lmi::amx::operations, always}, /* before those that are better: it is not meant for use */
#endif
#if defined(LMI_HAS_AVX2)
    {"avx2", &lmi::avx2::operations, has_avx2},
#endif
#if defined(LMI_HAS_AVX512)
    {"avx512", &lmi::avx512::operations, has_avx512},
#endif
#if defined(LMI_HAS_AVX512BF16)
    {"avx512bf16", &lmi::avx512bf16::operations, has_avx512bf16},
#endif
#if defined(LMI_HAS_AMX) && !defined(LMI_AMX_TWIN)
    {"amx", &lmi::amx::operations, has_amx},
#endif
};

const Level *best_level() {
  const Level *best = kLevels;
  for (const Level &level : kLevels) {
    if (level.runs_here()) best = &level;
  }
  return best;
}

const Level *chosen = best_level();

void choose_level(const char *name) {
  if (!name) lmi::refuse("level is absent; it must be base, avx2, avx512, avx512bf16, amx or best");
  if (!std::strcmp(name, "best")) {
    chosen = best_level();
    return;
  }
  for (const Level &level : kLevels) {
    if (!std::strcmp(name, level.name) && level.runs_here()) {
      chosen = &level;
      return;
    }
  }
  throw lmi::Error(LMI_UNSUPPORTED, std::string("level ") + name + " is not in this library or not in this machine");
}

}  // namespace

int32_t lmi_abi_version(void) { return LMI_ABI_VERSION; }

const char *lmi_error_message(void) { return lmi::last_message().c_str(); }

const char *lmi_describe(void) {
  static thread_local std::string text;
  text = std::string("cpu ") + chosen->name + " (";
  for (const Level &level : kLevels) text += (&level == kLevels ? "" : " ") + std::string(level.name);
  text += ")";
  return text.c_str();
}

lmi_status lmi_set_threads(int32_t num_threads) {
  return lmi::guard("set_threads", [&] {
    lmi::check_range("num_threads", num_threads, 1, 256);
    lmi::set_threads(num_threads);
  });
}

lmi_status lmi_set_level(const char *level) {
  return lmi::guard("set_level", [&] { choose_level(level); });
}

int64_t lmi_linear_packed_bytes(int64_t out_features, int64_t in_features, int32_t dtype, int32_t format, int64_t group,
                                int32_t gated) {
  return lmi::packed_bytes({out_features, in_features, group, dtype, format, gated});
}

int64_t lmi_link_bytes(int32_t size) { return lmi::Link::bytes(size); }

int64_t lmi_link_begin(const lmi_link *link, int64_t turn) { return lmi::Link(*link).begin(turn); }

lmi_status lmi_link_drop(const lmi_link *link, const char *reason) {
  return lmi::guard("link_drop", [&] { lmi::Link(*link).drop(reason); });
}

#define LMI_EXPORT(name)                                                              \
  lmi_status lmi_##name(const lmi_##name##_args *args, lmi_stream) {                  \
    return lmi::guard(#name, [&] {                                                         \
      lmi::require(args != nullptr, "the argument struct is absent");                 \
      chosen->operations->name(*args);                                                \
    });                                                                               \
  }
LMI_OPERATIONS(LMI_EXPORT)
#undef LMI_EXPORT

/* ---- what is for GPUs alone ---- */

namespace {

lmi_status refuse_peers(const char *operation) {
  return lmi::guard(operation, [] { throw lmi::Error(LMI_UNSUPPORTED, "this column has no GPUs; ranks share a link (lmi_all_reduce)"); });
}

}  // namespace

void *lmi_peers_create(int32_t, int32_t, int64_t, void *) {
  refuse_peers("peers_create");
  return nullptr;
}

lmi_status lmi_peers_map(void *, void *) { return refuse_peers("peers_map"); }

lmi_status lmi_peer_all_reduce(const lmi_peer_all_reduce_args *, lmi_stream) { return refuse_peers("peer_all_reduce"); }
