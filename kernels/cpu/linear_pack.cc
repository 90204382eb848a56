/* Packing of weights into panels (linear_layout.h). A panel belongs to one thread. */
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/memory.h"
#include "common/rows.h"
#include "cpu/linear_layout.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lmi::LMI_LEVEL {
namespace {

struct Place {
  int64_t panel;
  int lane; /* 0..31: half * 16 + j */
};

/* Which output stands in a lane; -1 beyond the last. */
int64_t output_of(const LinearShape &shape, const Place &place) {
  if (!shape.gated) {
    const int64_t output = place.panel * kPanel + place.lane;
    return output < shape.out_features ? output : -1;
  }
  const int64_t outputs = shape.out_features / 2, output = place.panel * kHalf + place.lane % kHalf;
  return output < outputs ? output + place.lane / kHalf * outputs : -1;
}

/* One output's inputs into its lane. w may be absent: zeros. */
void put_f32(char *columns, int lane, const char *w, int64_t num) {
  for (int64_t e = 0; e < num; ++e) {
    if (w) std::memcpy(columns + 128 * e + 4 * lane, w + 4 * e, 4);
    else std::memset(columns + 128 * e + 4 * lane, 0, 4);
  }
}

void put_half(char *columns, int lane, const char *w, int64_t num) {
  char *to = columns + 4 * lane;
  const int64_t pairs = w ? num / 2 : 0, all = (num + kTileInputs - 1) / kTileInputs * kTileInputs / 2;
  for (int64_t pair = 0; pair < pairs; ++pair) std::memcpy(to + 128 * pair, w + 4 * pair, 4);
  for (int64_t pair = pairs; pair < all; ++pair) std::memset(to + 128 * pair, 0, 4);
  if (w && num % 2) std::memcpy(to + 128 * pairs, w + 4 * pairs, 2);
}

void put_int8(char *columns, int lane, const char *w, int64_t num) {
  char *to = columns + lane % kHalf * 4 + lane / kHalf;
  for (int64_t e = 0; e < num; ++e) to[e / 2 * 64 + e % 2 * 2] = w ? w[e] : 0;
}

void put_int4(char *columns, int lane, const char *w, int64_t num) {
  const int shift = lane / kHalf * 4, keep = 0xf0 >> shift;
  for (int64_t e = 0; e < num; ++e) {
    char &byte = columns[e / 4 * 64 + lane % kHalf * 4 + e % 4];
    byte = static_cast<char>((byte & keep) | ((w ? w[e] & 15 : 0) << shift));
  }
}

void put_scale(const lmi_linear_pack_args &args, float *scales, int lane, int64_t row, int64_t group) {
  scales[lane] = scales[kPanel + lane] = 0.0f;
  if (row < 0) return;
  const char *scale = static_cast<const char *>(at(args.scales, row)) + group * bytes_of(args.dtype);
  read_floats(scale, args.dtype, 1, scales + lane);
  scales[kPanel + lane] = static_cast<const uint8_t *>(at(args.zeros, row))[group];
}

/* What comes into the lanes of a panel: a row of w, zeros if it is -1, nothing if it is kKept. */
constexpr int64_t kKept = -2;
struct Lanes {
  int64_t row[kPanel];
};

constexpr int64_t kWordBytes = 4, kColumnBytes = kPanel * kWordBytes; /* of a dense panel */
constexpr int64_t kTileBytes = kHalf * kWordBytes;                   /* of a row, and of what comes of it in a column */

/* A tile of 16 columns: what the rows have at `offset` bytes, 16 words each, becomes a line of 16 lanes in each column. Written past the
 * caches: a weight is larger than they are, and is not read before all of it is packed. */
void put_tile(char *columns, const char *const *rows, int64_t offset) {
#if defined(__AVX512F__)
  __m512i a[kHalf], b[kHalf]; /* transposed in four rounds: words, pairs of words, fours, eights */
  for (int i = 0; i < kHalf; ++i) a[i] = _mm512_loadu_si512(rows[i] + offset);
  for (int i = 0; i < kHalf; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kHalf; i += 4) {
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
      a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
    }
  }
  for (int i = 0; i < kHalf; i += 8) {
    for (int k = i; k < i + 4; ++k) {
      b[k] = _mm512_shuffle_i32x4(a[k], a[k + 4], 0x88);
      b[k + 4] = _mm512_shuffle_i32x4(a[k], a[k + 4], 0xdd);
    }
  }
  for (int k = 0; k < 8; ++k) {
    char *column = columns + kColumnBytes * k;
    _mm512_stream_si512(reinterpret_cast<__m512i *>(column), _mm512_shuffle_i32x4(b[k], b[k + 8], 0x88));
    _mm512_stream_si512(reinterpret_cast<__m512i *>(column + 8 * kColumnBytes), _mm512_shuffle_i32x4(b[k], b[k + 8], 0xdd));
  }
#else
  for (int word = 0; word < kHalf; ++word) {
    for (int lane = 0; lane < kHalf; ++lane) {
      const char *from = rows[lane] + offset + kWordBytes * word;
      std::memcpy(columns + kColumnBytes * word + kWordBytes * lane, from, kWordBytes);
    }
  }
#endif
}

