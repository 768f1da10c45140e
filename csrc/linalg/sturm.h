// Eigenvalues of a symmetric tridiagonal matrix by Sturm counts, every one of them by itself.
#pragma once

#include "tridiagonal.h"

namespace featkd::FEATKD_ISA {

// The minor after `minor` takes the place of the one before it.
template <int U, class Team, class Count>
FEATKD_INLINE void step_minors(Team team, double d, double e2, const Lane<Team, double> (&x)[U],
                               const Lane<Team, double> (&minor)[U],
                               Lane<Team, double> (&before)[U], Count (&counts)[U]) {
  const auto di = team.splat(d), ei = team.splat(e2);
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) {
    before[c] = (di - x[c]) * minor[c] - ei * before[c];
    counts[c] += team.unlike(before[c], minor[c]);
  }
}

// How many eigenvalues lie below each x, in float64: the changes of sign in the leading minors of
// T - x I, p_i = (d_i - x) p_{i-1} - e2_{i-1} p_{i-2}. Their ratios are the pivots below with the
// same rounding errors, without the division that is most of the work. With entries up to 2^40, e2
// from LEAST on and d_i - x zero or, x lying on a grid over the spectrum, from 2^-133 on, ROWS
// steps change the larger of two minors by factors from 2^-950 to 2^331. A minor is zero where a
// pivot is; two in turn are not.
template <int U, class Team, class Count>
FEATKD_INLINE void sturm_counts(Team team, int n, const double* d, const double* e2,
                                const Lane<Team, double> (&x)[U], Count (&counts)[U]) {
  constexpr int ROWS = 8;
  Lane<Team, double> minor[U], before[U];
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) {
    before[c] = team.splat(1.0);
    minor[c] = team.splat(d[0]) - x[c];
    counts[c] = team.signs(minor[c]);
  }
  int i = 1;
  for (; i + ROWS <= n; i += ROWS) {
    FEATKD_UNROLLED
    for (int r = 0; r < ROWS; r += 2) {
      step_minors<U>(team, d[i + r], e2[i + r - 1], x, minor, before, counts);
      step_minors<U>(team, d[i + r + 1], e2[i + r], x, before, minor, counts);
    }
    FEATKD_UNROLLED
    for (int c = 0; c < U; c++) team.scale(minor[c], before[c]);
  }
  for (; i + 1 < n; i += 2) {
    step_minors<U>(team, d[i], e2[i - 1], x, minor, before, counts);
    step_minors<U>(team, d[i + 1], e2[i], x, before, minor, counts);
  }
  if (i < n) step_minors<U>(team, d[i], e2[i - 1], x, minor, before, counts);
}

// The same in float32, whose range is too small for minors: the negative pivots of
// T - x I = L D L^T. A zero pivot makes the next one minus infinity and the one after that plain
// again, so that no pivot needs a test; for this e2 must not be zero, nor huge. The sign bit tells
// -0 from +0 consistently.
template <int U, class Team, class Count>
FEATKD_INLINE void sturm_counts(Team team, int n, const float* d, const float* e2,
                                const Lane<Team, float> (&x)[U], Count (&counts)[U]) {
  using V = Lane<Team, float>;
  V pivot[U];
  FEATKD_UNROLLED
  for (int c = 0; c < U; c++) {
    pivot[c] = team.splat(d[0]) - x[c];
    counts[c] = team.signs(pivot[c]);
  }
  for (int i = 1; i < n; i++) {
    const V di = team.splat(d[i]), ei = team.splat(e2[i - 1]);
    FEATKD_UNROLLED
    for (int c = 0; c < U; c++) {
      pivot[c] = (di - x[c]) - ei / pivot[c];
      counts[c] += team.signs(pivot[c]);
    }
  }
}

// Where the eigenvalues lie, and how narrow an interval is asked for.
template <class Real>
struct Search {
  Real bound, low, step;  // all lie in [low, low + (points + 1) step], near [0, bound]
  Real finest;            // interval that ends every search
  Real relative;  // one of relative sqrt(lambda bound) ends it too: that much of sqrt(lambda)
  int points;
};

// Counts at U vectors of the points low + (p + 1) step, from p0 on.
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

// Eigenvalues m, counted from below, of U vectors from m0 on. The counts at the points place each
// in an interval at once; bisections do the rest.
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
    const Real least = team.first(lower[0], Real());  // of these eigenvalues, which ascend
    const Real asked = least > 0 ? s.relative * root(least * s.bound) : 0;
    if (step <= s.finest || step <= asked) break;
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

// `count` vectors, at most U, of points (values null) or eigenvalues.
template <int U, class Real, class Team>
FEATKD_INLINE void search(Team team, int count, int n, const Real* d, const Real* e2,
                          const Search<Real>& s, int first, Real* counts, Real* values) {
  if (count < U) {
    if constexpr (U > 1) search<U - 1>(team, count, n, d, e2, s, first, counts, values);
  } else if (values == nullptr) {
    count_points<U>(team, n, d, e2, s, first, counts);
  } else {
    bisect<U>(team, n, d, e2, s, counts, first, values);
  }
}

// All eigenvalues, ascending, to `values`; `counts` and `values` have room for whole vectors.
// Needs a barrier before and after.
template <class Real, class Team>
FEATKD_INLINE void sturm(Team team, int n, const Real* d, const Real* e2, Real relative,
                         Real* counts, Real* values) {
  constexpr int L = width<Team, Real>, U = Team::UNROLL;
  Search<Real> s;
  s.bound = 0;  // |lambda| <= the largest row sum of |T|
  Real before = 0;
  for (int i = 0; i < n; i++) {
    const Real after = i + 1 < n ? root(e2[i]) : 0, row = magnitude(d[i]) + before + after;
    s.bound = row > s.bound ? row : s.bound;
    before = after;
  }
  const int vectors = (n + L - 1) / L;
  const Real rounding = s.bound * power_of_two(-Limits<Real>::BITS, Real());
  s.points = vectors * L;
  // T has no eigenvalue far below zero: it comes from a Gram matrix
  s.low = -2 * Real(n) * rounding;
  s.step = (s.bound - 2 * s.low) / Real(s.points + 1);
  s.finest = 2 * rounding / Real(n);  // n equal eigenvalues err alike, and their errors add up
  s.relative = relative;
  for (int c = team.rank() * U; c < vectors; c += team.size() * U)
    search<U>(team, vectors - c < U ? vectors - c : U, n, d, e2, s, c * L, counts, (Real*)nullptr);
  team.barrier(At<8>());
  for (int c = team.rank() * U; c < vectors; c += team.size() * U)
    search<U>(team, vectors - c < U ? vectors - c : U, n, d, e2, s, c * L, counts, values);
}

}  // namespace featkd::FEATKD_ISA
