/* Sums and gathers over ranks through shared memory. A small sum: everyone adds up everything. A large one in chunks, of each of
 * which a rank adds up its part and takes the others' sums: a chunk is written, the one before it added up and the one
 * before that collected, so that nobody waits for a whole turn. Bound by what passes between the CPUs' caches. */
#include <algorithm>

#include "common/link.h"
#include "common/rows.h"

namespace lmi::LMI_LEVEL {
namespace {

constexpr int64_t kBlock = 1024; /* numbers that are added up in the first cache */

/* out[i] := sum_r sources[r][i], r ascending; out may be one of the sources. */
void add_up(const char *const *sources, int32_t num_sources, int32_t dtype, int64_t n, char *out) {
  alignas(64) float sum[kBlock], term[kBlock];
  const int64_t item = bytes_of(dtype);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t num = std::min(kBlock, n - begin);
    read_floats(sources[0] + begin * item, dtype, num, sum);
    for (int32_t r = 1; r < num_sources; ++r) {
      read_floats(sources[r] + begin * item, dtype, num, term);
      for (int64_t i = 0; i < num; ++i) sum[i] += term[i];
    }
    write_floats(sum, dtype, num, out + begin * item);
  }
}

void reduce_small(Link &link, char *x, int32_t dtype, int64_t n) {
  const int64_t turn = link.next_turn(), bytes = n * bytes_of(dtype);
  std::memcpy(link.small(link.rank(), turn), x, static_cast<size_t>(bytes));
  link.post(turn);
  link.wait_for_all(turn);
  const char *sources[Link::kMaxRanks];
  for (int32_t r = 0; r < link.size(); ++r) sources[r] = link.small(r, turn);
  add_up(sources, link.size(), dtype, n, x);
}

/* Rank r's part of a chunk, in bytes from its begin. */
struct Part {
  int64_t begin, bytes;
};

class LargeSum {
 public:
  LargeSum(Link &link, char *x, int32_t dtype, int64_t n)
      : link_(link), x_(x), dtype_(dtype), item_(bytes_of(dtype)), bytes_(n * item_) {}

  void run() {
    const int64_t num = (bytes_ + Link::kChunkBytes - 1) / Link::kChunkBytes;
    for (int64_t c = 0; c < num + 2; ++c) {
      if (c < num) write(c);
      if (c >= 1 && c <= num) add(c - 1);
      if (c >= 2) collect(c - 2);
    }
  }

 private:
  Part part(int64_t c, int32_t rank) const {
    const int64_t items = std::min(Link::kChunkBytes, bytes_ - c * Link::kChunkBytes) / item_;
    const int64_t begin = items * rank / link_.size(), end = items * (rank + 1) / link_.size();
    return {begin * item_, (end - begin) * item_};
  }

  char *mine(int64_t c) const { return x_ + c * Link::kChunkBytes; }

  /* What the others will add up. */
  void write(int64_t c) {
    written_[c % Link::kRing] = link_.next_turn();
    for (int32_t r = 0; r < link_.size(); ++r) {
      if (r != link_.rank()) copy(link_.chunk(link_.rank(), c), mine(c), part(c, r));
    }
    link_.post(written_[c % Link::kRing]);
  }

  void add(int64_t c) {
    const int64_t turn = link_.next_turn();
    link_.wait_for_all(written_[c % Link::kRing]);
    const Part own = part(c, link_.rank());
    const char *sources[Link::kMaxRanks];
    for (int32_t r = 0; r < link_.size(); ++r) {
      sources[r] = (r == link_.rank() ? mine(c) : link_.chunk(r, c)) + own.begin;
    }
    add_up(sources, link_.size(), dtype_, own.bytes / item_, mine(c) + own.begin);
    copy(link_.sums(link_.rank(), c), mine(c), own);
    summed_[c % Link::kRing] = turn;
    link_.post(turn);
  }

  void collect(int64_t c) {
    for (int32_t r = 0; r < link_.size(); ++r) {
      if (r == link_.rank()) continue;
      link_.wait(r, summed_[c % Link::kRing]);
      copy(mine(c), link_.sums(r, c), part(c, r));
    }
  }

