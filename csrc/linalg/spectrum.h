// Singular values, energy curve and energy ranks of one matrix.
#pragma once

#include "sturm.h"

namespace featkd::FEATKD_ISA {

// Scratch memory of a team. `reused` first holds the packed columns, then the Householder vectors,
// then the Sturm counts and eigenvalues.
template <class Team, class Real>
struct Scratch {
  using Sum = typename Team::template GramSum<Real>;
  static constexpr bool ROUNDED = sizeof(Sum) != sizeof(Real);

  uint64_t* maxima;
  LowerTriangle<Team, Sum> sums;  // G as it is added up; the same memory as g if Sum is Real
  LowerTriangle<Team, Real> g;
  Real *d, *e2, *reused;
  int length;

  FEATKD_HOST_DEVICE static int padded(int n) { return (n + 31) / 32 * 32; }
  FEATKD_HOST_DEVICE static size_t reused_elements(int n, int groups) {
    const size_t packed = PackedColumns<Team, Real>::elements(n), counts = 2 * padded(n);
    const size_t vectors = Vectors<Real>::elements(padded(n), groups);
    const size_t maximum = packed > vectors ? packed : vectors;
    return maximum > counts ? maximum : counts;
  }
  FEATKD_HOST_DEVICE static size_t matrix_elements(int n) {
    return (LowerTriangle<Team, Real>::elements(n) + 15) / 16 * 16;
  }
  FEATKD_HOST_DEVICE static size_t maxima_count(int groups) { return (groups + 7) / 8 * 8; }
  FEATKD_HOST_DEVICE static size_t bytes(int n, int groups) {
    const size_t numbers = matrix_elements(n) + 2 * padded(n) + reused_elements(n, groups);
    return sizeof(uint64_t) * maxima_count(groups) + ROUNDED * matrix_elements(n) * sizeof(Sum) +
           (numbers + 15) / 16 * 16 * sizeof(Real);
  }
  FEATKD_INLINE Scratch(void* memory, int n, int groups)
      : maxima(static_cast<uint64_t*>(memory)), length(padded(n)) {
    sums = {reinterpret_cast<Sum*>(maxima + maxima_count(groups)), n};
    g = {reinterpret_cast<Real*>(sums.data + ROUNDED * matrix_elements(n)), n};
    d = g.data + matrix_elements(n);
    e2 = d + length;
    reused = e2 + length;
  }
};

// Rounds the sums of G to Real if they have a wider type.
template <class Team, class Real>
FEATKD_INLINE void round_sums(Team team, Scratch<Team, Real> scratch) {
  if constexpr (Scratch<Team, Real>::ROUNDED)
    for (int i = team.rank(); i < scratch.g.n; i += team.size()) {
      const auto* from = scratch.sums.row(i);
      Real* to = scratch.g.row(i);
      for (int j = 0; j <= i; j++) to[j] = Real(from[j]);
    }
}

template <class Real>
struct Solution {
  const Real* eigenvalues;  // of the scaled Gram matrix, ascending; null if not computed
  double trace;
  Scale<Real> scale;
};

// Computes the scale and, unless the matrix is zero or not finite, the Gram matrix. Ends with a
// barrier.
template <class Real, class In, class Team>
FEATKD_INLINE Solution<Real> form_gram(Team team, const MatrixView<In>& x,
                                       Scratch<Team, Real> scratch) {
  Solution<Real> found{nullptr, 0, find_scale<Real>(team, x, scratch.maxima)};
  if (found.scale.finite && !found.scale.zero)  // the same in all lanes
    gram(team, x, found.scale, scratch.reused, scratch.sums);
  return found;
}

// Computes the eigenvalues of the Gram matrix. A search may end at `relative_tolerance` of a
// singular value; 0 searches to the last bit of the eigenvalue. Ends with a barrier if there is a
// Gram matrix.
template <class Real, class Team>
FEATKD_INLINE void solve(Team team, Real relative_tolerance, Scratch<Team, Real> scratch,
                         Solution<Real>& found) {
  if (!found.scale.finite || found.scale.zero) return;
  const int n = scratch.g.n;
  for (int i = 0; i < n; i++) found.trace += double(scratch.sums.row(i)[i]);
  round_sums(team, scratch);
  const size_t used = Vectors<Real>::elements(scratch.length, team.size());
  for (size_t i = team.rank() * team.lanes() + team.lane(); i < used;
       i += team.size() * team.lanes())
    scratch.reused[i] = 0;
  team.barrier(At<9>());
  const Vectors<Real> vectors(scratch.reused, scratch.length, team.size());
  tridiagonalise(team, scratch.g, vectors, scratch.d, scratch.e2);
  Real* counts = scratch.reused;
  Real* values = counts + scratch.length;
  sturm(team, n, scratch.d, scratch.e2, relative_tolerance, counts, values);
  team.barrier(At<10>());
  found.eigenvalues = values;
}

// Computes the eigenvalues for matrix `index` of any element type.
template <class Real, class Team>
FEATKD_INLINE Solution<Real> solve(Team team, const Problem& p, int64_t index,
                                   Scratch<Team, Real> scratch) {
  Solution<Real> found{};
  const auto form_as = [&](auto element) {
    using In = decltype(element);
    const In* data = static_cast<const In*>(p.data) + index * p.batch_stride;
    return form_gram(team, MatrixView<In>{data, p.rows, p.columns, p.row_stride, p.column_stride},
                     scratch);
  };
  switch (p.type) {
    case Type::f32:
      found = form_as(float());
      break;
    case Type::f64:
      found = form_as(double());
      break;
    case Type::bf16:
      found = form_as(BFloat16());
      break;
    case Type::f16:
      found = form_as(Half());
      break;
  }
  solve(team, Real(p.relative_tolerance), scratch, found);
  return found;
}

FEATKD_INLINE double scaled(double x, int exponent) {
  const int half = exponent / 2;
  return x * power_of_two(half, double()) * power_of_two(exponent - half, double());
}

// Writes the results of matrix `index`; called in one lane of one group. Returns true if a float32
// solve cannot decide the ranks: a share is too close to a threshold, or the sum misses the trace.
template <class Out, class Real>
FEATKD_INLINE bool write_results(const Problem& p, int64_t index, const Solution<Real>& found) {
  const int n = p.rows;
  Out* values = static_cast<Out*>(p.values) + index * n;
  Out* curve = static_cast<Out*>(p.curve) + index * n;
  int64_t* ranks = p.ranks + index * p.threshold_count;
  if (found.eigenvalues == nullptr) {
    const bool finite = found.scale.finite;
    const Out nothing = finite ? Out(0) : Out(__builtin_nan(""));
    for (int i = 0; i < n; i++) values[i] = curve[i] = nothing;
    for (int t = 0; t < p.threshold_count; t++) ranks[t] = finite ? 0 : -1;
    p.info[index] = finite ? SOLVED : NOT_FINITE;
    p.residual[index] = finite ? 0 : __builtin_nan("");
    return false;
  }
  double total = 0;
  for (int i = 0; i < n; i++) total += double(found.eigenvalues[i]);
  const double residual = magnitude(total / found.trace - 1);
  bool uncertain = residual > WORST_RESIDUAL;
  double sum = 0;
  for (int t = 0; t < p.threshold_count; t++) ranks[t] = n;
  for (int i = 0; i < n; i++) {
    const double each = double(found.eigenvalues[n - 1 - i]);
    const double sigma = each > 0 ? square_root(each) : 0;
    sum += each;
    const double share = sum / total < 1 ? sum / total : 1;
    values[i] = Out(scaled(sigma, found.scale.exponent));
    curve[i] = Out(share);
    for (int t = 0; t < p.threshold_count; t++) {
      uncertain |= magnitude(share - p.thresholds[t]) < NEAR_TIE && sizeof(Real) == 4;
      if (ranks[t] == n && share >= p.thresholds[t] - TIE) ranks[t] = i + 1;
    }
  }
  p.info[index] = residual > WORST_RESIDUAL ? NOT_ACCURATE : SOLVED;
  p.residual[index] = residual;
  return uncertain && sizeof(Real) == 4;
}

template <class Real>
FEATKD_INLINE bool write_results(const Problem& p, int64_t index, const Solution<Real>& found) {
  if (p.type == Type::f64) return write_results<double, Real>(p, index, found);
  return write_results<float, Real>(p, index, found);
}

}  // namespace featkd::FEATKD_ISA
