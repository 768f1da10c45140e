// Eigenvalues of a symmetric tridiagonal matrix by bisection with Sturm counts.
#pragma once

#include "tridiagonal.h"

namespace featkd::FEATKD_ISA {

// Computes the leading minor after `minor` and writes it over `before`, the one before `minor`.
template <int U, class Team, class Count>
FEATKD_INLINE void step_minors(Team team, double d, double e2, const Lane<Team, double> (&x)[U],
                               const Lane<Team, double> (&minor)[U],
                               Lane<Team, double> (&before)[U], Count (&counts)[U]) {
  const auto di = team.splat(d), ei = team.splat(e2);
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) {
    before[c] = (di - x[c]) * minor[c] - ei * before[c];
    counts[c] += team.signs_differ(before[c], minor[c]);
  }
}

// Counts the eigenvalues below each x in float64: the sign changes in the leading minors
// p_i = (d_i - x) p_{i-1} - e2_{i-1} p_{i-2} of T - x I. Ratios of minors are the pivots of the
// float32 version below, with the same rounding errors but without divisions, which dominate its
// cost.
//
// Minors are rescaled every ROWS steps, which excludes overflow and underflow: entries are at most
// 2^40, e2 is at least E2_FLOOR, and d_i - x is zero or at least 2^-133 because x lies on a grid
// over the spectrum. So ROWS steps change the larger of two minors by factors from 2^-950 to 2^331.
// Two consecutive minors are never both zero.
template <int U, class Team, class Count>
FEATKD_INLINE void sturm_counts(Team team, int n, const double* d, const double* e2,
                                const Lane<Team, double> (&x)[U], Count (&counts)[U]) {
  constexpr int ROWS = 8;
  Lane<Team, double> minor[U], before[U];
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) {
    before[c] = team.splat(1.0);
    minor[c] = team.splat(d[0]) - x[c];
    counts[c] = team.sign_bits(minor[c]);
  }
  int i = 1;
  for (; i + ROWS <= n; i += ROWS) {
    FEATKD_UNROLLED
    for (int r = 0; r < ROWS; r += 2) {
      step_minors<U>(team, d[i + r], e2[i + r - 1], x, minor, before, counts);
      step_minors<U>(team, d[i + r + 1], e2[i + r], x, before, minor, counts);
    }
    FEATKD_UNROLLED
    for (int c = 0; c < U; c++) team.normalize(minor[c], before[c]);
  }
  for (; i + 1 < n; i += 2) {
    step_minors<U>(team, d[i], e2[i - 1], x, minor, before, counts);
    step_minors<U>(team, d[i + 1], e2[i], x, before, minor, counts);
  }
  if (i < n) step_minors<U>(team, d[i], e2[i - 1], x, minor, before, counts);
}

// The same in float32, whose range is too small for minors: counts the negative pivots of
// T - x I = L D L^T. A zero pivot makes the next one minus infinity and the one after that finite
// again, so no pivot needs a test; this requires that e2 is neither zero nor huge. The sign bit
// distinguishes -0 from +0 consistently.
template <int U, class Team, class Count>
FEATKD_INLINE void sturm_counts(Team team, int n, const float* d, const float* e2,
                                const Lane<Team, float> (&x)[U], Count (&counts)[U]) {
  using V = Lane<Team, float>;
  V pivot[U];
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) {
    pivot[c] = team.splat(d[0]) - x[c];
    counts[c] = team.sign_bits(pivot[c]);
  }
  for (int i = 1; i < n; i++) {
    const V di = team.splat(d[i]), ei = team.splat(e2[i - 1]);
    FEATKD_UNROLLED
    for (int c = 0; c < U; c++) {
      pivot[c] = (di - x[c]) - ei / pivot[c];
      counts[c] += team.sign_bits(pivot[c]);
    }
  }
}

// Grid over the spectrum, and the interval widths at which a bisection ends.
template <class Real>
struct Search {
  Real bound, low, step;    // all eigenvalues lie in [low, low + (points + 1) step]
  Real finest;              // width that ends every search
  Real relative_tolerance;  // so does relative_tolerance * sqrt(lambda * bound)
  int points;
};

// Writes the Sturm counts of the grid points low + (p + 1) step for U vectors of p, from p0 on.
template <int U, class Real, class Team>
FEATKD_INLINE void count_points(Team team, int n, const Real* d, const Real* e2,
                                const Search<Real>& s, int p0, Real* counts) {
  constexpr int L = width<Team, Real>;
  Lane<Team, Real> x[U];
  typename Team::template CountOf<Real> found[U];
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++)
    x[c] = team.splat(s.low) + (team.iota(Real()) + team.splat(Real(p0 + c * L + 1))) * s.step;
  sturm_counts<U>(team, n, d, e2, x, found);
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) team.store(counts + p0 + c * L, team.as_real(found[c], Real()));
}

