// Gram matrix over the smaller side of a matrix, scaled so that its entries do not overflow.
#pragma once

#include "numbers.h"

namespace featkd::FEATKD_ISA {

// View of one matrix of a batch, transposed if necessary so that rows <= columns.
template <class In>
struct MatrixView {
  const In* data;
  int rows;
  int64_t columns, row_stride, column_stride;

  FEATKD_INLINE auto at(int i, int64_t k) const {
    return widen(data[i * row_stride + k * column_stride]);
  }
};

// Symmetric matrix, stored on and below the diagonal. Packed rows need half of the memory. On a
// CPU, rows have one length that is a multiple of a vector instead.
template <class Team, class Real>
struct LowerTriangle {
  Real* data;
  int n;

  // A multiple of every vector width, but not of 1 KB: rows must not compete for cache sets.
  FEATKD_HOST_DEVICE static int leading(int n) {
    return (n + 15) / 16 * 16 + 16 * ((n + 15) / 16 % 16 == 0);
  }
  FEATKD_HOST_DEVICE static size_t elements(int n) {
    return Team::PACKED ? size_t(n) * (n + 1) / 2 : size_t(n) * leading(n);
  }
  FEATKD_INLINE Real* row(int i) const {
    return data + (Team::PACKED ? i * (i + 1) / 2 : i * leading(n));
  }
};

// Scale that brings the largest magnitude to [0.5, 1). It is the product of two powers of two,
// because a single one cannot scale the smallest subnormal number to 1.
template <class Real>
struct Scale {
  Real first, second;
  int exponent;
  bool finite, zero;
};

// Finds the largest magnitude and the scale for it. `maxima` has one entry per group.
template <class Real, class In, class Team>
FEATKD_INLINE Scale<Real> find_scale(Team team, const MatrixView<In>& x, uint64_t* maxima) {
  // Lanes run along the dimension with the smaller stride.
  const bool along = x.column_stride <= x.row_stride;
  const int64_t length = along ? x.columns : x.rows, lines = along ? x.rows : x.columns;
  const int64_t stride = along ? x.column_stride : x.row_stride;
  const int64_t line_stride = along ? x.row_stride : x.column_stride;
  typename Format<In>::Bits largest = 0;
  for (int64_t i = team.rank(); i < lines; i += team.size()) {
    const In* line = x.data + i * line_stride;
    if (stride == 1)
      for (int64_t k = team.lane(); k < length; k += team.lanes()) {
        const auto bits = bits_of_magnitude(line[k]);
        largest = bits > largest ? bits : largest;
      }
    else
      for (int64_t k = team.lane(); k < length; k += team.lanes()) {
        const auto bits = bits_of_magnitude(line[k * stride]);
        largest = bits > largest ? bits : largest;
      }
  }
  uint64_t maximum = team.maximum(largest);
  // Other groups may still read the scratch memory for the previous matrix.
  team.barrier(At<11>());
  if (team.is_leader()) maxima[team.rank()] = maximum;
  team.barrier(At<1>());
  for (int g = 0; g < team.size(); g++) maximum = maxima[g] > maximum ? maxima[g] : maximum;
  Scale<Real> scale{1, 1, 0, maximum < Format<In>::INFINITE, maximum == 0};
  if (scale.finite && !scale.zero) {
    scale.exponent = exponent_of(value_of_bits(maximum, In()));
    const int half = scale.exponent / 2;
    scale.first = power_of_two(-half, Real());
    scale.second = power_of_two(half - scale.exponent, Real());
  }
  return scale;
}

// Layout of DEPTH columns of the matrix, transposed and split into panels of COLUMNS rows.
template <class Team, class Real>
struct PackedColumns {
  static constexpr int DEPTH = Team::PACK_DEPTH;
  static constexpr int COLUMNS = 2 * width<Team, Real>;  // two vectors of columns of G
  static constexpr int STRIDE = COLUMNS + Team::PAD;

