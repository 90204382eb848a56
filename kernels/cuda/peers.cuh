/* What the ranks of one machine share, a GPU each: every rank has memory that the others have mapped. Its layout: for each block of a
 * kernel the number of calls so far, then a flag for each block and rank, then two halves with an area for each block. */
#pragma once
#include "cuda/device.cuh"

namespace lmi {

constexpr int kMaxRanks = 8;    /* that one NVLink switch or one mainboard joins */
constexpr int kPeerBlocks = 32; /* of a kernel */
constexpr int kPeerThreads = 512;
constexpr int64_t kPackBytes = 16;
constexpr int64_t kPeerFlagBytes = int64_t{kPeerBlocks} * (1 + kMaxRanks) * 4; /* numbers of calls and flags */

struct Peers {
  char *memory[kMaxRanks]; /* of each rank; its own too */
  int rank, size;
  int64_t max_bytes, area_bytes;

  /* Calls so far of this block, whose number is the same on all ranks. */
  __device__ __forceinline__ uint32_t *calls() const { return reinterpret_cast<uint32_t *>(memory[rank]) + blockIdx.x; }
  /* In the memory of rank `of`: the last call in which this block of rank `from` has written its part. */
  __device__ __forceinline__ uint32_t *flag(int of, int from) const {
    return reinterpret_cast<uint32_t *>(memory[of]) + kPeerBlocks + blockIdx.x * kMaxRanks + from;
  }
  /* Where this block of rank `of` writes its part of a call. */
  __device__ __forceinline__ char *area(int of, uint32_t call) const {
    return memory[of] + kPeerFlagBytes + (static_cast<int64_t>(call % 2) * kPeerBlocks + blockIdx.x) * area_bytes;
  }

  int64_t num_bytes() const { return kPeerFlagBytes + 2 * kPeerBlocks * area_bytes; }
};

static_assert(kPeerFlagBytes % kPackBytes == 0, "areas begin at packs");

}  // namespace lmi