  static void copy(char *to, const char *from, Part part) {
    std::memcpy(to + part.begin, from + part.begin, static_cast<size_t>(part.bytes));
  }

  Link &link_;
  char *const x_;
  const int32_t dtype_;
  const int64_t item_, bytes_;
  int64_t written_[Link::kRing] = {}, summed_[Link::kRing] = {}; /* turns */
};

void check_link(const lmi_link &link) {
  require(link.memory != nullptr, "the link has no memory");
  check_range("size", link.size, 1, Link::kMaxRanks);
  check_range("rank", link.rank, 0, link.size - 1);
}

/* Elements [begin, begin + num) of rank r's block go to their columns of out. */
void scatter(const float *block, int64_t begin, int64_t num, const lmi_tensor &out, int64_t column, int64_t width) {
  while (num > 0) {
    const int64_t row = begin / width, offset = begin % width, run = std::min(num, width - offset);
    std::memcpy(static_cast<float *>(at(out, row)) + column + offset, block, static_cast<size_t>(run) * sizeof(float));
    block += run;
    begin += run;
    num -= run;
  }
}

}  // namespace

void all_reduce(const lmi_all_reduce_args &args) {
  const lmi_tensor &x = args.x;
  check_link(args.link);
  check_dims("x", x, x.dims);
  check_float("x", x);
  require(has_no_gaps(x), "x has gaps; it must be contiguous");
  const int64_t n = num_elements(x);
  if (n == 0 || args.link.size == 1) return;
  Link link(args.link);
  char *data = static_cast<char *>(x.data);
  if (n * bytes_of(x.dtype) <= Link::kSmallBytes) {
    reduce_small(link, data, x.dtype, n);
  } else {
    LargeSum(link, data, x.dtype, n).run();
  }
}

void gather(const lmi_gather_args &args) {
  check_link(args.link);
  Link link(args.link);
  const int32_t rank = link.rank(), size = link.size();
  check_dims("x", args.x, 2);
  check("starts", args.starts, LMI_I32, {{"size+1", size + 1}});
  const int32_t *starts = integers(args.starts);
  check_starts("starts", args.starts, starts[size]);
  const int64_t rows = args.x.size[0];
  check("x", args.x, LMI_F32, {{"R", rows}, {"own columns", starts[rank + 1] - starts[rank]}});
  require(has_no_gaps(args.x), "x has gaps; it must be contiguous");
  if (rank == 0) check("out", args.out, LMI_F32, {{"R", rows}, {"V", starts[size]}});
  if (rows == 0) return;
  const auto width = [&](int32_t r) { return static_cast<int64_t>(starts[r + 1] - starts[r]); };
  int64_t widest = 0;
  for (int32_t r = 0; r < size; ++r) widest = std::max(widest, width(r));
  constexpr int64_t kItems = Link::kChunkBytes / static_cast<int64_t>(sizeof(float));
  const float *mine = static_cast<const float *>(args.x.data);
  if (rank == 0) scatter(mine, 0, rows * width(0), args.out, starts[0], width(0));
  int64_t turns[Link::kRing] = {};
  for (int64_t c = 0; c * kItems < rows * widest; ++c) {
    const int64_t turn = link.next_turn(), begin = c * kItems;
    const auto num = [&](int32_t r) { return std::clamp<int64_t>(rows * width(r) - begin, 0, kItems); };
    if (rank == 0) {
      for (int32_t r = 1; r < size; ++r) {
        link.wait(r, turn);
        scatter(reinterpret_cast<const float *>(link.chunk(r, c)), begin, num(r), args.out, starts[r], width(r));
      }
    } else {
      if (c >= Link::kRing) link.wait(0, turns[c % Link::kRing]); /* until rank 0 has read what lies there */
      std::memcpy(link.chunk(rank, c), mine + begin, static_cast<size_t>(num(rank)) * sizeof(float));
    }
    turns[c % Link::kRing] = turn;
    link.post(turn);
    if (rank != 0 && (c + 1) * kItems >= rows * widest) link.wait(0, turn);
  }
}

}  // namespace lmi::LMI_LEVEL
