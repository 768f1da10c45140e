// One-sided Jacobi: rotates pairs of rows of a matrix until all rows are orthogonal. The rows are
// then s_i v_i^T. Each s_i has a small relative error however small it is; a Gram matrix cannot
// give that.
//
// A sweep rotates the pairs (p, q), q > p, in the order of two nested loops. Only pairs with a
// common row depend on each other, so pairs with the same p + q can be rotated in parallel with
// bitwise the same result. A pass keeps a band of rows p in staging memory, one per group, and
// moves the rows q past it: in each round the first group works on row q, the second one on row q -
// 1, and so on. A sweep thus reads and writes n^2 / (2 BAND) rows of global memory instead of n^2
// / 2.
#pragma once

#include "numbers.h"

namespace featkd::FEATKD_ISA {

constexpr int MAX_SWEEPS = 60;
constexpr int BAND = 8;  // rows in a band: one per warp of a block

template <class Real>
struct Orthogonality;
template <>
struct Orthogonality<double> {
  // Rows count as orthogonal if their cosine is at most this, times sqrt(length).
  static constexpr double MAX_COSINE = 0x1p-51;
  // Rows with a smaller squared length are treated as zero: dot products with them may underflow.
  static constexpr double NEGLIGIBLE = 1e-270;
};

// `count` rows of a matrix and of its accumulated rotations. `length` is a multiple of a vector.
template <class Real>
struct Band {
  Real *rows, *rotations;
  int count, length;

  FEATKD_INLINE Real* row(int k) const { return rows + k * length; }
  FEATKD_INLINE Real* rotation(int k) const { return rotations + k * length; }
  FEATKD_INLINE int bands() const { return (count + BAND - 1) / BAND; }
  FEATKD_INLINE Band from(int b) const {
    return {row(b * BAND), rotation(b * BAND), count - b * BAND, length};
  }
  FEATKD_INLINE Band part(int b) const {
    Band found = from(b);
    found.count = found.count < BAND ? found.count : BAND;
    return found;
  }
};

// Scratch memory of a team: a flag per group and, if the team works on copies, three bands: the
// band of the pass and two of the bands that move past it.
template <class Team, class Real>
struct JacobiScratch {
  int32_t* rotated;  // per group: 1 if it rotated a pair in this sweep
  Real* staging;

  FEATKD_HOST_DEVICE static size_t flag_bytes(int groups) { return size_t(groups + 15) / 16 * 64; }
  FEATKD_HOST_DEVICE static size_t bytes(int length, int groups) {
    return flag_bytes(groups) + size_t(Team::STAGED) * 6 * BAND * length * sizeof(Real);
  }
  FEATKD_INLINE JacobiScratch(void* memory, int groups)
      : rotated(static_cast<int32_t*>(memory)),
        staging(reinterpret_cast<Real*>(static_cast<char*>(memory) + flag_bytes(groups))) {}
};

// One pass: the rows from its band on, and the staging memory. Band 0 is the band of the pass. In
// all passes, the same lanes of the same group load and store a given row, so global memory needs
// no barrier.
template <class Team, class Real>
struct Pass {
  Band<Real> rest;
  Real* staging;

