// Householder tridiagonalisation of a symmetric matrix, from the last row to the first.
#pragma once

#include "gram.h"

namespace featkd::FEATKD_ISA {

// Scratch vectors of `length` numbers each, initially zero.
template <class Real>
struct Vectors {
  Real *u, *old_u, *w, *y, *row, *row_sums, *partial, *total;
  double *dots, *norms;  // one per group
  int length;

  // Six vectors; per group, two vectors of sums and two numbers.
  FEATKD_HOST_DEVICE static size_t elements(int length, int groups) {
    const size_t numbers = 2 * (size_t(groups + 7) / 8 * 8);
    return size_t(length) * (6 + 2 * groups) + numbers * (sizeof(double) / sizeof(Real));
  }
  FEATKD_INLINE Vectors(Real* memory, int length, int groups)
      : u(memory),
        old_u(memory + length),
        w(memory + 2 * length),
        y(memory + 3 * length),
        row(memory + 4 * length),
        row_sums(memory + 5 * length),
        partial(memory + 6 * length),
        total(memory + (6 + groups) * length),
        dots(reinterpret_cast<double*>(memory + (6 + 2 * groups) * length)),
        norms(dots + (groups + 7) / 8 * 8),
        length(length) {}
};

// Updates rows [i0, i0 + R), A -= v w^T + w v^T, and adds their contribution to y = A u: sums along
// the rows, and sums down the columns for the half of A that is not stored.
template <int R, class Real, class Team>
FEATKD_INLINE void update_rows(Team team, int i0, LowerTriangle<Team, Real> a,
                               const Vectors<Real>& s, Real* partial) {
  constexpr int L = width<Team, Real>;
  using V = Lane<Team, Real>;
  const Real* v = s.old_u;
  V v_row[R], w_row[R], u_row[R], sums[R];
  Real* rows[R];
  FEATKD_UNROLLED
  for (int r = 0; r < R; r++) {
    v_row[r] = team.splat(v[i0 + r]);
    w_row[r] = team.splat(s.w[i0 + r]);
    u_row[r] = team.splat(s.u[i0 + r]);
    sums[r] = team.splat(Real(0));
    rows[r] = a.row(i0 + r);
  }
  int j = 0;
  for (; j + L <= i0; j += L) {
    const V vj = team.load(v + j), wj = team.load(s.w + j), uj = team.load(s.u + j);
    V yj = team.load(partial + j);
    FEATKD_UNROLLED
    for (int r = 0; r < R; r++) {
      const V entry = team.load(rows[r] + j) - v_row[r] * wj - w_row[r] * vj;
      team.store(rows[r] + j, entry);
      sums[r] += entry * uj;
      yj += entry * u_row[r];
    }
    team.store(partial + j, yj);
  }
  for (; j < i0 + R; j += L) {  // vectors that contain diagonal entries
    const V vj = team.load(v + j), wj = team.load(s.w + j), uj = team.load(s.u + j);
    const V lane = team.iota(Real()), zero = team.splat(Real(0));
    V yj = team.load(partial + j);
    FEATKD_UNROLLED
    for (int r = 0; r < R; r++) {
      const int count = i0 + r + 1 - j;
      if (count <= 0) continue;
      const V moved = team.load_upto(rows[r] + j, count) - v_row[r] * wj - w_row[r] * vj;
      const V entry = lane < team.splat(Real(count)) ? moved : zero;
      team.store_upto(rows[r] + j, entry, count);
      sums[r] += entry * uj;
      yj += lane < team.splat(Real(count - 1)) ? entry * u_row[r] : zero;
    }
    team.store(partial + j, yj);
  }
  FEATKD_UNROLLED
  for (int r = 0; r < R; r++) {
    const Real total = team.sum(sums[r]);
    if (team.is_leader()) s.row_sums[i0 + r] = total;
  }
}

// Updates the k leading rows and multiplies them by u in one pass. A group has the same blocks of
// rows in every pass. Column sums are restarted every 32 rows, because the rounding errors of a
// long sum of equal terms have the same sign.
template <class Real, class Team>
FEATKD_INLINE void update_and_multiply(Team team, int k, LowerTriangle<Team, Real> a,
                                       const Vectors<Real>& s) {
  constexpr int R = Team::ROWS, L = width<Team, Real>, MOST = 32 / R;
  Real *partial = s.partial + team.rank() * s.length, *total = s.total + team.rank() * s.length;
  const Lane<Team, Real> zero = team.splat(Real(0));
  for (int j = 0; j < k; j += L) {
    team.store(partial + j, zero);
    team.store(total + j, zero);
  }
  int done = 0;
  for (int block = team.rank(); block * R < k; block += team.size()) {
    if (block * R + R <= k)
      update_rows<R>(team, block * R, a, s, partial);
    else
      for (int i = block * R; i < k; i++) update_rows<1>(team, i, a, s, partial);
    if (++done == MOST || (block + team.size()) * R >= k) {
      for (int j = 0; j < block * R + R; j += L) {
        team.store(total + j, team.load(total + j) + team.load(partial + j));
        team.store(partial + j, zero);
      }
      done = 0;
    }
  }
}

// Reduces `a` to a tridiagonal matrix with the diagonal d and the squared off-diagonals e2, which
// are at least E2_FLOOR; overwrites `a`. Needs a barrier before, and ends with one.
//
// With H = I - tau u u^T, a step is A <- H A H = A - u w^T - w u^T, where y = A u and
// w = tau (y - tau/2 (y.u) u). The update is delayed to the pass of the next step, which multiplies
// each entry by the next u as it is written; so a step reads and writes A once. The work of order n
// in a step is done in float64: with a rounded tau, H is not orthogonal and shifts the whole
// spectrum.
template <class Real, class Team>
FEATKD_INLINE void tridiagonalise(Team team, LowerTriangle<Team, Real> a, Vectors<Real> s, Real* d,
                                  Real* e2) {
  constexpr int L = width<Team, Real>;
  using V = Lane<Team, Real>;
  using W = typename Team::template WideOf<Real>;
  const V lane = team.iota(Real()), zero = team.splat(Real(0));
  double tau = 0;
  for (int k = a.n; k >= 1; k--) {  // rows [0, k) remain; this step reduces row k - 1
    W dots = team.widen(zero);
    for (int j = team.rank() * L; j < k; j += team.size() * L) {
      V y = team.load(s.row_sums + j);
      for (int g = 0; g < team.size(); g++) y += team.load(s.total + g * s.length + j);
      y = lane < team.splat(Real(k - j)) ? y : zero;
      team.store(s.y + j, y);
      dots += team.widen(y) * team.widen(team.load(s.u + j));
    }
    const double dot = team.sum(dots);
    if (team.is_leader()) s.dots[team.rank()] = dot;
    team.barrier(At<4>());

    double product = 0;
    for (int g = 0; g < team.size(); g++) product += s.dots[g];
    const double half = tau * product / 2;
    const double u_last = s.u[k - 1], w_last = tau * (s.y[k - 1] - half * u_last);
    const Real* last = a.row(k - 1);
    W squares = team.widen(zero);
    for (int j = team.rank() * L; j < k; j += team.size() * L) {
      const W u = team.widen(team.load(s.u + j));
      const W w = tau * (team.widen(team.load(s.y + j)) - half * u);
      const W entry = team.widen(team.load_upto(last + j, k - j));
      const V row = team.narrow(entry - u_last * w - w_last * u, Real());
      team.store(s.w + j, team.narrow(w, Real()));
      team.store(s.row + j, row);
      const W counted = team.widen(lane < team.splat(Real(k - 2 - j)) ? row : zero);
      squares += counted * counted;
    }
    const double norm = team.sum(squares);
    if (team.is_leader()) s.norms[team.rank()] = norm;
    team.barrier(At<5>());

    double rest = 0;
    for (int g = 0; g < team.size(); g++) rest += s.norms[g];
    const double alpha = k > 1 ? s.row[k - 2] : 0;
    const double length2 = alpha * alpha + rest;
    const bool reflect = rest > double(Limits<Real>::TINY);
    const double beta = alpha > 0 ? -square_root(length2) : square_root(length2);
    const Real factor = reflect ? Real(1 / (alpha - beta)) : Real(0);
    tau = reflect ? (beta - alpha) / beta : 0;
    for (int j = team.rank() * L; j < s.length; j += team.size() * L) {
      const V scaled = factor * team.load(s.row + j);
      const V one = lane < team.splat(Real(k - 1 - j)) ? team.splat(Real(reflect)) : zero;
      team.store(s.old_u + j, lane < team.splat(Real(k - 2 - j)) ? scaled : one);
    }
    if (team.rank() == 0 && team.is_leader()) {
      d[k - 1] = s.row[k - 1];
      const Real e = Real(reflect ? length2 : alpha * alpha);
      if (k > 1) e2[k - 2] = e > Limits<Real>::E2_FLOOR ? e : Limits<Real>::E2_FLOOR;
    }
    Real* swapped = s.u;
    s.u = s.old_u;
    s.old_u = swapped;
    team.barrier(At<6>());

    update_and_multiply(team, k - 1, a, s);
    team.barrier(At<7>());
  }
}

}  // namespace featkd::FEATKD_ISA
