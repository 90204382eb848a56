/* How a block keeps its P x D numbers of a key head on the CPU: so that attention reads them as it multiplies them. Keys [D/2][P][2]: a line
 * is two numbers of 16 keys. Values [P/2][D][2]: a line is 16 numbers of two keys. */
#pragma once
#include "common/check.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kChunk = 16; /* keys that lie together: P is a multiple of it */

/* A chunk of a cache: so many rows of so many numbers, `stride` bytes from one to the next. */
struct ChunkShape {
  int64_t rows, numbers, stride;

  static ChunkShape of_keys(const lmi_tensor &cache) {
    return {cache.size[3] / 2, 2 * kChunk, 2 * cache.size[2] * bytes_of(cache.dtype)};
  }
  static ChunkShape of_values(const lmi_tensor &cache) {
    return {kChunk / 2, 2 * cache.size[3], 2 * cache.size[3] * bytes_of(cache.dtype)};
  }
};

/* Where the chunk begins whose first key stands at `place` of the block. */
inline char *chunk_of_keys(const lmi_tensor &cache, int64_t block, int64_t head, int64_t place) {
  return static_cast<char *>(at(cache, block, head)) + 2 * place * bytes_of(cache.dtype);
}
inline char *chunk_of_values(const lmi_tensor &cache, int64_t block, int64_t head, int64_t place) {
  return static_cast<char *>(at(cache, block, head)) + place * cache.size[3] * bytes_of(cache.dtype);
}

/* Numbers of a head for consecutive places of a block: `num` tokens, `stride` numbers from one to the next. */
template <class Number>
struct Run {
  const Number *from;
  int64_t num, stride;
};

/* A run's numbers as they are to their places, from `place` on. */
template <class Number>
void put_keys(const lmi_tensor &cache, int64_t block, int64_t head, int64_t place, const Run<Number> &run) {
  struct Pair {
    Number of[2];
  };
  Pair *const to = reinterpret_cast<Pair *>(static_cast<Number *>(at(cache, block, head)) + 2 * place);
  for (int64_t token = 0; token < run.num; ++token) {
    const Pair *from = reinterpret_cast<const Pair *>(run.from + token * run.stride);
    for (int64_t pair = 0; pair < cache.size[3] / 2; ++pair) to[pair * cache.size[2] + token] = from[pair];
  }
}
template <class Number>
void put_values(const lmi_tensor &cache, int64_t block, int64_t head, int64_t place, const Run<Number> &run) {
  const int64_t size = cache.size[3];
  Number *const values = static_cast<Number *>(at(cache, block, head));
  for (int64_t token = 0; token < run.num; ++token) {
    const Number *from = run.from + token * run.stride;
    Number *to = values + (place + token) / 2 * 2 * size + (place + token) % 2;
    if ((place + token) % 2 == 1 || token + 1 == run.num) {
      for (int64_t d = 0; d < size; ++d) to[2 * d] = from[d];
      continue;
    }
    const Number *second = from + run.stride;
    for (int64_t d = 0; d < size; ++d) {
      to[2 * d] = from[d];
      to[2 * d + 1] = second[d];
    }
    ++token;
  }
}

inline void check_order(const char *name, const lmi_tensor &cache) {
  if (cache.size[2] % kChunk == 0 && cache.size[3] % 2 == 0 && cache.stride[2] == cache.size[3]) return;
  refuse(std::string(name) + " must have blocks of P=" + std::to_string(cache.size[2]) + " a multiple of 16, D=" +
         std::to_string(cache.size[3]) + " even and strides of D and 1 inside of a block");
}

}  // namespace
}  // namespace lmi::LMI_LEVEL
