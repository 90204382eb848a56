#include "sim/products.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "sim/block.h"
#include "sim/shared.h"

namespace lmi::sim {
namespace {

constexpr int kRows = 16, kDepth = 16, kMaxColumns = 256; /* rows of a warp */
constexpr int kTaken = 0xff; /* what D is filled with while a product has it: not a number */

struct Operands {
  float a[kRows][kDepth], b[kDepth][kMaxColumns];
};

/* Eight elements, which lie together. */
void read_chunk(const Product &product, uint32_t address, float (&to)[8]) {
  uint16_t bits[8];
  check_fenced(address, sizeof bits, "wgmma");
  std::memcpy(bits, shared_pointer(address, sizeof bits, sizeof bits, "wgmma"), sizeof bits);
  for (int i = 0; i < 8; ++i) to[i] = product.number(bits[i]);
}

/* All lanes must ask for the same. */
void check_alike(const Product &first, const Product &other) {
  const bool is_alike = first.b == other.b && first.columns == other.columns && first.is_b_transposed == other.is_b_transposed &&
                        !first.a_registers == !other.a_registers && (first.a_registers || first.a == other.a) &&
                        first.is_added == other.is_added && first.number == other.number;
  if (!is_alike) fail("wgmma: threads of the four warps differ in descriptors or shape");
}

void read_left(Product *const *lanes, Operands &operands) {
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const Product &product = *lanes[lane];
    if (std::memcmp(product.a_before, product.a_registers, sizeof product.a_before)) {
      fail("wgmma: lane %u changes registers of A before the wait", lane);
    }
    for (int r = 0; r < 4; ++r) {
      const unsigned row = lane / 4 + r % 2 * 8, column = lane % 4 * 2 + r / 2 * 8;
      for (unsigned i = 0; i < 2; ++i) operands.a[row][column + i] = product.number(product.a_registers[r] >> 16 * i & 0xffff);
    }
  }
}

void read_operands(Product *const *lanes, int warp, Operands &operands) {
  const Product &product = *lanes[0];
  float chunk[8];
  if (product.a_registers) {
    read_left(lanes, operands);
  } else {
    const MatrixPlace a(product.a);
    for (int i = 0; i < kRows * kDepth; i += 8) {
      read_chunk(product, a.at(warp * kRows + i / kDepth, i % kDepth), chunk);
      std::memcpy(&operands.a[i / kDepth][i % kDepth], chunk, sizeof chunk);
    }
  }
  const MatrixPlace b(product.b);
  for (int i = 0; i < product.columns * kDepth; i += 8) {
    const int k = product.is_b_transposed ? i / product.columns : i % kDepth;
    const int column = product.is_b_transposed ? i % product.columns : i / kDepth;
    read_chunk(product, product.is_b_transposed ? b.at(k, column) : b.at(column, k), chunk);
    for (int j = 0; j < 8; ++j) (product.is_b_transposed ? operands.b[k][column + j] : operands.b[k + j][column]) = chunk[j];
  }
}

/* A warp's 16 rows. Sums in the order of mma.sync's twin: 16 products first, then onto what is there. */
void multiply(Product *const *lanes, int warp) {
  static Operands operands;
  static float products[kRows][kMaxColumns];
  read_operands(lanes, warp, operands);
  const int columns = lanes[0]->columns;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < columns; ++column) products[row][column] = 0.0f;
    for (int k = 0; k < kDepth; ++k) {
      const float a = operands.a[row][k];
      for (int column = 0; column < columns; ++column) products[row][column] += a * operands.b[k][column];
    }
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    Product &product = *lanes[lane];
    for (int i = 0; i < columns / 2; ++i) {
      const unsigned row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      product.sums[i] = product.is_added ? product.sums[i] + products[row][column] : products[row][column];
    }
    product.is_done = true;
  }
}

/* Whether a register array is as it was left when a product took it over. */
bool is_untouched(const float *d, size_t num_sums) {
  const unsigned char *const bytes = reinterpret_cast<const unsigned char *>(d);
  return std::all_of(bytes, bytes + num_sums * sizeof(float), [](unsigned char byte) { return byte == kTaken; });
}

}  // namespace

MatrixPlace::MatrixPlace(uint64_t descriptor)
    : address(static_cast<uint32_t>(descriptor & 0x3fff) * 16),
      leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) * 16),
      stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16) {
  if (descriptor >> 62 != 1 || descriptor >> 46 & 0xffff || descriptor >> 30 & 3) {
    fail("wgmma: a descriptor %016llx that is not of a 128-byte swizzle on a border of 1024 bytes", static_cast<unsigned long long>(descriptor));
  }
}

uint32_t MatrixPlace::at(int row, int column) const {
  const unsigned r = static_cast<unsigned>(row), c = static_cast<unsigned>(column);
  const uint32_t plain = address + r / 8 * stride + r % 8 * 128 + c / 64 * leading + c % 64 * 2;
  return plain ^ (plain >> 7 & 7) << 4;
}

