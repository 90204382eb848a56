/* wgmma: products of four warps, D[64,N] += A[64,16] B[16,N], which run while their threads go on. B lies in shared memory, A there
 * or in registers, D in registers. As late as the wait for it allows a product reads shared memory and A, in the random order also
 * when a warp commits its group, whatever the other warps have yet to do; D is not a number meanwhile. What a GPU leaves undefined is reported: registers that change while a
 * product reads or sums into them, a product without a fence after the last wait, threads of the four warps that differ. */
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lmi::sim {

/* A matrix in shared memory as a descriptor tells it, in rows of 128 bytes that are exchanged by 16 (128-byte swizzle): eight rows
 * one behind the other; the next eight `stride` bytes further. Of a transposed matrix, the next 64 columns `leading` bytes further. */
struct MatrixPlace {
  uint32_t address, leading, stride;
  explicit MatrixPlace(uint64_t descriptor);
  /* Where element (row, column) lies, of 2 bytes; rows are what the 128 bytes run along. */
  uint32_t at(int row, int column) const;
};

/* A thread's part. D: register 4 i + j is columns 8 i + 2 t + j % 2 of row g + 8 (j / 2) of its warp's 16 rows, lane (g, t); A in
 * registers as for mma.sync. */
struct Product {
  uint64_t a, b; /* descriptors */
  const uint32_t *a_registers; /* or null */
  float *d;
  int columns;
  bool is_b_transposed, is_added;
  float (*number)(uint32_t bits);

  bool is_done = false;
  uint32_t a_before[4] = {};     /* registers as they were when it was issued */
  std::vector<float> sums = {};  /* D before, then after; empty: an earlier or later product has them */
};

class ProductGroups {
 public:
  void clear();
  bool are_pending() const { return !open_.empty() || !groups_.empty(); }
  void fence() { is_fenced_ = true; }
  void add(Product product);
  void commit();
  void wait(unsigned num_left); /* all but the newest num_left groups are done, and D has their sums */

 private:
  static void check_warps_alike(const ProductGroups &first, const ProductGroups &other);
  static void run(ProductGroups *const *lanes, int warp, size_t num_groups);
  void hand_on(size_t group, size_t i);
  void take_back(size_t num_groups);

  std::vector<Product> open_;
  std::vector<std::vector<Product>> groups_;
  bool is_fenced_ = false;
};

}  // namespace lmi::sim
