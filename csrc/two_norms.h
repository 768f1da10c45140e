// r = LN_p(h), u = LN_1(r) of rows, and their backward pass, while the rows are in the cache.
#pragma once

#include "rows.h"

namespace featkd::FEATKD_ISA {
namespace {

template <class Real>
struct NormRows {
  using V = Vec<Real>;

  const NormsProblem& p;
  const int64_t n;
  static constexpr int64_t group = 1;
  const Real *gamma_p, *beta_p, *gamma_1, *beta_1;
  Real *r, *u, *slope, *copy;  // (n); copy: of a row of h, if that is of another type
  Real* sums[4];  // (n) each, this block's share, or null: of gamma_p, beta_p, gamma_1, beta_1

  static size_t bytes(const NormsProblem& p) { return size_t(4 * p.channels) * sizeof(Real); }

  NormRows(const NormsProblem& problem, void* scratch, void* partial)
      : p(problem),
        n(p.channels),
        gamma_p(static_cast<const Real*>(p.parameters)),
        beta_p(gamma_p + n),
        gamma_1(beta_p + n),
        beta_1(gamma_1 + n),
        r(static_cast<Real*>(scratch)),
        u(r + n),
        slope(u + n),
        copy(slope + n) {
    for (int k = 0; k < 4; k++) sums[k] = partial ? static_cast<Real*>(partial) + k * n : nullptr;
  }

  double run(int64_t row) const {
    const Real* h = read_row(p.h, row, n, copy);
    Real* statistics = static_cast<Real*>(p.statistics) + row;
    if (p.residual.data)
      forward(row, h, statistics);
    else if (p.d_normed.data)
      backward<true>(row, h, statistics);
    else
      backward<false>(row, h, statistics);
    return 0;
  }

 private:
  // x's norm to `y`; returns its moments
  Moments<Real> normalise(const Real* x, const Real* gamma, const Real* beta, Real* y) const {
    const Moments<Real> of = moments(x, n, p.eps);
    sweep<Real>(n, [&](auto part, int64_t c, int) FEATKD_BODY {
      const V hat = (part.load(x + c) - of.mean) * of.rstd;
      part.store(y + c, hat * part.load(gamma + c) + part.load(beta + c));
    });
    return of;
  }

  void forward(int64_t row, const Real* h, Real* statistics) const {
    Real* const residual = result_row(p.residual, row, n, r);
    Real* const normed = result_row(p.normed, row, n, u);
    const Moments<Real> of_h = normalise(h, gamma_p, beta_p, residual);
    const Moments<Real> of_r = normalise(residual, gamma_1, beta_1, normed);
    finish_row(p.residual, row, n, residual);
    finish_row(p.normed, row, n, normed);
    const Real found[4] = {of_h.mean, of_h.rstd, of_r.mean, of_r.rstd};
    for (int k = 0; k < 4; k++) statistics[k * p.statistics_stride] = found[k];
  }

  // r is formed again from h; d is the gradient with respect to r, kept in `slope` between sweeps.
  template <bool NORMED>
  void backward(int64_t row, const Real* h, const Real* statistics) const {
    const Real *const gamma_p = this->gamma_p, *const beta_p = this->beta_p;
    const Real* const gamma_1 = this->gamma_1;
    Real* const slope = this->slope;
    const int64_t step = p.statistics_stride;
    const Moments<Real> of_h{statistics[0], statistics[step]};
    const Moments<Real> of_r{statistics[2 * step], statistics[3 * step]};
    const Real* const du = NORMED ? read_row(p.d_normed, row, n, u) : nullptr;
    const Real* const dr = p.d_residual.data ? read_row(p.d_residual, row, n, r) : nullptr;
    const auto hat_of_h = [&](auto part, int64_t c) FEATKD_BODY {
      return (part.load(h + c) - of_h.mean) * of_h.rstd;
    };
    const auto hat_of_r = [&](auto part, int64_t c, V hat) FEATKD_BODY {
      const V residual = hat * part.load(gamma_p + c) + part.load(beta_p + c);
      return (residual - of_r.mean) * of_r.rstd;
    };
    Sum<Real> sum, product, sum_h, product_h;
    if (NORMED)
      sweep<Real>(n, [&](auto part, int64_t c, int chain) FEATKD_BODY {
        const V g = part.load(du + c) * part.load(gamma_1 + c);
        sum.of[chain] += g;
        product.of[chain] += g * hat_of_r(part, c, hat_of_h(part, c));
      });
    const Real mean = sum.total() / Real(n), mean_product = product.total() / Real(n);
    Real *const to_gamma_1 = sums[2], *const to_beta_1 = sums[3];
    sweep<Real>(n, [&](auto part, int64_t c, int chain) FEATKD_BODY {
      const V hat = hat_of_h(part, c);
      V d = {};
      if (NORMED) {
        const V given = part.load(du + c), hat_r = hat_of_r(part, c, hat);
        d = (given * part.load(gamma_1 + c) - mean - hat_r * mean_product) * of_r.rstd;
        if (to_gamma_1) {
          part.store(to_gamma_1 + c, part.load(to_gamma_1 + c) + given * hat_r);
          part.store(to_beta_1 + c, part.load(to_beta_1 + c) + given);
        }
      }
      if (dr) d += part.load(dr + c);
      const V g = d * part.load(gamma_p + c);
      sum_h.of[chain] += g;
      product_h.of[chain] += g * hat;
      part.store(slope + c, d);
    });
    const Real mean_h = sum_h.total() / Real(n), mean_product_h = product_h.total() / Real(n);
    Real *const to_gamma_p = sums[0], *const to_beta_p = sums[1];
    Real* const out = result_row(p.slope, row, n, slope);
    sweep<Real>(n, [&](auto part, int64_t c, int) FEATKD_BODY {
      const V d = part.load(slope + c), hat = hat_of_h(part, c);
      if (to_gamma_p) {
        part.store(to_gamma_p + c, part.load(to_gamma_p + c) + d * hat);
        part.store(to_beta_p + c, part.load(to_beta_p + c) + d);
      }
      part.store(out + c, (d * part.load(gamma_p + c) - mean_h - hat * mean_product_h) * of_h.rstd);
    });
    finish_row(p.slope, row, n, out);
  }
};

}  // namespace
}  // namespace featkd::FEATKD_ISA
