// One-sided Jacobi: turns pairs of a matrix's rows until all are orthogonal. The rows are then
// s_i v_i^T, each with small relative error however small s_i, which no Gram matrix gives.
//
// A sweep has the pairs in the order of two loops, over rows p and q > p. Only pairs that share a
// row depend on each other: those of one p + q can be turned at once, with the two loops' very
// results. A pass has a band of rows p, each a group's own, along which the rows q come one after
// the other: in a round the first group's pair has row q, the second's q - 1 and so on. So a sweep
// takes n^2 / (2 BAND) rows from far memory and gives them back, where the two loops would n^2 / 2.
#pragma once

#include "numbers.h"

namespace featkd::FEATKD_ISA {

constexpr int MOST_SWEEPS = 60;
constexpr int BAND = 8;  // rows, each with a warp of a block

template <class Real>
struct Orthogonality;
template <>
struct Orthogonality<double> {
  static constexpr double COSINE = 0x1p-51;  // of two rows that are left, over sqrt(length)
  static constexpr double NOTHING =
      1e-270;  // squared length, of a largest entry 1, that underflows
};

// `count` rows of a matrix, and as many of its turns, each of `length` numbers: whole vectors.
template <class Real>
struct Band {
  Real *rows, *turns;
  int count, length;

  FEATKD_INLINE Real* row(int k) const { return rows + k * length; }
  FEATKD_INLINE Real* turn(int k) const { return turns + k * length; }
  FEATKD_INLINE int bands() const { return (count + BAND - 1) / BAND; }
  FEATKD_INLINE Band from(int b) const {
    return {row(b * BAND), turn(b * BAND), count - b * BAND, length};
  }
  FEATKD_INLINE Band part(int b) const {
    Band found = from(b);
    found.count = found.count < BAND ? found.count : BAND;
    return found;
  }
};

// A team's scratch memory: what its groups say of a sweep and, where it works on copies, the pass's
// band and two of those that go by it.
template <class Team, class Real>
struct JacobiScratch {
  int32_t* turned;  // one a group
  Real* near;

  FEATKD_SIZE static size_t flag_bytes(int groups) { return size_t(groups + 15) / 16 * 64; }
  FEATKD_SIZE static size_t bytes(int length, int groups) {
    return flag_bytes(groups) + size_t(Team::STAGED) * 6 * BAND * length * sizeof(Real);
  }
  FEATKD_INLINE JacobiScratch(void* memory, int groups)
      : turned(static_cast<int32_t*>(memory)),
        near(reinterpret_cast<Real*>(static_cast<char*>(memory) + flag_bytes(groups))) {}
};

// The rows from a pass's band on, and its scratch memory. Band 0 is the pass's own. A band's row is
// brought and taken back by the same lanes of the same group in all passes: far memory needs no
// barrier.
template <class Team, class Real>
struct Pass {
  Band<Real> rest;
  Real* near;

