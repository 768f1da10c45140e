// Matrix products of a warpgroup. They are computed at the wait, the latest moment that the
// hardware allows. Until then the accumulators hold NaN, and the operands in shared memory must not
// change.
#pragma once
#include "copies.h"
#include "matrix.h"

// ---- operands in shared memory, described by matrix descriptors

struct OperandLayout {
  u64 start, leading, stride;
  u64 swizzle;  // row bytes of the swizzle pattern, 16 for none
  u64 base;
  bool transposed;  // the outer dimension is contiguous
};

inline OperandLayout decode_descriptor(u64 descriptor, bool transposed) {
  auto field = [&](u32 from) { return (descriptor >> from & 0x3fff) << 4; };
  static const u32 swizzles[4] = {16, 128, 64, 32};
  return {field(0),  field(16), field(32), swizzles[descriptor >> 62], descriptor >> 49 & 7,
          transposed};
}

// Returns the address of 16 bytes. `outer` and `inner` are the positions of their first element in
// the outer dimension and in the one summed over; `wide` is the number of elements in 16 bytes. A
// swizzle pattern has 8 rows of `swizzle` bytes, whose 16-byte columns are permuted by the row.
inline u64 operand_address(const OperandLayout& o, u32 outer, u32 inner, u32 wide) {
  const u32 row = o.transposed ? inner : outer, column = (o.transposed ? outer : inner) / wide;
  u64 at = o.start;
  if (o.swizzle == 16) {
    at += row % 8 * 16;
    at += o.transposed ? row / 8 * o.leading + column * o.stride
                       : row / 8 * o.stride + column * o.leading;
    return at;
  }
  const u32 columns = (u32)o.swizzle / 16;
  at += row % 8 * o.swizzle + row / 8 * o.stride;
  at += o.transposed ? column % columns * 16 + column / columns * o.leading : column * 16;
  return at ^ ((at >> 7) - o.base & (columns - 1)) << 4;
}

// ---- the product of one warp: 16 rows of A, all of B

struct WarpProduct {
  double a[16][32], b[32][256];
  u64 checksum;  // of the operands' bytes
};
inline HIDDEN thread_local WarpProduct warp_product;

inline u32 depth_of(const Product& p) { return p.type == MMA_TF32 ? 8 : 16; }

// Reads `outer` x depth elements from row `first` on, and calls put(outer, inner, element) for
// each.
template <class F>
inline void read_operand(Thread& t, const Product& p, const OperandLayout& layout, u32 first,
                         u32 outer, bool issued, F put) {
  const u32 size = p.type == MMA_TF32 ? 4 : 2, wide = 16 / size, depth = depth_of(p);
  const u32 rows = layout.transposed ? depth : outer, columns = layout.transposed ? outer : depth;
  for (u32 row = 0; row < rows; row++)
    for (u32 column = 0; column < columns; column += wide) {
      const u32 i = layout.transposed ? column : row, k = layout.transposed ? row : column;
      const u64 address = operand_address(layout, first + i, k, wide);
      u8* memory = shared_access(t, address, 16, 16, READ, false, p.line);
      if constexpr (kCheck)
        if (issued && locate_shared(t, address, 16).block)
          check_fenced(t, locate_shared(t, address, 16).at, address, 16, p.line);
      u64 words[2];
      memcpy(words, memory, 16);
      warp_product.checksum =
          (warp_product.checksum * 0x100000001b3ull ^ words[0]) * 0x100000001b3ull ^ words[1];
      for (u32 e = 0; e < wide; e++) {
        u32 bits = 0;
        memcpy(&bits, memory + e * size, size);
        put(layout.transposed ? i + e : i, layout.transposed ? k : k + e, element(bits, 0, p.type));
      }
    }
}

