/* The words of CUDA C++ that kernels may use, for a plain C++ compiler. What is not here is not simulated: the compiler says so. */
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "sim/block.h"
#include "sim/numbers.h"
#include "sim/shared.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (::lmi::sim::current->index)
#define blockIdx ::lmi::sim::block_index
#define blockDim ::lmi::sim::block_size
#define gridDim ::lmi::sim::grid_size

typedef void *cudaStream_t;

/* ---- threads ---- */

inline void __syncthreads() { lmi::sim::sync_threads("__syncthreads"); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(unsigned mask = ~0u) {
  int nothing = 0;
  lmi::sim::with_warp(mask, nothing, "__syncwarp", [](int **) {});
}

namespace lmi::sim {

/* The lane that `lane` reads from; itself beyond its part of the warp. */
enum class Shuffle { kIndex, kXor, kDown, kUp };
inline int source_lane(Shuffle kind, int lane, int offset, int width) {
  const int base = lane & ~(width - 1);
  switch (kind) {
    case Shuffle::kIndex: return base + (offset & (width - 1));
    case Shuffle::kXor: return (lane ^ offset) < base + width ? lane ^ offset : lane;
    case Shuffle::kDown: return lane + offset < base + width ? lane + offset : lane;
    default: return lane - offset >= base ? lane - offset : lane;
  }
}

template <class T>
T shuffle(unsigned mask, T value, int offset, int width, Shuffle kind) {
  struct Part {
    T value, result;
    int offset;
  } part{value, value, offset};
  with_warp(mask, part, "__shfl_sync", [=](Part **parts) {
    for (int lane = 0; lane < static_cast<int>(kWarpSize); ++lane) {
      if (!(mask >> lane & 1)) continue;
      const int source = source_lane(kind, lane, parts[lane]->offset, width);
      if (!(mask >> source & 1)) fail("__shfl_sync: lane %d reads lane %d, which is not in mask %08x", lane, source, mask);
      parts[lane]->result = parts[source]->value;
    }
  });
  return part.result;
}

}  // namespace lmi::sim

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return lmi::sim::shuffle(mask, value, lane, width, lmi::sim::Shuffle::kIndex);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return lmi::sim::shuffle(mask, value, lanes, width, lmi::sim::Shuffle::kXor);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int width = 32) {
  return lmi::sim::shuffle(mask, value, lanes, width, lmi::sim::Shuffle::kDown);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int width = 32) {
  return lmi::sim::shuffle(mask, value, lanes, width, lmi::sim::Shuffle::kUp);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Vote {
    int predicate;
    unsigned result;
  } vote{predicate, 0};
  lmi::sim::with_warp(mask, vote, "vote", [=](Vote **votes) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) && votes[lane]->predicate) result |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) votes[lane]->result = result;
    }
  });
  return vote.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

/* ---- atomics: a thread is never interrupted between two waits ---- */

template <class T, class Change>
T change_atomically(T *place, Change change) {
  const T before = *place;
  *place = change(before);
  lmi::sim::note_event();
  return before;
}
template <class T>
T atomicAdd(T *place, T value) {
  return change_atomically(place, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T *place, T value) {
  return change_atomically(place, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T *place, T value) {
  return change_atomically(place, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicOr(T *place, T value) {
  return change_atomically(place, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicExch(T *place, T value) {
  return change_atomically(place, [=](T) { return value; });
}
template <class T>
T atomicCAS(T *place, T expected, T value) {
  return change_atomically(place, [=](T old) { return old == expected ? value : old; });
}

/* ---- arithmetic ---- */

using std::max;
using std::min;

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return bits_as<float>(value); }
inline int __float_as_int(float value) { return bits_as<int>(value); }
inline float __int_as_float(int value) { return bits_as<float>(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
/* Byte i of the result is byte (selector >> 4i) & 7 of a (0 to 3) and b (4 to 7). */
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
T __ldg(const T *place) {
  return *place;
}