/* The halves of a dense panel whose rows are all there, tile by tile; their lanes need nothing more. */
void put_tiles(const lmi_linear_pack_args &args, char *panel, Lanes &lanes) {
  const int64_t row_bytes = args.w.size[1] * bytes_of(args.w.dtype);
  if (row_bytes % kTileBytes || reinterpret_cast<uintptr_t>(panel) % kTileBytes) return;
  for (int half = 0; half < 2; ++half) {
    int64_t *row = lanes.row + half * kHalf;
    if (std::any_of(row, row + kHalf, [](int64_t each) { return each < 0; })) continue;
    const char *rows[kHalf];
    for (int lane = 0; lane < kHalf; ++lane) rows[lane] = static_cast<const char *>(at(args.w, row[lane]));
    for (int64_t offset = 0; offset < row_bytes; offset += kTileBytes) {
      put_tile(panel + offset / kWordBytes * kColumnBytes + half * kTileBytes, rows, offset);
    }
    std::fill(row, row + kHalf, kKept);
  }
#if defined(__AVX512F__)
  _mm_sfence(); /* such stores keep no order with what tells others that the job is done */
#endif
}

/* Some inputs of one lane after the other, so that what they write together stays in the first-level cache meanwhile. */
void put_lanes(const lmi_linear_pack_args &args, const PanelLayout &layout, int64_t panel, const Lanes &lanes) {
  constexpr int64_t kSome = 4 * kTileInputs; /* 8 KiB of a 16-bit panel */
  const auto put_dense = args.dtype == LMI_F32 ? put_f32 : put_half;
  const auto put = args.format == LMI_INT4 ? put_int4 : args.format == LMI_INT8 ? put_int8 : put_dense;
  char *group_at = static_cast<char *>(args.packed.data) + panel * layout.panel_bytes;
  for (int64_t group = 0; group < layout.num_groups; ++group, group_at += layout.group_bytes) {
    for (int64_t e = 0; e < layout.group_inputs; e += kSome) {
      const int64_t first = group * layout.group_inputs + e, num = std::min(kSome, layout.group_inputs - e);
      char *columns = group_at + layout.scale_bytes + e / layout.column_inputs * layout.column_bytes;
      for (int lane = 0; lane < kPanel; ++lane) {
        const int64_t row = lanes.row[lane];
        if (row == kKept) continue;
        if (layout.scale_bytes && e == 0) put_scale(args, reinterpret_cast<float *>(group_at), lane, row, group);
        put(columns, lane, row < 0 ? nullptr : static_cast<const char *>(at(args.w, row)) + first * bytes_of(args.w.dtype), num);
      }
    }
  }
}

/* Those that hold one of the rows: the threads share these alone, for a large weight comes in many pieces. */
template <class Function>
std::vector<int64_t> panels_with(const LinearShape &shape, const PanelLayout &layout, Function has_row) {
  std::vector<int64_t> panels;
  for (int64_t panel = 0; panel < layout.num_panels; ++panel) {
    int lane = 0;
    while (lane < kPanel && !has_row(output_of(shape, {panel, lane}))) ++lane;
    if (lane < kPanel) panels.push_back(panel);
  }
  return panels;
}

}  // namespace

void linear_pack(const lmi_linear_pack_args &args) {
  const LinearShape shape = shape_of(args);
  check_arguments(args, packed_bytes(shape));
  const PanelLayout layout = panel_layout(shape);
  ask_for_huge_pages(args.packed.data, args.packed.size[0]);
  const auto has_row = [&](int64_t output) { return output >= args.row_offset && output < args.row_offset + args.w.size[0]; };
  const std::vector<int64_t> panels = panels_with(shape, layout, has_row);
  parallel_for(static_cast<int64_t>(panels.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = panels[static_cast<size_t>(i)];
      Lanes lanes;
      for (int lane = 0; lane < kPanel; ++lane) {
        const int64_t output = output_of(shape, {panel, lane});
        lanes.row[lane] = output < 0 ? -1 : has_row(output) ? output - args.row_offset : kKept;
      }
      if (args.format == LMI_DENSE) put_tiles(args, static_cast<char *>(args.packed.data) + panel * layout.panel_bytes, lanes);
      put_lanes(args, layout, panel, lanes);
    }
  });
}

}  // namespace lmi::LMI_LEVEL