inline void read_operands(Thread* w, size_t number, bool issued) {
  const Product& p = w[0].engine->products[number];
  WarpProduct& m = warp_product;
  const u32 first = w[0].warp % 4 * 16;
  m.checksum = 0;
  if (!(p.flags & LEFT_IN_REGISTERS))
    read_operand(w[0], p, decode_descriptor(p.a, p.flags & LEFT_TRANSPOSED), first, 16, issued,
                 [&](u32 i, u32 k, double x) { m.a[i][k] = x; });
  read_operand(w[0], p, decode_descriptor(p.b, p.flags & RIGHT_TRANSPOSED), 0, p.columns, issued,
               [&](u32 j, u32 k, double x) { m.b[k][j] = x; });
}

inline void read_left_registers(Thread* w, size_t number) {
  const u32 type = w[0].engine->products[number].type, pack = type == MMA_TF32 ? 1 : 2;
  for (u32 lane = 0; lane < 32; lane++)
    for (u32 i = 0; i < 4; i++)
      for (u32 h = 0; h < pack; h++)
        warp_product.a[lane / 4 + 8 * (i % 2)][lane % 4 * pack + h + 4 * pack * (i / 2)] =
            element(w[lane].engine->products[number].left[i], h, type);
}

// Passes a result to the next product in flight that adds to it, else writes it to the registers.
inline void forward_result(Thread& t, size_t number, const std::vector<u32>& values) {
  const Product& done = t.engine->products[number];
  for (size_t i = number + 1; i < t.engine->products.size(); i++)
    if (t.engine->products[i].target[0] == done.target[0]) {
      t.engine->products[i].sums = values;
      return;
    }
  for (size_t i = 0; i < values.size(); i++) *done.target[i] = values[i];
}

inline void run_product(Thread* w, size_t number) {
  const Product& p = w[0].engine->products[number];
  WarpProduct& m = warp_product;
  read_operands(w, number, false);
  if constexpr (kCheck)
    if (m.checksum != p.checksum)
      report(w[0], MISSING_WAIT, p.line, SHARED, decode_descriptor(p.b, false).start, 16);
  if (p.flags & LEFT_IN_REGISTERS) read_left_registers(w, number);
  const double sign = (p.flags & LEFT_NEGATED ? -1 : 1) * (p.flags & RIGHT_NEGATED ? -1 : 1);
  const u32 depth = depth_of(p);
  for (u32 lane = 0; lane < 32; lane++) {
    const Product& product = w[lane].engine->products[number];
    std::vector<u32> values = product.sums;
    for (u32 i = 0; i < p.columns / 2; i++) {
      const u32 row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + lane % 4 * 2 + i % 2;
      double sum = 0;
      for (u32 k = 0; k < depth; k++) sum += m.a[row][k] * m.b[k][column];
      sum *= sign;
      if (p.flags & HALF_SUMS) {
        u32& pair = values[i / 2];
        const u32 shift = i % 2 * 16;
        if (product.adds) sum += element(pair, i % 2, MMA_F16);
        pair = (pair & ~(0xffffu << shift)) | (u32)f16(sum).bits << shift;
      } else {
        if (product.adds) sum += bits_as<float>(values[i]);
        values[i] = bits_as<u32>((float)sum);
      }
    }
    forward_result(w[lane], number, values);
  }
}

// ---- instructions

inline bool is_target(const Product& p, const u32* r) {
  return std::find(p.target.begin(), p.target.end(), r) != p.target.end();
}

inline bool is_unfenced(const Thread& t, const u32* r) {
  return std::find(t.engine->unfenced_registers.begin(), t.engine->unfenced_registers.end(), r) !=
         t.engine->unfenced_registers.end();
}

