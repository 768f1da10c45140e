// One-sided Jacobi: turns pairs of a matrix's rows until all are orthogonal. The rows are then
// s_i v_i^T, each with small relative error however small s_i, which no Gram matrix gives.
#pragma once

#include "numbers.h"

namespace featkd::FEATKD_ISA {

constexpr int MOST_SWEEPS = 60;
constexpr double ORTHOGONAL = 0x1p-51;  // cosine of two rows that are left, over sqrt(length)
constexpr double NOTHING = 1e-270;  // squared length, for a largest entry of 1, whose sums underflow

// Rows p and q by the rotation that makes them orthogonal, the longer first; the same to those of
// `turns`. True where there was anything to do. Rows are of `length` numbers, whole vectors.
template <class Team>
FEATKD_INLINE bool turn_pair(Team team, double* p, double* q, double* turns_p, double* turns_q,
                             int length) {
  constexpr int L = width<Team, double>;
  using V = Lane<Team, double>;
  V pp = team.splat(0.0), qq = pp, pq = pp;
  for (int j = 0; j < length; j += L) {
    const V a = team.load(p + j), b = team.load(q + j);
    pp += a * a;
    qq += b * b;
    pq += a * b;
  }
  const double alpha = team.sum(pp), beta = team.sum(qq), gamma = team.sum(pq);
  const double least = ORTHOGONAL * root(double(length));
  const bool apart = alpha > NOTHING && beta > NOTHING &&
                     magnitude(gamma) > least * root(alpha) * root(beta);
  if (!apart && alpha >= beta) return false;
  double c = 0, s = 1;  // an exchange
  if (apart) {
    const double zeta = (beta - alpha) / (2 * gamma);
    const double size = 1 / (magnitude(zeta) + root(1 + zeta * zeta));
    const double t = zeta < 0 ? -size : size;
    c = 1 / root(1 + t * t);
    s = c * t;
    if (alpha - t * gamma < beta + t * gamma) {  // the other solution, a quarter turn on
      const double kept = c;
      c = -s;
      s = kept;
    }
  }
  for (double* rows[2] = {p, q};; rows[0] = turns_p, rows[1] = turns_q) {
    for (int j = 0; j < length; j += L) {
      const V a = team.load(rows[0] + j), b = team.load(rows[1] + j);
      team.store(rows[0] + j, c * a - s * b);
      team.store(rows[1] + j, s * a + c * b);
    }
    if (rows[0] == turns_p) break;
  }
  return true;
}

// Sweeps over all pairs of the n rows until a sweep finds them orthogonal and in descending order.
// Returns the number of sweeps, MOST_SWEEPS + 1 where they do not suffice.
template <class Team>
FEATKD_INLINE int jacobi(Team team, int n, double* rows, double* turns, int length) {
  for (int sweep = 1; sweep <= MOST_SWEEPS; sweep++) {
    bool turned = false;
    for (int p = 0; p < n; p++)
      for (int q = p + 1; q < n; q++)
        turned |= turn_pair(team, rows + p * length, rows + q * length, turns + p * length,
                            turns + q * length, length);
    if (!turned) return sweep;
  }
  return MOST_SWEEPS + 1;
}

}  // namespace featkd::FEATKD_ISA
