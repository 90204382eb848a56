/* Of attention.cc: what a thread works with. Softmaxes on their way, the rows of a unit, and where the keys of a tile lie. */
#pragma once
#include <limits>

#include "common/math.h"
#include "common/memory.h"
#include "cpu/attention_problem.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

/* A unit's rows: greatest score, sum of weights and weighted sum of values so far. A sum of 0 says that no key was seen yet. */
struct States {
  float *max, *sum, *values;

  static int64_t floats(int64_t rows, int64_t padded) { return rows * (padded + 2); }
  States(float *memory, int64_t rows) : max(memory), sum(memory + rows), values(memory + 2 * rows) {}
  States(const States &all, int64_t row, int64_t padded) : max(all.max + row), sum(all.sum + row), values(all.values + row * padded) {}

  void clear(int64_t rows, int64_t padded) {
    std::fill_n(max, rows, kNever);
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(values, rows * padded, 0.0f);
  }
};

void merge_row(const States &total, const States &part, int64_t row, int64_t padded) {
  if (part.sum[row] == 0.0f) return;
  float *to = total.values + row * padded;
  const float *from = part.values + row * padded;
  if (total.sum[row] == 0.0f) {
    total.max[row] = part.max[row];
    total.sum[row] = part.sum[row];
    std::copy_n(from, padded, to);
    return;
  }
  const float max = std::max(total.max[row], part.max[row]);
  const float keep = exp_of(total.max[row] - max), add = exp_of(part.max[row] - max);
  total.sum[row] = keep * total.sum[row] + add * part.sum[row];
  for (int64_t d = 0; d < padded; ++d) to[d] = keep * to[d] + add * from[d];
  total.max[row] = max;
}

void merge(const States &total, const States &part, int64_t rows, int64_t padded) {
  for (int64_t row = 0; row < rows; ++row) merge_row(total, part, row, padded);
}

/* What is known of a row before its keys are looked at. */
struct Row {
  int64_t head, position;
  Range seen;
};

/* Where the words of a tile lie, a line at a time: of each chunk its first line, and how far it is to the next. */
struct TileLines {
  const uint32_t *of[kTile / kChunk];
  int64_t stride;
};

/* Of one unit, or of several one after the other; made for numbers that come `Numbers::kTogether` in a Word (attention_floats.h says
 * what these are). */
template <class Numbers>
struct Scratch {
  using Word = typename Numbers::Word;
  static constexpr int64_t kWords = kTile / Numbers::kTogether;

  const int64_t row_words; /* of a query */
  Row *about;              /* this and queries: from the row on that was turned to */
  Word *queries, *keys, *values, *weights;
  TileLines key_lines, value_lines; /* in keys and values or in the cache itself; numbers that come two in a word */
  float *few, *scores, *part, *total; /* some numbers on their way, scores [rows][64], two units' states */
  typename Numbers::Tools tools;

  Scratch(const Problem &problem, int64_t unit_rows) : row_words(problem.padded / Numbers::kTogether) {
    const int64_t padded = problem.padded, states = States::floats(unit_rows, padded);
    const int64_t words = unit_rows * row_words + kTile * row_words + kWords * padded + unit_rows * kWords;
    queries = queries_ = reinterpret_cast<Word *>(
        kept_floats(Purpose::kTile, words + Numbers::kFew * padded + unit_rows * kTile + 2 * states));
    keys = queries + unit_rows * row_words;
    values = keys + kTile * row_words;
    weights = values + kWords * padded;
    few = reinterpret_cast<float *>(weights + unit_rows * kWords);
    scores = few + Numbers::kFew * padded;
    part = scores + unit_rows * kTile;
    total = part + states;
    turn_to(0);
  }

  void turn_to(int64_t row) {
    about = about_ + row;
    queries = queries_ + row * row_words;
  }

 private:
  Row about_[kUnitRows];
  Word *queries_;
};

