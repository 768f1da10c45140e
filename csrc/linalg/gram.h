// The Gram matrix of a matrix's smaller side, and what must be known before: its scale.
#pragma once

#include "numbers.h"

namespace featkd::FEATKD_ISA {

// One matrix of a batch, turned so that it has no more rows than columns.
template <class In>
struct Source {
  const In* data;
  int rows;
  int64_t columns, row_stride, column_stride;

  FEATKD_INLINE auto at(int i, int64_t k) const {
    return widen(data[i * row_stride + k * column_stride]);
  }
};

// A symmetric matrix, of which the entries on and below the diagonal are kept. Packed rows halve
// the memory; a CPU's rows are all of one length instead, and end in whole vectors.
template <class Team, class Real>
struct Lower {
  Real* data;
  int n;

  FEATKD_SIZE static int leading(int n) {  // a multiple of every vector's width, not of 1 KB
    return (n + 15) / 16 * 16 + 16 * ((n + 15) / 16 % 16 == 0);
  }
  FEATKD_SIZE static size_t elements(int n) {
    return Team::PACKED ? size_t(n) * (n + 1) / 2 : size_t(n) * leading(n);
  }
  FEATKD_INLINE Real* row(int i) const {
    return data + (Team::PACKED ? i * (i + 1) / 2 : i * leading(n));
  }
};

// Scale that brings the largest element to [0.5, 1): two powers of two, because one does not reach
// from the smallest subnormal number to 1.
template <class Real>
struct Scale {
  Real first, second;
  int exponent;
  bool finite, zero;
};

// `slots` holds a number for each group.
template <class Real, class In, class Team>
FEATKD_INLINE Scale<Real> find_scale(Team team, const Source<In>& x, uint64_t* slots) {
  // lanes along the dimension whose elements are neighbours
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
  uint64_t most = team.most(largest);
  team.barrier(
      At<11>());  // the slots, and what is behind them, may be in use for the matrix before
  if (team.is_leader()) slots[team.rank()] = most;
  team.barrier(At<1>());
  for (int g = 0; g < team.size(); g++) most = slots[g] > most ? slots[g] : most;
  Scale<Real> scale{1, 1, 0, most < Format<In>::INFINITE, most == 0};
  if (scale.finite && !scale.zero) {
    scale.exponent = exponent_of(widened_bits(most, In()));
    const int half = scale.exponent / 2;
    scale.first = power_of_two(-half, Real());
    scale.second = power_of_two(half - scale.exponent, Real());
  }
  return scale;
}

template <class Team, class Real>
struct Slab {
  static constexpr int DEPTH = Team::SLAB_DEPTH;
  static constexpr int COLUMNS = 2 * width<Team, Real>;  // of G, a panel: two vectors
  static constexpr int STRIDE = COLUMNS + Team::PAD;

  FEATKD_SIZE static int panels(int n) { return (n + COLUMNS - 1) / COLUMNS; }
  FEATKD_SIZE static size_t elements(int n) { return size_t(panels(n)) * DEPTH * STRIDE; }
};

// Columns [k0, k0 + depth) of the scaled matrix, turned: panels of COLUMNS rows of x, in which
// the rows are neighbours. Rows behind the last are zero, from the first slab on.
template <class Real, class In, class Team>
FEATKD_INLINE void fill_slab(Team team, const Source<In>& x, int64_t k0, int depth,
                             Scale<Real> scale, Real* slab) {
  using S = Slab<Team, Real>;
  const int padded = S::panels(x.rows) * S::COLUMNS;
  const bool along = x.column_stride <= x.row_stride;
  if (along) {
    for (int i = team.rank(); i < (k0 == 0 ? padded : x.rows); i += team.size()) {
      Real* to = slab + i / S::COLUMNS * (S::DEPTH * S::STRIDE) + i % S::COLUMNS;
      if constexpr (!Team::PACKED)  // a CPU's vectors convert and scale, where elements lie
                                    // together
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
        Real* to = slab + (p * S::DEPTH + k) * S::STRIDE;
        for (int i = team.lane(); i < S::COLUMNS; i += team.lanes()) {
          const int row = p * S::COLUMNS + i;
          to[i] = row < x.rows ? x.at(row, k0 + k) * scale.first * scale.second : Real(0);
        }
      }
  }
}

// Adds a slab's part of GRAM_ROWS rows of G, from row i0 on, in the columns of a panel.
template <class Real, class Sum, class Team>
FEATKD_INLINE void gram_tile(Team team, const Real* slab, int depth, int i0, int panel, bool add,
                             Lower<Team, Sum> g) {
  using S = Slab<Team, Real>;
  constexpr int R = Team::GRAM_ROWS, L = width<Team, Real>, CHUNK = 16;  // of the sums' depth
  Lane<Team, Real> totals[R][2];
  FEATKD_UNROLLED
  for (int r = 0; r < R; r++) totals[r][0] = totals[r][1] = team.splat(Real(0));
  const Real* column = slab + panel * (S::DEPTH * S::STRIDE);
  const Real* row = slab + i0 / S::COLUMNS * (S::DEPTH * S::STRIDE) + i0 % S::COLUMNS;
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

// G = (s X)(s X)^T for the scale s, of which no slab's part is yet rounded away. Ends with a
// barrier.
template <class Real, class Sum, class In, class Team>
FEATKD_INLINE void gram(Team team, const Source<In>& x, Scale<Real> scale, Real* slab,
                        Lower<Team, Sum> g) {
  using S = Slab<Team, Real>;
  constexpr int R = Team::GRAM_ROWS;
  static_assert(S::COLUMNS % R == 0, "a tile's rows lie in one panel");
  const int tiles = (x.rows + R - 1) / R;
  for (int64_t k0 = 0; k0 < x.columns; k0 += S::DEPTH) {
    const int depth = x.columns - k0 < S::DEPTH ? int(x.columns - k0) : S::DEPTH;
    fill_slab(team, x, k0, depth, scale, slab);
    team.barrier(At<2>());
    int number = 0;
    for (int panel = 0; panel < S::panels(x.rows); panel++)
      for (int tile = panel * (S::COLUMNS / R); tile < tiles; tile++, number++)
        if (number % team.size() == team.rank())
          gram_tile(team, slab, depth, tile * R, panel, k0 > 0, g);
    team.barrier(At<3>());
  }
}

}  // namespace featkd::FEATKD_ISA
