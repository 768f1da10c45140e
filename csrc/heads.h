// softmax(L S) and W of it, plus b, of a query's scores for all heads: mixes in place, in the cache.
#pragma once

#include "exponential.h"

namespace featkd::FEATKD_ISA {
namespace {

template <class Real>
struct HeadRows {
  using V = Vec<Real>;
  static constexpr int L = Numbers<Real>::COUNT;

  const HeadsProblem& p;
  static constexpr int64_t group = 1;
  Real* mixed;  // (heads, keys)
  Real* shares;  // (heads, heads): W over the sums

  static size_t bytes(const HeadsProblem& p) {
    return size_t(p.heads * (p.keys + p.heads)) * sizeof(Real);
  }

  HeadRows(const HeadsProblem& problem, void* scratch, void*)
      : p(problem), mixed(static_cast<Real*>(scratch)), shares(mixed + p.heads * p.keys) {}

  double run(int64_t row) const {
    const int64_t n = p.keys, heads = p.heads, stride = p.queries * n;
    const int64_t image = row / p.queries, query = row % p.queries;
    Real* const scores = static_cast<Real*>(p.scores) + image * heads * stride + query * n;
    mix(scores, stride, static_cast<const Real*>(p.pre), nullptr, mixed, n);
    for (int64_t g = 0; g < heads; g++) {
      Real* const of = mixed + g * n;
      const Real top = largest(of, n);
      Sum<Real> sum;
      sweep<Real>(n, [&](auto part, int64_t c, int chain) FEATKD_BODY {
        const V e = part.keep(exponential(part.load(of + c) - top));
        sum.of[chain] += e;
        part.store(of + c, e);
      });
      const Real total = sum.total();
      for (int64_t h = 0; h < heads; h++)
        shares[h * heads + g] = static_cast<const Real*>(p.post)[h * heads + g] / total;
    }
    mix(mixed, n, shares, static_cast<const Real*>(p.bias), scores, stride);
    return 0;
  }

 private:
  // out_g = sum_h weights_gh in_h + bias_g, rows of `keys` numbers
  void mix(const Real* in, int64_t in_stride, const Real* weights, const Real* bias, Real* out,
           int64_t out_stride) const {
    int64_t c = 0;
    for (; c + CHAINS * L <= p.keys; c += CHAINS * L)
      columns<CHAINS>(Whole<Real>(), in + c, in_stride, weights, bias, out + c, out_stride);
    for (; c + L <= p.keys; c += L)
      columns<1>(Whole<Real>(), in + c, in_stride, weights, bias, out + c, out_stride);
    if (c < p.keys)
      columns<1>(Rest<Real>{int(p.keys - c)}, in + c, in_stride, weights, bias, out + c,
                 out_stride);
  }

  // Two heads at a time: a vector that is loaded serves both, a weight all of the vectors.
  template <int COUNT, class Part>
  void columns(Part part, const Real* in, int64_t in_stride, const Real* weights,
               const Real* bias, Real* out, int64_t out_stride) const {
    int64_t g = 0;
    for (; g + 2 <= p.heads; g += 2)
      tile<2, COUNT>(part, in, in_stride, weights, bias, out, out_stride, g);
    if (g < p.heads) tile<1, COUNT>(part, in, in_stride, weights, bias, out, out_stride, g);
  }

  template <int HEADS, int COUNT, class Part>
  FEATKD_INLINE void tile(Part part, const Real* in, int64_t in_stride, const Real* weights,
                          const Real* bias, Real* out, int64_t out_stride, int64_t g) const {
    V sums[HEADS][COUNT];
    FEATKD_UNROLLED
    for (int i = 0; i < HEADS; i++)
      FEATKD_UNROLLED
      for (int k = 0; k < COUNT; k++) sums[i][k] = (bias ? bias[g + i] : 0) - V{};
    for (int64_t h = 0; h < p.heads; h++) {
      V x[COUNT];
      FEATKD_UNROLLED
      for (int k = 0; k < COUNT; k++) x[k] = part.load(in + h * in_stride + k * L);
      FEATKD_UNROLLED
      for (int i = 0; i < HEADS; i++)
        FEATKD_UNROLLED
        for (int k = 0; k < COUNT; k++) sums[i][k] += weights[(g + i) * p.heads + h] * x[k];
    }
    FEATKD_UNROLLED
    for (int i = 0; i < HEADS; i++)
      FEATKD_UNROLLED
      for (int k = 0; k < COUNT; k++) part.store(out + (g + i) * out_stride + k * L, sums[i][k]);
  }
};

}  // namespace
}  // namespace featkd::FEATKD_ISA