  FEATKD_INLINE Band<Real> band(int c) const {  // its copy
    const int place = c == 0 ? 0 : 1 + c % 2, size = BAND * rest.length;
    Real* rows = near + place * 2 * size;
    return {rows, rows + size, rest.part(c).count, rest.length};
  }
  FEATKD_INLINE void bring(Team team, int c) const { copy(team, rest.part(c), band(c)); }
  FEATKD_INLINE void take_back(Team team, int c) const { copy(team, band(c), rest.part(c)); }
  FEATKD_INLINE static void copy(Team team, const Band<Real>& from, const Band<Real>& to) {
    constexpr int L = width<Team, Real>;
    for (int k = team.rank(); k < from.count; k += team.size())
      for (int j = 0; j < from.length; j += L) {
        team.store(to.row(k) + j, team.load(from.row(k) + j));
        team.store(to.turn(k) + j, team.load(from.turn(k) + j));
      }
  }
};

template <class Team, class Real>
FEATKD_INLINE void turn_rows(Team team, Real c, Real s, Real* p, Real* q, int length) {
  constexpr int L = width<Team, Real>;
  for (int j = 0; j < length; j += L) {
    const auto a = team.load(p + j), b = team.load(q + j);
    team.store(p + j, c * a - s * b);
    team.store(q + j, s * a + c * b);
  }
}

// Rows p and q, i of one band and k of another, by the rotation that makes them orthogonal, the
// longer first; the same to their turns. True where there was anything to do.
template <class Team, class Real>
FEATKD_INLINE bool turn_pair(Team team, const Band<Real>& one, int i, const Band<Real>& other,
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
  const Real least = Orthogonality<Real>::COSINE * root(Real(one.length));
  const Real nothing = Orthogonality<Real>::NOTHING;
  const bool apart =
      alpha > nothing && beta > nothing && magnitude(gamma) > least * root(alpha) * root(beta);
  if (!apart && alpha >= beta) return false;
  Real c = 0, s = 1;  // an exchange
  if (apart) {
    const Real zeta = (beta - alpha) / (2 * gamma);
    const Real size = 1 / (magnitude(zeta) + root(1 + zeta * zeta));
    const Real t = zeta < 0 ? -size : size;
    c = 1 / root(1 + t * t);
    s = c * t;
    if (alpha - t * gamma < beta + t * gamma) {  // the other solution, a quarter turn on
      const Real kept = c;
      c = -s;
      s = kept;
    }
  }
  turn_rows(team, c, s, p, q, one.length);
  turn_rows(team, c, s, one.turn(i), other.turn(k), one.length);
  return true;
}

// The pairs of the pass's rows: all of its band with all behind them. True where this group turned
// any.
template <class Team, class Real>
FEATKD_INLINE bool turn_pass(Team team, const Pass<Team, Real>& pass) {
  const int bands = pass.rest.bands();
  bool turned = false;
  for (int c = 0; c <= bands; c++) {  // the first group comes to band c, the last leaves c - 1
    if (c > 2) pass.take_back(team, c - 2);
    if (c < bands) pass.bring(team, c);
    // the first round needs of these rows its group's own alone, and none of the pass's band
    for (int round = 0; round < BAND; round++) {
      for (int k = team.rank(); k < BAND; k += team.size()) {
        const int q = c * BAND + round - k;
        if (k < q && q < pass.rest.count)
          turned |= turn_pair(team, pass.band(0), k, pass.band(q / BAND), q % BAND);
      }
      team.barrier(At<12>());
    }
  }
  if (bands > 1) pass.take_back(team, bands - 1);
  pass.take_back(team, 0);
  return turned;
}

// Sweeps over all pairs of the rows until one finds them orthogonal and in descending order. The
// turns become those of a unit matrix. Returns the number of sweeps, MOST_SWEEPS + 1 where they do
// not suffice.
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
        team.store(band.turn(k) + j, column == team.splat(Real(b * BAND + k)) ? one : zero);
      }
  }
  for (int sweep = 1; sweep <= MOST_SWEEPS; sweep++) {
    bool turned = false;
    if constexpr (Team::STAGED)
      for (int b = 0; b < all.bands(); b++)
        turned |= turn_pass(team, Pass<Team, Real>{all.from(b), scratch.near});
    else  // one group, whose nearest memory keeps row p better than a band
      for (int p = 0; p < all.count; p++)
        for (int q = p + 1; q < all.count; q++) turned |= turn_pair(team, all, p, all, q);
    if (team.is_leader()) scratch.turned[team.rank()] = turned;
    team.barrier(At<13>());
    bool any = false;
    for (int g = 0; g < team.size(); g++) any |= scratch.turned[g] != 0;
    if (!any) return sweep;  // all lanes alike; barrier 12 comes before the next is written
  }
  return MOST_SWEEPS + 1;
}

}  // namespace featkd::FEATKD_ISA