/* A tile of a head's keys on a unit's way, of which its rows see `needed`. */
struct Place {
  const Unit *unit; /* null: nowhere */
  int64_t head, tile;
  Range needed;

  int64_t first_row() const { return (head - unit->head) * unit->rows; }

  /* All heads of a tile before the next one: their blocks lie side by side, and a core reads faster on and on. */
  void go_on() {
    if (++head < unit->head + unit->num_heads) return;
    head = unit->head;
    tile += kTile;
  }
};

/* Where a tile's keys or values lie, by chunks; null where no row of the unit sees any. */
struct TileChunks {
  static constexpr int64_t kChunks = kTile / kChunk;
  const char *of[kChunks] = {};
  Range seen = {0, 0}; /* by any row of the unit, counted from the tile's first key */
  bool is_whole() const { return seen.first == 0 && seen.last == kTile; }

  TileChunks(const Problem &problem, const lmi_tensor &cache, const Place &place,
             char *(*begin)(const lmi_tensor &, int64_t, int64_t, int64_t)) {
    if (!place.unit) return;
    seen = common({place.needed.first - place.tile, place.needed.last - place.tile}, {0, kTile});
    const int32_t *table = integers(problem.args.tables) + place.unit->sequence * problem.args.tables.stride[0];
    for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
      const int64_t key = place.tile + chunk * kChunk;
      if (common({key, key + kChunk}, place.needed).is_empty()) continue;
      of[chunk] = begin(cache, table[key / problem.block_size], place.head, key % problem.block_size);
    }
  }
};

/* How a chunk is asked for: so many times so many bytes, a stride apart. One without gaps is asked for in pieces of four lines, so that the
 * pieces of a tile are as many as the steps of its arithmetic. */
struct Pieces {
  int64_t num, stride, bytes;

  static Pieces of(const ChunkShape &shape, int64_t number_bytes) {
    constexpr int64_t kPiece = 256;
    const int64_t row_bytes = shape.numbers * number_bytes;
    if (shape.stride != row_bytes) return {shape.rows, shape.stride, row_bytes};
    return {(shape.rows * row_bytes + kPiece - 1) / kPiece, kPiece, kPiece};
  }
};

/* Both of a tile. Those of the next tile are asked for a piece of a chunk at a time between the arithmetic: blocks lie anywhere in memory,
 * and a core waits for what it asks for beyond some 20 lines at once. */
class TileCache {
 public:
  TileCache(const Problem &problem, const Place &place)
      : keys(problem, problem.args.k_cache, place, chunk_of_keys),
        values(problem, problem.args.v_cache, place, chunk_of_values),
        key_pieces_(Pieces::of(ChunkShape::of_keys(problem.args.k_cache), bytes_of(problem.args.k_cache.dtype))),
        value_pieces_(Pieces::of(ChunkShape::of_values(problem.args.v_cache), bytes_of(problem.args.v_cache.dtype))) {}

  TileChunks keys, values;

  void ask() {
    if (chunk_ == 2 * TileChunks::kChunks) return;
    const bool is_key = chunk_ < TileChunks::kChunks;
    const Pieces &pieces = is_key ? key_pieces_ : value_pieces_;
    const char *chunk = is_key ? keys.of[chunk_] : values.of[chunk_ - TileChunks::kChunks];
    const char *piece = chunk + piece_ * pieces.stride;
    for (int64_t byte = 0; chunk && byte < pieces.bytes; byte += 64) __builtin_prefetch(piece + byte, 0, 3);
    if (++piece_ < pieces.num && chunk) return;
    piece_ = 0;
    ++chunk_;
  }

  void ask_for_rest() {
    while (chunk_ < 2 * TileChunks::kChunks) ask();
  }

 private:
  Pieces key_pieces_, value_pieces_;
  int64_t chunk_ = 0, piece_ = 0; /* the next piece to ask for, values after keys */
};

}  // namespace
}  // namespace lmi::LMI_LEVEL
