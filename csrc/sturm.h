// Eigenvalues of a symmetric tridiagonal matrix by Sturm counts, every one of them by itself.
#pragma once

#include "tridiagonal.h"

namespace featkd::FEATKD_ISA {

// How many eigenvalues lie below each x: the negative pivots of T - x I = L D L^T. A zero pivot
// makes the next one minus infinity and the one after that plain again, so that no pivot needs a
// test; for this e2 must not be zero, nor huge. The sign bit tells -0 from +0 consistently.
template <int U, class Real, class Team, class Count>
FEATKD_INLINE void sturm_counts(Team team, int n, const Real* d, const Real* e2,
                                const Lane<Team, Real> (&x)[U], Count (&counts)[U]) {
  using V = Lane<Team, Real>;
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

// Eigenvalue m, counted from below, of each lane from m0 on. `counts` are those of the `points`
// equally spaced numbers low + (p + 1) step, which place each eigenvalue in an interval at once;
// bisections do the rest.
template <int U, class Real, class Team>
FEATKD_INLINE void bisect(Team team, int n, const Real* d, const Real* e2, Real low, Real step,
                          const Real* counts, int points, int m0, int sweeps, Real* values) {
  constexpr int L = width<Team, Real>;
  using V = Lane<Team, Real>;
  V index[U], lower[U], x[U];
  typename Team::template CountOf<Real> found[U];
FEATKD_UNROLLED
  for (int c = 0; c < U; c++) {
    index[c] = team.iota(Real()) + team.splat(Real(m0 + c * L));
    lower[c] = team.splat(Real(0));
  }
  const V zero = team.splat(Real(0)), one = team.splat(Real(1));
  for (int p = 0; p < points; p++) {
    const V count = team.splat(counts[p]);
FEATKD_UNROLLED
    for (int c = 0; c < U; c++) lower[c] += count <= index[c] ? one : zero;
  }
FEATKD_UNROLLED
  for (int c = 0; c < U; c++) lower[c] = team.splat(low) + lower[c] * step;
  for (int sweep = 0; sweep < sweeps; sweep++) {
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

// All eigenvalues, ascending, to `values`. `counts` and `values` have room for whole vectors,
// `UNROLL` at a time. Needs a barrier before and after.
template <class Real, class Team>
FEATKD_INLINE void sturm(Team team, int n, const Real* d, const Real* e2, Real* counts,
                         Real* values) {
  constexpr int L = width<Team, Real>, U = Team::UNROLL;
  using V = Lane<Team, Real>;
  Real bound = 0;  // |lambda| <= the largest row sum of |T|
  for (int i = 0; i < n; i++) {
    const Real before = i > 0 ? root(e2[i - 1]) : 0, after = i + 1 < n ? root(e2[i]) : 0;
    const Real row = magnitude(d[i]) + before + after;
    bound = row > bound ? row : bound;
  }
  const int points = (n + L * U - 1) / (L * U) * (L * U);
  // T has no eigenvalue far below zero: it comes from a Gram matrix
  const Real low = -bound * Real(n) * power_of_two(1 - Limits<Real>::BITS, Real());
  const Real step = (bound - 2 * low) / Real(points + 1);
  for (int m0 = team.rank() * L * U; m0 < points; m0 += team.size() * L * U) {
    V x[U];
    typename Team::template CountOf<Real> found[U];
FEATKD_UNROLLED
    for (int c = 0; c < U; c++)
      x[c] = team.splat(low) + (team.iota(Real()) + team.splat(Real(m0 + c * L + 1))) * step;
    sturm_counts<U>(team, n, d, e2, x, found);
FEATKD_UNROLLED
    for (int c = 0; c < U; c++) team.store(counts + m0 + c * L, team.as_real(found[c], Real()));
  }
  team.barrier(8);
  int sweeps = 2;
  for (Real width = step; width > bound * power_of_two(-Limits<Real>::BITS, Real()); width /= 2)
    sweeps++;
  for (int m0 = team.rank() * L * U; m0 < n; m0 += team.size() * L * U)
    bisect<U>(team, n, d, e2, low, step, counts, points, m0, sweeps, values);
}

}  // namespace featkd::FEATKD_ISA
