// A feature distance of rows, and its gradient through a LayerNorm, while they are in the cache.
#pragma once

#include "rows.h"

namespace featkd::FEATKD_ISA {
namespace {

// One thread's work on the rows that the distance ties together: one, or `width` tokens.
template <class Real, bool NORM>
struct DistanceRows {
  using V = Vec<Real>;

  const DistanceProblem& p;
  const int64_t n, group;
  Real *x, *e, *teacher, *out, *norms;  // (group, n), (group, n), (n), (n), (group, 4)
  Real *d_bias, *d_gamma, *d_beta;  // (n): this block's share of the sums over rows, or null
  const Real *bias, *gamma, *beta;
  const Real scale;

  static size_t bytes(const DistanceProblem& p) {
    const int64_t group = p.width ? p.width : 1;
    return size_t(2 * (group + 1) * p.channels + 4 * group) * sizeof(Real);
  }

  DistanceRows(const DistanceProblem& problem, void* scratch, void* partial)
      : p(problem),
        n(p.channels),
        group(p.width ? p.width : 1),
        x(static_cast<Real*>(scratch)),
        e(x + group * n),
        teacher(e + group * n),
        out(teacher + n),
        norms(out + n),
        d_bias(static_cast<Real*>(partial)),
        d_gamma(d_bias ? d_bias + n : nullptr),
        d_beta(d_bias ? d_gamma + n : nullptr),
        bias(static_cast<const Real*>(p.bias)),
        gamma(static_cast<const Real*>(p.gamma)),
        beta(static_cast<const Real*>(p.beta)),
        scale(p.scale ? *static_cast<const Real*>(p.scale) : Real(1)) {}

  // Rows [first, first + group); returns their sum(E H).
  double run(int64_t first) const {
    double total = 0;
    for (int64_t i = 0; i < group; i++) {
      const Real* input = read(first + i, x + i * n);
      Real* at = norms + 4 * i;
      if (NORM) {
        const Moments<Real> found = moments(input, n, p.eps);
        at[0] = found.mean, at[1] = found.rstd;
        if (p.rstd) static_cast<Real*>(p.rstd)[first + i] = found.rstd;
      }
      if (!p.width && is_wanted()) {
        Real* error = is_slope() ? result_row(p.slope, first, n, out) : e;
        total += p.teacher.data ? subtract<true, true>(first, input, at, error)
                                : subtract<false, true>(first, input, at, error);
        if (is_slope()) finish_row(p.slope, first, n, error);
      } else if (p.teacher.data)
        total += subtract<true, false>(first + i, input, at, e + i * n);
    }
    if (p.width && p.teacher.data) total = add_row_sums();
    if (!is_wanted() || is_slope()) return total;
    for (int64_t i = 0; i < group; i++) {
      const Real* input = is_copied() ? x + i * n : read(first + i, nullptr);
      if (p.width) weigh(first + i, input, norms + 4 * i, e + i * n);
      differentiate(first + i, input, norms + 4 * i, e + i * n);
    }
    return total;
  }

 private:
  bool is_wanted() const { return p.slope.data || d_bias; }
  // Whether what `subtract` forms is already the gradient with respect to the source.
  bool is_slope() const { return !NORM && !p.width && !d_bias; }
  bool is_copied() const { return bias || p.source.type != type_as<Real> || p.source.stride != 1; }

  const Real* read(int64_t row, Real* copy) const {
    const Real* input = read_row(p.source, row, n, copy);
    if (!bias) return input;
    sweep<Real>(n, [&](auto part, int64_t c, int) FEATKD_BODY {
      part.store(copy + c, part.load(input + c) + part.load(bias + c));
    });
    return copy;
  }

  // What a sweep's body reads besides its rows. A copy on the stack: the compiler must take every
  // store of a row for one to a member, and would load those again.
  struct Norm {
    const Real *gamma, *beta;
    Real mean, rstd, scale;

    FEATKD_INLINE V hat(V x) const { return NORM ? (x - mean) * rstd : x; }

    // The gradient with respect to LN(x), and what its two means need.
    template <class Part>
    FEATKD_INLINE V upstream(Part part, int64_t c, int chain, V half, V hat, const Real* added,
                             Sum<Real>& sum, Sum<Real>& product) const {
      V slope = half * scale;
      if (added) slope += part.load(added + c);
      if (NORM) {
        const V g = slope * part.load(gamma + c);
        sum.of[chain] += g;
        product.of[chain] += g * hat;
      }
      return slope;
    }
  };
  FEATKD_INLINE Norm norm_of(const Real* at) const { return {gamma, beta, at[0], at[1], scale}; }