  FEATKD_INLINE Band<Real> staged(int c) const {  // the copy in staging memory
    const int place = c == 0 ? 0 : 1 + c % 2, size = BAND * rest.length;
    Real* rows = staging + place * 2 * size;
    return {rows, rows + size, rest.part(c).count, rest.length};
  }
  FEATKD_INLINE void load_band(Team team, int c) const { copy(team, rest.part(c), staged(c)); }
  FEATKD_INLINE void store_band(Team team, int c) const { copy(team, staged(c), rest.part(c)); }
  FEATKD_INLINE static void copy(Team team, const Band<Real>& from, const Band<Real>& to) {
    constexpr int L = width<Team, Real>;
    for (int k = team.rank(); k < from.count; k += team.size())
      for (int j = 0; j < from.length; j += L) {
        team.store(to.row(k) + j, team.load(from.row(k) + j));
        team.store(to.rotation(k) + j, team.load(from.rotation(k) + j));
      }
  }
};

template <class Team, class Real>
FEATKD_INLINE void rotate_rows(Team team, Real c, Real s, Real* p, Real* q, int length) {
  constexpr int L = width<Team, Real>;
  for (int j = 0; j < length; j += L) {
    const auto a = team.load(p + j), b = team.load(q + j);
    team.store(p + j, c * a - s * b);
    team.store(q + j, s * a + c * b);
  }
}

// Makes row i of one band and row k of another orthogonal, the longer one first, and applies the
// same rotation to the accumulated rotations. Returns false if the rows were left as they are.
template <class Team, class Real>
FEATKD_INLINE bool rotate_pair(Team team, const Band<Real>& one, int i, const Band<Real>& other,
                               int k) {
  constexpr int L = width<Team, Real>;
  using V = Lane<Team, Real>;
  Real *p = one.row(i), *q = other.row(k);
  V pp = team.splat(Real(0)), qq = pp, pq = pp;
  for (int j = 0; j < one.length; j += L) {
    const V a = team.load(p + j), b = team.load(q + j);
    pp += a * a;
    qq += b * b;
    pq += a * b;
  }
  const Real alpha = team.sum(pp), beta = team.sum(qq), gamma = team.sum(pq);
  const Real max_cosine = Orthogonality<Real>::MAX_COSINE * square_root(Real(one.length));
  const Real negligible = Orthogonality<Real>::NEGLIGIBLE;
  const bool needs_rotation =
      alpha > negligible && beta > negligible &&
      magnitude(gamma) > max_cosine * square_root(alpha) * square_root(beta);
  if (!needs_rotation && alpha >= beta) return false;
  Real c = 0, s = 1;  // the rotation that exchanges the rows
  if (needs_rotation) {
    const Real zeta = (beta - alpha) / (2 * gamma);
    const Real size = 1 / (magnitude(zeta) + square_root(1 + zeta * zeta));
    const Real t = zeta < 0 ? -size : size;
    c = 1 / square_root(1 + t * t);
    s = c * t;
    if (alpha - t * gamma < beta + t * gamma) {  // the other solution, which exchanges the rows
      const Real kept = c;
      c = -s;
      s = kept;
    }
  }
  rotate_rows(team, c, s, p, q, one.length);
  rotate_rows(team, c, s, one.rotation(i), other.rotation(k), one.length);
  return true;
}

// Rotates all pairs of a row in the pass's band and a row behind it. Returns whether this group
// rotated any.
template <class Team, class Real>
FEATKD_INLINE bool run_pass(Team team, const Pass<Team, Real>& pass) {
  const int bands = pass.rest.bands();
  bool rotated = false;
  for (int c = 0; c <= bands; c++) {  // the first group enters band c, the last one leaves c - 1
    if (c > 2) pass.store_band(team, c - 2);
    if (c < bands) pass.load_band(team, c);
    // No barrier after loading: in the first round, a group uses only rows that it loaded itself.
    for (int round = 0; round < BAND; round++) {
      for (int k = team.rank(); k < BAND; k += team.size()) {
        const int q = c * BAND + round - k;
        if (k < q && q < pass.rest.count)
          rotated |= rotate_pair(team, pass.staged(0), k, pass.staged(q / BAND), q % BAND);
      }
      team.barrier(At<12>());
    }
  }
  if (bands > 1) pass.store_band(team, bands - 1);
  pass.store_band(team, 0);
  return rotated;
}

// Sweeps over all pairs of rows until they are orthogonal and in descending order. `all.rotations`
// becomes the product of the rotations. Returns the number of sweeps, or MAX_SWEEPS + 1 if the rows
// do not converge.
template <class Team, class Real>
FEATKD_INLINE int jacobi(Team team, const Band<Real>& all,
                         const JacobiScratch<Team, Real>& scratch) {
  constexpr int L = width<Team, Real>;
  const auto zero = team.splat(Real(0)), one = team.splat(Real(1));
  for (int b = 0; b < all.bands(); b++) {
    const Band<Real> band = all.part(b);
    for (int k = team.rank(); k < band.count; k += team.size())
      for (int j = 0; j < all.length; j += L) {
        const auto column = team.iota(Real()) + team.splat(Real(j));
        team.store(band.rotation(k) + j, column == team.splat(Real(b * BAND + k)) ? one : zero);
      }
  }
  for (int sweep = 1; sweep <= MAX_SWEEPS; sweep++) {
    bool rotated = false;
    if constexpr (Team::STAGED)
      for (int b = 0; b < all.bands(); b++)
        rotated |= run_pass(team, Pass<Team, Real>{all.from(b), scratch.staging});
    else  // a single group: plain loops keep row p in its cache
      for (int p = 0; p < all.count; p++)
        for (int q = p + 1; q < all.count; q++) rotated |= rotate_pair(team, all, p, all, q);
    if (team.is_leader()) scratch.rotated[team.rank()] = rotated;
    team.barrier(At<13>());
    bool any = false;
    for (int g = 0; g < team.size(); g++) any |= scratch.rotated[g] != 0;
    if (!any) return sweep;  // the same in all lanes; barrier 12 precedes the next write
  }
  return MAX_SWEEPS + 1;
}

}  // namespace featkd::FEATKD_ISA
