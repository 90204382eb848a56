#include "sim/shared.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "sim/block.h"
#include "sim/poison.h"

namespace lmi::sim {
namespace {

constexpr size_t kArenaBytes = 512 << 10, kBorder = 128, kFirstAddress = 1024; /* address 0 belongs to nobody */
constexpr size_t kChunk = 16;
constexpr int kPoison = 0xff;

struct Piece {
  const void *key;
  size_t first, num_bytes;
};

std::vector<Piece> pieces;
uint16_t writers[kArenaBytes / kChunk]; /* who wrote a chunk since the last fence: 1 + the thread's number; 0: nobody */
size_t used_before = kArenaBytes;

char *arena() {
  static char *const memory = [] {
    void *mapped = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char *>(mapped);
  }();
  return memory;
}

size_t end_of(const Piece &piece) { return piece.first + piece.num_bytes; }

/* A piece behind the others, after a border. */
char *add_piece(const void *key, size_t num_bytes, size_t alignment) {
  const size_t first = pieces.empty() ? 0 : (end_of(pieces.back()) + kBorder + alignment - 1) / alignment * alignment;
  if (first + num_bytes + kBorder > kArenaBytes) fail("shared memory of more than %zu bytes", kArenaBytes);
  pieces.push_back({key, first, num_bytes});
  unpoison(arena() + first, num_bytes);
  return arena() + first;
}

}  // namespace

void clear_shared(size_t dynamic_bytes) {
  unpoison(arena(), kArenaBytes);
  std::memset(arena(), kPoison, used_before);
  poison(arena(), kArenaBytes);
  pieces.clear();
  add_piece(nullptr, dynamic_bytes, 1);
}

char *dynamic_shared_memory() { return arena(); }

void *static_shared_memory(const void *key, size_t num_bytes, size_t alignment) {
  for (const Piece &piece : pieces) {
    if (piece.key == key) return arena() + piece.first;
  }
  return add_piece(key, num_bytes, alignment);
}

std::string shared_damage() {
  used_before = end_of(pieces.back()) + kBorder;
  unpoison(arena(), used_before);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const size_t begin = end_of(pieces[i]), end = i + 1 < pieces.size() ? pieces[i + 1].first : used_before;
    for (size_t place = begin; place < end; ++place) {
      if (static_cast<unsigned char>(arena()[place]) == kPoison) continue;
      return "shared memory was written " + std::to_string(place - begin) + " bytes beyond a piece of " +
             std::to_string(pieces[i].num_bytes);
    }
  }
  return {};
}

uint32_t shared_address(const void *pointer) {
  const char *place = static_cast<const char *>(pointer);
  if (place < arena() || place >= arena() + kArenaBytes) fail("a pointer that is not to shared memory");
  return static_cast<uint32_t>(place - arena() + kFirstAddress);
}

char *shared_pointer(uint32_t address, size_t num_bytes, size_t alignment, const char *operation) {
  const size_t first = address - kFirstAddress;
  if (address % alignment) fail("%s: shared address %u is not a multiple of %zu", operation, address, alignment);
  for (const Piece &piece : pieces) {
    if (first >= piece.first && first + num_bytes <= end_of(piece)) return arena() + first;
  }
  fail("%s: shared address %u is out of bounds for %zu bytes", operation, address, num_bytes);
}

/* ---- what the copy engine and wgmma may see ---- */

void mark_written(uint32_t address, size_t num_bytes) {
  const uint16_t me = static_cast<uint16_t>(current->linear + 1);
  const size_t first = address - kFirstAddress;
  for (size_t chunk = first / kChunk; chunk <= (first + num_bytes - 1) / kChunk; ++chunk) {
    if (std::exchange(writers[chunk], me) != me) current->unfenced.push_back(static_cast<uint32_t>(chunk));
  }
}

void fence_written() {
  for (const uint32_t chunk : current->unfenced) {
    if (writers[chunk] == current->linear + 1) writers[chunk] = 0;
  }
  current->unfenced.clear();
}

void clear_written(Thread &thread) {
  for (const uint32_t chunk : thread.unfenced) writers[chunk] = 0;
  thread.unfenced.clear();
}

void check_fenced(uint32_t address, size_t num_bytes, const char *operation) {
  const size_t first = address - kFirstAddress;
  for (size_t chunk = first / kChunk; chunk <= (first + num_bytes - 1) / kChunk; ++chunk) {
    if (!writers[chunk]) continue;
    fail("%s: what thread %u wrote at shared address %zu is not fenced (fence_async)", operation, writers[chunk] - 1u, chunk * kChunk + kFirstAddress);
  }
}

}  // namespace lmi::sim