// Computes U vectors of eigenvalues, from index m0 on in ascending order. The counts at the grid
// points give the initial interval of each eigenvalue; bisection narrows it.
template <int U, class Real, class Team>
FEATKD_INLINE void bisect(Team team, int n, const Real* d, const Real* e2, const Search<Real>& s,
                          const Real* counts, int m0, Real* values) {
  constexpr int L = width<Team, Real>;
  using V = Lane<Team, Real>;
  V index[U], lower[U], x[U];
  typename Team::template CountOf<Real> found[U];
  const V zero = team.splat(Real(0)), one = team.splat(Real(1));
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) {
    index[c] = team.iota(Real()) + team.splat(Real(m0 + c * L));
    lower[c] = zero;
  }
  for (int p = 0; p < s.points; p++) {
    const V count = team.splat(counts[p]);
    FEATKD_UNROLLED
    for (int c = 0; c < U; c++) lower[c] += count <= index[c] ? one : zero;
  }
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) lower[c] = team.splat(s.low) + lower[c] * s.step;
  Real step = s.step;
  while (true) {
    const Real lowest = team.first_lane(lower[0], Real());  // eigenvalues ascend
    const Real tolerance = lowest > 0 ? s.relative_tolerance * square_root(lowest * s.bound) : 0;
    if (step <= s.finest || step <= tolerance) break;
    step /= 2;
    FEATKD_UNROLLED
    for (int c = 0; c < U; c++) x[c] = lower[c] + step;
    sturm_counts<U>(team, n, d, e2, x, found);
    FEATKD_UNROLLED
    for (int c = 0; c < U; c++)
      lower[c] = team.as_real(found[c], Real()) <= index[c] ? x[c] : lower[c];
  }
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++)
    team.store_upto(values + m0 + c * L, lower[c] + step / 2, n - (m0 + c * L));
}

// Processes `count` <= U vectors: of grid points if `values` is null, otherwise of eigenvalues.
template <int U, class Real, class Team>
FEATKD_INLINE void search_vectors(Team team, int count, int n, const Real* d, const Real* e2,
                                  const Search<Real>& s, int first, Real* counts, Real* values) {
  if (count < U) {
    if constexpr (U > 1) search_vectors<U - 1>(team, count, n, d, e2, s, first, counts, values);
  } else if (values == nullptr) {
    count_points<U>(team, n, d, e2, s, first, counts);
  } else {
    bisect<U>(team, n, d, e2, s, counts, first, values);
  }
}

// Writes all eigenvalues in ascending order to `values`. `counts` and `values` are padded to whole
// vectors. The caller needs a barrier before and after.
template <class Real, class Team>
FEATKD_INLINE void sturm(Team team, int n, const Real* d, const Real* e2, Real relative_tolerance,
                         Real* counts, Real* values) {
  constexpr int L = width<Team, Real>, U = Team::UNROLL;
  Search<Real> s;
  s.bound = 0;  // |lambda| <= the largest row sum of |T|
  Real before = 0;
  for (int i = 0; i < n; i++) {
    const Real after = i + 1 < n ? square_root(e2[i]) : 0, row = magnitude(d[i]) + before + after;
    s.bound = row > s.bound ? row : s.bound;
    before = after;
  }
  const int vectors = (n + L - 1) / L;
  const Real rounding = s.bound * power_of_two(-Limits<Real>::BITS, Real());
  s.points = vectors * L;
  // A Gram matrix has no negative eigenvalues beyond rounding.
  s.low = -2 * Real(n) * rounding;
  s.step = (s.bound - 2 * s.low) / Real(s.points + 1);
  s.finest = 2 * rounding / Real(n);  // n equal eigenvalues have equal errors, which add up
  s.relative_tolerance = relative_tolerance;
  for (int c = team.rank() * U; c < vectors; c += team.size() * U)
    search_vectors<U>(team, vectors - c < U ? vectors - c : U, n, d, e2, s, c * L, counts,
                      (Real*)nullptr);
  team.barrier(At<8>());
  for (int c = team.rank() * U; c < vectors; c += team.size() * U)
    search_vectors<U>(team, vectors - c < U ? vectors - c : U, n, d, e2, s, c * L, counts, values);
}

}  // namespace featkd::FEATKD_ISA
