/* The sum over ranks of a small message, by each rank for itself: a block writes its part where all ranks can read it, tells every
 * rank, waits for all of them and adds up theirs in rank order. A block keeps to areas of its own, two in turn: a rank that tells of
 * call n + 1 has read all of call n, so that call n + 2 may write there, and one wait a call is enough. The number of the call stands
 * in the device's memory, so that a CUDA graph can replay it. Bound by what passes between two GPUs: once there, once back. */
#include "cuda/memory.cuh"
#include "cuda/operations.cuh"
#include "cuda/peers.cuh"
#include "cuda/ptx.cuh"

namespace lmi::cuda {
namespace {

/* A message of num elements, in packs of kNum of which the last may be cut short. */
template <class T>
struct Message {
  static constexpr int kNum = kPackBytes / sizeof(T);
  T *data;
  int64_t num;
  bool is_aligned;

  __device__ __forceinline__ bool is_whole(int64_t pack) const { return is_aligned && (pack + 1) * kNum <= num; }
  __device__ __forceinline__ Pack<T, kNum> load(int64_t pack) const {
    if (is_whole(pack)) return load_pack<kNum>(data + pack * kNum);
    Pack<T, kNum> part{};
    for (int i = 0; i < kNum && pack * kNum + i < num; ++i) part.at[i] = data[pack * kNum + i];
    return part;
  }
  __device__ __forceinline__ void store(int64_t pack, const Pack<T, kNum> &from) const {
    if (is_whole(pack)) return store_pack<kNum>(data + pack * kNum, from);
    for (int i = 0; i < kNum && pack * kNum + i < num; ++i) data[pack * kNum + i] = from.at[i];
  }
};

/* For other GPUs to read once it is released. */
template <class T, int kNum>
__device__ __forceinline__ void publish(T *to, const Pack<T, kNum> &pack) {
#if defined(LMI_SIM)
  sim::store_late(to, &pack, sizeof pack);
#else
  store_pack<kNum>(to, pack);
#endif
}

/* One pack of every rank, rank 0 first. All are on their way before the first is needed. */
template <class T, int kNum>
__device__ __forceinline__ Pack<T, kNum> add_up(const Peers &peers, uint32_t call, int64_t place) {
  Pack<T, kNum> terms[kMaxRanks];
#pragma unroll
  for (int r = 0; r < kMaxRanks; ++r) {
    if (r < peers.size) terms[r] = load_pack<kNum>(reinterpret_cast<const T *>(peers.area(r, call)) + place * kNum);
  }
  Pack<T, kNum> sum;
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
    float total = to_float(terms[0].at[i]);
#pragma unroll
    for (int r = 1; r < kMaxRanks; ++r) {
      if (r < peers.size) total += to_float(terms[r].at[i]);
    }
    sum.at[i] = from_float<T>(total);
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kPeerThreads) all_reduce_kernel(const __grid_constant__ Peers peers, Message<T> message) {
  constexpr int kNum = Message<T>::kNum;
  const uint32_t call = *peers.calls() + 1;
  const int64_t num_packs = (message.num + kNum - 1) / kNum, step = int64_t{gridDim.x} * kPeerThreads;
  const int64_t first = int64_t{blockIdx.x} * kPeerThreads + threadIdx.x;
  T *const mine = reinterpret_cast<T *>(peers.area(peers.rank, call));
  for (int64_t pack = first, place = threadIdx.x; pack < num_packs; pack += step, place += kPeerThreads) {
    publish(mine + place * kNum, message.load(pack));
  }
  __syncthreads();
  const int other = static_cast<int>(threadIdx.x);
  if (other < peers.size) {
    ptx::release_system(peers.flag(other, peers.rank), call);
    ptx::await_system(peers.flag(peers.rank, other), call);
  }
  __syncthreads();
  for (int64_t pack = first, place = threadIdx.x; pack < num_packs; pack += step, place += kPeerThreads) {
    message.store(pack, add_up<T, kNum>(peers, call, place));
  }
  if (threadIdx.x == 0) *peers.calls() = call;
}

}  // namespace

void peer_all_reduce(const lmi_peer_all_reduce_args &args, cudaStream_t stream) {
  require(args.peers != nullptr, "peers is absent; lmi_peers_create gives it");
  const Peers &peers = *static_cast<const Peers *>(args.peers);
  check_float("x", args.x);
  require(has_no_gaps(args.x), "x has gaps; it must be contiguous");
  const int64_t num = num_elements(args.x);
  check_range("bytes of x", num * bytes_of(args.x.dtype), 0, peers.max_bytes);
  for (int r = 0; r < peers.size; ++r) require(peers.memory[r] != nullptr, "the other ranks' memory is not mapped; see lmi_peers_map");
  with_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool is_aligned = reinterpret_cast<uintptr_t>(args.x.data) % kPackBytes == 0;
    const Message<T> message{static_cast<T *>(args.x.data), num, is_aligned};
    const unsigned blocks = ceil_div(num, int64_t{kPeerThreads} * Message<T>::kNum);
    launch("all_reduce", all_reduce_kernel<T>, {min(blocks, unsigned{kPeerBlocks}), kPeerThreads}, stream, peers, message);
  });
}

}  // namespace lmi::cuda