  const Real* added_to(int64_t row) const {
    return p.added ? static_cast<const Real*>(p.added) + row / p.source.tokens * n : nullptr;
  }

  // E to `error`, or, where `weigh` need not wait for row sums, the gradient with respect to LN(x).
  template <bool COMPARE, bool WEIGH>
  double subtract(int64_t row, const Real* input, Real* at, Real* error) const {
    const Real* target = COMPARE ? read_row(p.teacher, row, n, teacher) : nullptr;
    const Real* added = WEIGH ? added_to(row) : nullptr;
    Sum<Real> squares, sum, product;
    const Norm norm = norm_of(at);
    sweep<Real>(n, [&](auto part, int64_t c, int chain) FEATKD_BODY {
      const V hat = norm.hat(part.load(input + c));
      V apart = {};
      if (COMPARE) {
        V y = hat;
        if (NORM) y = y * part.load(norm.gamma + c);
        if (NORM && norm.beta) y += part.load(norm.beta + c);
        apart = y - part.load(target + c);
        squares.of[chain] += apart * apart;
      }
      if (WEIGH) apart = norm.upstream(part, c, chain, apart, hat, added, sum, product);
      part.store(error + c, apart);
    });
    if (WEIGH) at[2] = sum.total() / Real(n), at[3] = product.total() / Real(n);
    return double(squares.total());
  }

  // Turns E of the whole group into H; returns sum(E H).
  double add_row_sums() const {
    const Real share = 1 / Real(group);
    const int64_t group = this->group, n = this->n;
    const bool even = group % 2 == 0;
    Real* const e = this->e;
    Sum<Real> energy;
    sweep<Real>(n, [&](auto part, int64_t c, int chain) FEATKD_BODY {
      V sums[2] = {};
      for (int64_t i = 0; i < group; i++) sums[i & 1] += part.load(e + i * n + c);
      const V mean = (sums[0] + sums[1]) * share, alternating = (sums[0] - sums[1]) * share;
      const V more[2] = {even ? mean + alternating : mean, even ? mean - alternating : mean};
      V energy_here = {};
      for (int64_t i = 0; i < group; i++) {
        const V error = part.load(e + i * n + c), half = error + more[i & 1];
        energy_here += error * half;
        part.store(e + i * n + c, half);
      }
      energy.of[chain] += energy_here;
    });
    return double(energy.total());
  }

  void weigh(int64_t row, const Real* input, Real* at, Real* half) const {
    const Real* added = added_to(row);
    Sum<Real> sum, product;
    const Norm norm = norm_of(at);
    const bool compared = p.teacher.data;
    sweep<Real>(n, [&](auto part, int64_t c, int chain) FEATKD_BODY {
      const V hat = norm.hat(part.load(input + c));
      const V given = compared ? part.load(half + c) : V{};
      part.store(half + c, norm.upstream(part, c, chain, given, hat, added, sum, product));
    });
    at[2] = sum.total() / Real(n), at[3] = product.total() / Real(n);
  }

  void differentiate(int64_t row, const Real* input, const Real* at, const Real* given) const {
    Real* slope = p.slope.data ? result_row(p.slope, row, n, out) : out;
    const Norm norm = norm_of(at);
    const Real mean = at[2], product = at[3];
    const auto through = [&](auto part, int64_t c, V g, V hat) FEATKD_BODY {
      return NORM ? (g * part.load(norm.gamma + c) - mean - hat * product) * norm.rstd : g;
    };
    if (!d_bias || (!NORM && !bias)) {
      sweep<Real>(n, [&](auto part, int64_t c, int) FEATKD_BODY {
        const V hat = NORM ? norm.hat(part.load(input + c)) : V{};
        part.store(slope + c, through(part, c, part.load(given + c), hat));
      });
    } else {
      Real *const to_bias = bias ? d_bias : nullptr, *const to_gamma = d_gamma, *const to_beta = d_beta;
      sweep<Real>(n, [&](auto part, int64_t c, int) FEATKD_BODY {
        const V g = part.load(given + c), hat = NORM ? norm.hat(part.load(input + c)) : V{};
        const V d = through(part, c, g, hat);
        if (NORM) {
          part.store(to_gamma + c, part.load(to_gamma + c) + g * hat);
          part.store(to_beta + c, part.load(to_beta + c) + g);
        }
        if (to_bias) part.store(to_bias + c, part.load(to_bias + c) + d);
        part.store(slope + c, d);
      });
    }
    if (p.slope.data) finish_row(p.slope, row, n, slope);
  }
};

}  // namespace
}  // namespace featkd::FEATKD_ISA