void ProductGroups::clear() {
  open_.clear();
  groups_.clear();
  is_fenced_ = false;
}

void ProductGroups::add(Product product) {
  if (!is_fenced_) fail("wgmma without wgmma.fence since the last wait");
  if (product.a_registers) std::memcpy(product.a_before, product.a_registers, sizeof product.a_before);
  Product *before = nullptr; /* the last that sums into the same registers */
  const auto look = [&](std::vector<Product> &products) {
    for (Product &each : products) before = each.d == product.d ? &each : before;
  };
  for (std::vector<Product> &group : groups_) look(group);
  look(open_);
  const size_t num_sums = static_cast<size_t>(product.columns) / 2;
  if (!before) {
    product.sums.assign(product.d, product.d + num_sums);
    std::memset(product.d, kTaken, num_sums * sizeof(float));
  } else if (before->is_done) {
    product.sums = std::move(before->sums);
    before->sums.clear();
  }
  open_.push_back(std::move(product));
}

void ProductGroups::commit() {
  groups_.push_back(std::move(open_));
  open_.clear();
  if (!is_random()) return;
  with_warp(~0u, *this, "wgmma.commit_group", [](ProductGroups **lanes) {
    if (random_number() % 2) run(lanes, static_cast<int>(current->warp % (kGroupSize / kWarpSize)), lanes[0]->groups_.size());
  });
}

void ProductGroups::check_warps_alike(const ProductGroups &first, const ProductGroups &other) {
  bool is_alike = first.groups_.size() == other.groups_.size();
  for (size_t group = 0; is_alike && group < first.groups_.size(); ++group) {
    const std::vector<Product> &own = first.groups_[group], &others = other.groups_[group];
    is_alike = own.size() == others.size();
    for (size_t i = 0; is_alike && i < own.size(); ++i) check_alike(own[i], others[i]);
  }
  if (!is_alike) fail("wgmma: threads of the four warps issue different products");
}

/* The oldest num_groups groups of a warp's lanes, product by product, as far as they are not done. A warp does not wait for the other
 * three: what they have yet to write to shared memory is not there. */
void ProductGroups::run(ProductGroups *const *lanes, int warp, size_t num_groups) {
  for (size_t group = 0; group < num_groups; ++group) {
    const size_t num_products = lanes[0]->groups_[group].size();
    for (size_t i = 0; i < num_products; ++i) {
      Product *products[kWarpSize];
      for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        std::vector<std::vector<Product>> &own = lanes[lane]->groups_;
        if (own.size() <= group || own[group].size() != num_products) fail("wgmma: threads of the four warps issue different products");
        products[lane] = &own[group][i];
        check_alike(*products[0], *products[lane]);
      }
      if (products[0]->is_done) continue;
      multiply(products, warp);
      for (unsigned lane = 0; lane < kWarpSize; ++lane) lanes[lane]->hand_on(group, i);
    }
  }
}

/* To the next product that sums into the same registers, if there is one. */
void ProductGroups::hand_on(size_t group, size_t i) {
  Product &from = groups_[group][i];
  for (++i; group <= groups_.size(); ++group, i = 0) {
    std::vector<Product> &products = group < groups_.size() ? groups_[group] : open_;
    for (; i < products.size(); ++i) {
      if (products[i].d != from.d) continue;
      products[i].sums = std::move(from.sums);
      from.sums.clear();
      return;
    }
  }
}

/* What the oldest num_groups groups have summed goes to D, but where a product is still on its way. */
void ProductGroups::take_back(size_t num_groups) {
  for (size_t group = 0; group < num_groups; ++group) {
    for (const Product &product : groups_[group]) {
      if (product.sums.empty()) continue;
      if (!is_untouched(product.d, product.sums.size())) fail("wgmma: registers of D are written before the wait");
      std::copy(product.sums.begin(), product.sums.end(), product.d);
    }
  }
  groups_.erase(groups_.begin(), groups_.begin() + static_cast<std::ptrdiff_t>(num_groups));
}

void ProductGroups::wait(unsigned num_left) {
  if (!open_.empty()) fail("wgmma.wait_group before wgmma.commit_group");
  with_group(*this, "wgmma.wait_group", [num_left](ProductGroups **lanes) {
    const size_t num_groups = lanes[0]->groups_.size();
    if (num_groups <= num_left) return;
    for (unsigned lane = 0; lane < kGroupSize; ++lane) check_warps_alike(*lanes[0], *lanes[lane]);
    for (unsigned warp = 0; warp < kGroupSize / kWarpSize; ++warp) run(lanes + warp * kWarpSize, static_cast<int>(warp), num_groups - num_left);
    for (unsigned lane = 0; lane < kGroupSize; ++lane) lanes[lane]->take_back(num_groups - num_left);
  });
  is_fenced_ = false;
}

}  // namespace lmi::sim
