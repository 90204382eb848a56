/* Memory that the GPUs of one machine map, from each other's processes. Made once for a process, which keeps it. */
#include "cuda/peers.cuh"

#include <cstring>
#include <memory>

#include "common/status.h"
#include "cuda/memory.cuh"

namespace {

using lmi::Peers;

#if defined(LMI_SIM)

constexpr size_t kHandleBytes = lmi::sim::kHandleBytes;

char *allocate(int64_t num_bytes, void *handle) { return lmi::sim::create_shared_memory(static_cast<size_t>(num_bytes), handle); }

char *map(int64_t num_bytes, const char *handle) { return lmi::sim::map_shared_memory(static_cast<size_t>(num_bytes), handle); }

#else

constexpr size_t kHandleBytes = sizeof(cudaIpcMemHandle_t);

char *allocate(int64_t num_bytes, void *handle) {
  void *memory = nullptr;
  cudaIpcMemHandle_t own;
  lmi::check_cuda(cudaMalloc(&memory, static_cast<size_t>(num_bytes)), "memory for other ranks");
  lmi::check_cuda(cudaMemset(memory, 0, static_cast<size_t>(num_bytes)), "memory for other ranks");
  lmi::check_cuda(cudaDeviceSynchronize(), "memory for other ranks"); /* nobody is to see it before */
  lmi::check_cuda(cudaIpcGetMemHandle(&own, memory), "a handle for other ranks");
  std::memcpy(handle, &own, sizeof own);
  return static_cast<char *>(memory);
}

char *map(int64_t, const char *handle) {
  void *memory = nullptr;
  cudaIpcMemHandle_t other;
  std::memcpy(&other, handle, sizeof other);
  lmi::check_cuda(cudaIpcOpenMemHandle(&memory, other, cudaIpcMemLazyEnablePeerAccess), "another GPU's memory cannot be mapped");
  return static_cast<char *>(memory);
}

#endif

static_assert(kHandleBytes == 64, "as the header says");

}  // namespace

void *lmi_peers_create(int32_t rank, int32_t size, int64_t max_bytes, void *handle) {
  auto peers = std::make_unique<Peers>();
  const lmi_status status = lmi::guard("peers_create", [&] {
    lmi::check_range("size", size, 2, lmi::kMaxRanks);
    lmi::check_range("rank", rank, 0, size - 1);
    lmi::check_range("max_bytes", max_bytes, 1, int64_t{1} << 30);
    constexpr int64_t kRoundBytes = lmi::kPeerThreads * lmi::kPackBytes; /* that a block takes at once */
    peers->rank = rank;
    peers->size = size;
    peers->max_bytes = max_bytes;
    peers->area_bytes = lmi::ceil_div(max_bytes, lmi::kPeerBlocks * kRoundBytes) * kRoundBytes;
    peers->memory[rank] = allocate(peers->num_bytes(), handle);
  });
  return status == LMI_OK ? peers.release() : nullptr;
}

lmi_status lmi_peers_map(void *created, void *handles) {
  return lmi::guard("peers_map", [&] {
    Peers &peers = *static_cast<Peers *>(created);
    for (int r = 0; r < peers.size; ++r) {
      if (r != peers.rank) peers.memory[r] = map(peers.num_bytes(), static_cast<const char *>(handles) + r * kHandleBytes);
    }
  });
}
