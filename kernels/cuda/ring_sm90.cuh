/* A ring of places in shared memory that one warp has the copy engine fill and groups of four warps empty by wgmma (sm_90a). Step i
 * is in place i % kSlots; steps go on as long as the block lives. */
#pragma once
#include "cuda/ptx_sm90.cuh"

namespace lmi::cuda {

template <int kSlots>
struct RingBarriers {
  uint64_t full[kSlots], empty[kSlots];
};

template <int kSlots>
class Ring {
 public:
  /* places: shared address, on a border of 1024 bytes as slot_bytes */
  __device__ Ring(uint32_t places, int slot_bytes, RingBarriers<kSlots> &barriers)
      : places_(places), barriers_(ptx::shared_address(&barriers)), slot_bytes_(slot_bytes) {}

  /* For one thread, before all meet. num_warps: that release each step. */
  __device__ void init(int num_warps) const {
    for (int slot = 0; slot < kSlots; ++slot) {
      ptx::init_mbarrier(full(slot), 1);
      ptx::init_mbarrier(empty(slot), num_warps);
    }
    ptx::fence_mbarriers();
  }

  __device__ __forceinline__ uint32_t place(unsigned step) const { return places_ + step % kSlots * slot_bytes_; }
  __device__ __forceinline__ uint32_t full(unsigned step) const { return barriers_ + step % kSlots * 8; }
  __device__ __forceinline__ uint32_t empty(unsigned step) const { return barriers_ + (kSlots + step % kSlots) * 8; }

  __device__ __forceinline__ void await_full(unsigned step) const { ptx::wait_mbarrier(full(step), step / kSlots & 1); }
  __device__ __forceinline__ void await_empty(unsigned step) const { ptx::wait_mbarrier(empty(step), (step / kSlots & 1) ^ 1); }
  /* For each warp that has done with a step. */
  __device__ __forceinline__ void release(unsigned step) const {
    if (threadIdx.x % 32 == 0) ptx::arrive_mbarrier(empty(step));
  }

 private:
  const uint32_t places_, barriers_;
  const int slot_bytes_;
};

}  // namespace lmi::cuda