// All lanes have issued a product, the last one in their lists.
inline void issue_products(Thread* w) {
  const size_t number = w[0].engine->products.size() - 1;
  if constexpr (kCheck) {
    for (u32 lane = 1; lane < 32; lane++) {
      const Product &one = w[0].engine->products[number], &other = w[lane].engine->products.back();
      const bool same = w[lane].engine->products.size() == number + 1 && other.b == one.b &&
                        other.adds == one.adds &&
                        ((one.flags & LEFT_IN_REGISTERS) || other.a == one.a);
      if (!same)
        report(w[lane], WARP_MISMATCH, one.line, NO_SPACE, 0, 0, -1, (s32)w[0].self, one.line);
    }
    read_operands(w, number, true);
    w[0].engine->products[number].checksum = warp_product.checksum;
  }
}

// All lanes wait for all groups but the latest in[0].
inline void finish_products(Thread* w) {
  const u32 left = (u32)w[0].in[0];
  size_t done = 0;
  while (done < w[0].engine->products.size() &&
         w[0].engine->products[done].group + left < w[0].product_group) {
    bool all = true;
    for (u32 lane = 0; lane < 32; lane++) all &= w[lane].engine->products.size() > done;
    if (!all) break;
    run_product(w, done++);
  }
  for (u32 lane = 0; lane < 32; lane++) {
    auto& products = w[lane].engine->products;
    products.erase(products.begin(), products.begin() + std::min(done, products.size()));
  }
}

void issue_product(Thread& t, const ProductRequest& request, u32* const* target, u32 count,
                   u32* const* left) {
  Product p{request};
  p.group = t.product_group;
  p.target.assign(target, target + count);
  if (left)
    for (u32 i = 0; i < 4; i++) p.left[i] = *left[i], p.left_registers[i] = left[i];
  if constexpr (kCheck) {
    bool unfenced = false;
    for (const u32* r : p.target) unfenced |= is_unfenced(t, r);
    for (u32 i = 0; left && i < 4; i++) unfenced |= is_unfenced(t, left[i]);
    if (unfenced) report(t, MISSING_FENCE, p.line);
  }
  bool in_flight = false;
  for (const Product& other : t.engine->products) in_flight |= is_target(other, target[0]);
  p.sums.assign(count, 0);
  for (u32 i = 0; i < count && !in_flight; i++) p.sums[i] = *target[i];
  if constexpr (kCheck)
    for (u32 i = 0; i < count; i++) *target[i] = ~0u;
  t.engine->products.push_back(std::move(p));
  warp_sync(t, W_PRODUCT, ~0u, t.engine->products.back().line);
}

void wait_products(Thread& t, u32 left, u32 line) {
  t.in[0] = left;
  warp_sync(t, W_PRODUCT_WAIT, ~0u, line);
}

// Checks the use of a register of a product by an ordinary instruction.
void check_register(Thread& t, const u32* r, bool writes, u32 line) {
  if constexpr (kCheck) {
    if (writes && !is_unfenced(t, r)) t.engine->unfenced_registers.push_back(r);
    for (const Product& p : t.engine->products) {
      const bool is_left =
          (p.flags & LEFT_IN_REGISTERS) && std::count(p.left_registers, p.left_registers + 4, r);
      if (is_target(p, r) || (writes && is_left)) {
        report(t, MISSING_WAIT, line, NO_SPACE, 0, 0, -1, -1, p.line);
        return;
      }
    }
  }
}

// A copy between registers of products is fenced if its source is: see register_copy in
// isa/wgmma.py.
void copy_register(Thread& t, const u32* target, const u32* source, u32 line) {
  if constexpr (kCheck) {
    check_register(t, source, false, line);
    check_register(t, target, true, line);
    auto& all = t.engine->unfenced_registers;
    if (!is_unfenced(t, source)) all.erase(std::remove(all.begin(), all.end(), target), all.end());
  }
}

void fence_registers(Thread& t) {
  if constexpr (kCheck) t.engine->unfenced_registers.clear();
}

inline void check_products(Thread& t) {
  if constexpr (kCheck)
    if (!t.engine->products.empty()) report(t, MISSING_WAIT, t.engine->products[0].line);
}