  FEATKD_HOST_DEVICE static int panels(int n) { return (n + COLUMNS - 1) / COLUMNS; }
  FEATKD_HOST_DEVICE static size_t elements(int n) { return size_t(panels(n)) * DEPTH * STRIDE; }
};

// Packs columns [k0, k0 + depth) of the scaled matrix. Within a panel, the elements of one column
// are contiguous. The first call also zeroes the padding rows.
template <class Real, class In, class Team>
FEATKD_INLINE void pack_columns(Team team, const MatrixView<In>& x, int64_t k0, int depth,
                                Scale<Real> scale, Real* packed) {
  using S = PackedColumns<Team, Real>;
  const int padded = S::panels(x.rows) * S::COLUMNS;
  const bool along = x.column_stride <= x.row_stride;
  if (along) {
    for (int i = team.rank(); i < (k0 == 0 ? padded : x.rows); i += team.size()) {
      Real* to = packed + i / S::COLUMNS * (S::DEPTH * S::STRIDE) + i % S::COLUMNS;
      // On a CPU, separate loops let the compiler convert and scale contiguous elements in vectors.
      if constexpr (!Team::PACKED)
        if (x.column_stride == 1 && i < x.rows) {
          const In* line = x.data + i * x.row_stride + k0;
          Real scaled[S::DEPTH];
          for (int k = 0; k < depth; k++) scaled[k] = widen(line[k]) * scale.first * scale.second;
          for (int k = 0; k < depth; k++) to[k * S::STRIDE] = scaled[k];
          continue;
        }
      for (int k = team.lane(); k < depth; k += team.lanes())
        to[k * S::STRIDE] = i < x.rows ? x.at(i, k0 + k) * scale.first * scale.second : Real(0);
    }
  } else {
    for (int k = team.rank(); k < depth; k += team.size())
      for (int p = 0; p < S::panels(x.rows); p++) {
        Real* to = packed + (p * S::DEPTH + k) * S::STRIDE;
        for (int i = team.lane(); i < S::COLUMNS; i += team.lanes()) {
          const int row = p * S::COLUMNS + i;
          to[i] = row < x.rows ? x.at(row, k0 + k) * scale.first * scale.second : Real(0);
        }
      }
  }
}

// Adds the packed columns' contribution to rows [i0, i0 + GRAM_ROWS) of G, in one panel's columns.
// Partial sums over CHUNK terms limit the rounding error.
template <class Real, class Sum, class Team>
FEATKD_INLINE void gram_tile(Team team, const Real* packed, int depth, int i0, int panel, bool add,
                             LowerTriangle<Team, Sum> g) {
  using S = PackedColumns<Team, Real>;
  constexpr int R = Team::GRAM_ROWS, L = width<Team, Real>, CHUNK = 16;
  Lane<Team, Real> totals[R][2];
  FEATKD_UNROLLED
  for (int r = 0; r < R; r++) totals[r][0] = totals[r][1] = team.splat(Real(0));
  const Real* column = packed + panel * (S::DEPTH * S::STRIDE);
  const Real* row = packed + i0 / S::COLUMNS * (S::DEPTH * S::STRIDE) + i0 % S::COLUMNS;
  for (int k0 = 0; k0 < depth; k0 += CHUNK) {
    const int end = depth - k0 < CHUNK ? depth - k0 : CHUNK;
    Lane<Team, Real> sums[R][2];
    FEATKD_UNROLLED
    for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = team.splat(Real(0));
    for (int k = 0; k < end; k++, column += S::STRIDE, row += S::STRIDE) {
      const auto left = team.load(column), right = team.load(column + L);
      FEATKD_UNROLLED
      for (int r = 0; r < R; r++) {
        const auto each = team.splat(row[r]);
        sums[r][0] += each * left;
        sums[r][1] += each * right;
      }
    }
    FEATKD_UNROLLED
    for (int r = 0; r < R; r++) {
      totals[r][0] += sums[r][0];
      totals[r][1] += sums[r][1];
    }
  }
  FEATKD_UNROLLED
  for (int r = 0; r < R; r++) FEATKD_UNROLLED
  for (int c = 0; c < 2; c++) {
    const int i = i0 + r, j = panel * S::COLUMNS + c * L, count = i + 1 - j;
    if (i < g.n && count > 0) team.accumulate(g.row(i) + j, totals[r][c], count, add);
  }
}

// G = (s X)(s X)^T for the scale s, added up in the type Sum, which on a CPU is float64. Ends
// with a barrier.
template <class Real, class Sum, class In, class Team>
FEATKD_INLINE void gram(Team team, const MatrixView<In>& x, Scale<Real> scale, Real* packed,
                        LowerTriangle<Team, Sum> g) {
  using S = PackedColumns<Team, Real>;
  constexpr int R = Team::GRAM_ROWS;
  static_assert(S::COLUMNS % R == 0, "a tile must not cross panels");
  const int tiles = (x.rows + R - 1) / R;
  for (int64_t k0 = 0; k0 < x.columns; k0 += S::DEPTH) {
    const int depth = x.columns - k0 < S::DEPTH ? int(x.columns - k0) : S::DEPTH;
    pack_columns(team, x, k0, depth, scale, packed);
    team.barrier(At<2>());
    int number = 0;
    for (int panel = 0; panel < S::panels(x.rows); panel++)
      for (int tile = panel * (S::COLUMNS / R); tile < tiles; tile++, number++)
        if (number % team.size() == team.rank())
          gram_tile(team, packed, depth, tile * R, panel, k0 > 0, g);
    team.barrier(At<3>());
  }
}

}  // namespace featkd::FEATKD_ISA
