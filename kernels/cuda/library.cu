/* What the library exports: the header's functions, with errors turned into a status and a message of this thread. The same source
 * is the column on a GPU and its stand-in on a CPU. The "level" is which GPU's kernels may run, on the stand-in with the order of
 * threads. */
#include <string>

#include "common/link.h"
#include "common/status.h"
#include "common/threads.h"
#include "cuda/linear_layout.h"
#include "cuda/operations.cuh"

namespace {

using lmi::guard;

/* False if there is no such architecture. */
bool allow(const std::string &name) {
  if (name != "sm_80" && name != "sm_90a") return false;
  lmi::allow_architecture(name == "sm_80" ? lmi::Architecture::kSm80 : lmi::Architecture::kSm90a);
  return true;
}

#if defined(LMI_SIM)

/* best, ORDER (with the kernels of sm_80), or ARCHITECTURE ORDER */
void choose_level(const char *level) {
  const std::string name = level && std::string(level) == "best" ? "sm_90a forward" : level ? level : "";
  const size_t blank = name.find(' ');
  const std::string order = blank == std::string::npos ? name : name.substr(blank + 1);
  if (lmi::sim::set_order(order) && allow(blank == std::string::npos ? "sm_80" : name.substr(0, blank))) return;
  throw lmi::Error(LMI_UNSUPPORTED, "level " + name + " is not an order of threads (forward, reverse, random or random:SEED) after sm_80 or sm_90a");
}

std::string describe() {
  const char *const architecture = lmi::has_sm90a() ? "sm_90a" : "sm_80";
  return std::string("sim ") + architecture + " " + lmi::sim::order_name() + " (forward reverse random)";
}

#else

constexpr int kLeastCapability = 80;

/* The device in use, if it runs this library. Throws with what stands against it. */
cudaDeviceProp device_in_use() {
  int device = 0, driver = 0;
  cudaDeviceProp properties;
  cudaDriverGetVersion(&driver);
  if (driver == 0) throw lmi::Error(LMI_UNSUPPORTED, "there is no NVIDIA driver; install one, or use device=cpu");
  lmi::check_cuda(cudaGetDevice(&device), "the GPU cannot be used");
  lmi::check_cuda(cudaGetDeviceProperties(&properties, device), "the GPU cannot be used");
  const int capability = 10 * properties.major + properties.minor;
  if (capability >= kLeastCapability) return properties;
  throw lmi::Error(LMI_UNSUPPORTED, std::string(properties.name) + " has compute capability " + std::to_string(properties.major) + "." +
                                        std::to_string(properties.minor) + "; these kernels need 8.0 or later; use device=cpu");
}

void choose_level(const char *level) {
  const std::string name = level ? level : "";
  device_in_use();
  if (!allow(name == "best" ? "sm_90a" : name)) {
    throw lmi::Error(LMI_UNSUPPORTED, "level " + name + " is not in this library: it has best, sm_80 and sm_90a");
  }
  if (name == "sm_90a" && !lmi::has_sm90a()) {
    throw lmi::Error(LMI_UNSUPPORTED, "level sm_90a needs compute capability 9.0 and a library with kernels for it, not one of " LMI_ARCHITECTURES);
  }
}

std::string describe() {
  try {
    const cudaDeviceProp device = device_in_use();
    const std::string name = "cuda " + std::string(device.name) + " sm_" + std::to_string(10 * device.major + device.minor);
    return name + (lmi::has_sm90a() ? ", prompts by wgmma (" : " (") + LMI_ARCHITECTURES ")";
  } catch (const lmi::Error &) {
    return "cuda without a GPU (" LMI_ARCHITECTURES ")";
  }
}

#endif

}  // namespace

int32_t lmi_abi_version(void) { return LMI_ABI_VERSION; }

const char *lmi_error_message(void) { return lmi::last_message().c_str(); }

const char *lmi_describe(void) {
  static thread_local std::string text;
  text = describe();
  return text.c_str();
}

lmi_status lmi_set_threads(int32_t num_threads) {
  return guard("set_threads", [&] {
    lmi::check_range("num_threads", num_threads, 1, 256);
    lmi::set_threads(num_threads); /* of what ranks do together */
  });
}

lmi_status lmi_set_level(const char *level) {
  return guard("set_level", [&] { choose_level(level); });
}

int64_t lmi_linear_packed_bytes(int64_t out_features, int64_t in_features, int32_t dtype, int32_t format, int64_t group,
                                int32_t gated) {
  return lmi::cuda::packed_bytes({out_features, in_features, group, dtype, format, gated});
}

#define LMI_EXPORT(name)                                                                     \
  lmi_status lmi_##name(const lmi_##name##_args *args, lmi_stream stream) {                  \
    return guard(#name, [&] {                                                                \
      lmi::require(args != nullptr, "the argument struct is absent");                        \
      lmi::cuda::name(*args, static_cast<cudaStream_t>(stream));                             \
    });                                                                                      \
  }
LMI_MODEL_OPERATIONS(LMI_EXPORT)
LMI_EXPORT(peer_all_reduce)
#undef LMI_EXPORT

int64_t lmi_link_bytes(int32_t size) { return lmi::Link::bytes(size); }

int64_t lmi_link_begin(const lmi_link *link, int64_t turn) { return lmi::Link(*link).begin(turn); }

lmi_status lmi_link_drop(const lmi_link *link, const char *reason) {
  return guard("link_drop", [&] { lmi::Link(*link).drop(reason); });
}

#define LMI_EXPORT(name)                                                                     \
  lmi_status lmi_##name(const lmi_##name##_args *args, lmi_stream) {                         \
    return guard(#name, [&] {                                                                \
      lmi::require(args != nullptr, "the argument struct is absent");                        \
      lmi::base::name(*args);                                                                \
    });                                                                                      \
  }
LMI_RANK_OPERATIONS(LMI_EXPORT)
#undef LMI_EXPORT

#if defined(LMI_SIM)
#include "sim/counters.h"

/* For tests, not in the header: counts from now on (or no more), and gives what was counted so far. */
extern "C" LMI_API void lmi_sim_count(int32_t is_counting) {
  lmi::sim::is_counting = is_counting != 0;
  lmi::sim::counters = {};
}

/* For tests: names of the kernels that were launched since the last time, with commas between. */
extern "C" LMI_API const char *lmi_sim_launched(void) {
  static std::string names;
  names = std::exchange(lmi::sim::launched, {});
  return names.c_str();
}

extern "C" LMI_API void lmi_sim_counted(uint64_t *bank_conflicts, uint64_t *sectors_touched, uint64_t *sectors_needed) {
  *bank_conflicts = lmi::sim::counters.bank_conflicts;
  *sectors_touched = lmi::sim::counters.sectors_touched;
  *sectors_needed = lmi::sim::counters.sectors_needed;
}
#endif
