// softmax(L S) and W of it, plus b, of a query's scores for all heads: mixes in place, in the cache.
#pragma once

#include "exponential.h"

namespace featkd::FEATKD_ISA {
namespace {

template <class Real, class Stored>
struct HeadRows {
  using V = Vec<Real>;
  static constexpr int L = Numbers<Real>::COUNT;
  // of a tile: its sums and a vector of each column stay in the 16 or 32 registers
  static constexpr int HEADS = FEATKD_VECTOR_BYTES == 64 ? 4 : 2;

  const HeadsProblem& p;
  static constexpr int64_t group = 1;
  const int64_t width;  // of a head in `mixed`: whole vectors, so that the softmax has no rest
  Real* mixed;  // (heads, width)
  Real* shares;  // (heads, heads): W over the sums

  static int64_t whole(int64_t keys) { return (keys + L - 1) / L * L; }
  static size_t bytes(const HeadsProblem& p) {
    return size_t(p.heads * (whole(p.keys) + p.heads)) * sizeof(Real);
  }

  HeadRows(const HeadsProblem& problem, void* scratch, void*)
      : p(problem),
        width(whole(p.keys)),
        mixed(static_cast<Real*>(scratch)),
        shares(mixed + p.heads * width) {}

  double run(int64_t row) const {
    const int64_t n = p.keys, heads = p.heads, stride = p.queries * n;
    const int64_t image = row / p.queries, query = row % p.queries;
    Stored* const scores = static_cast<Stored*>(p.scores.data) + image * heads * stride + query * n;
    mix(static_cast<const Stored*>(scores), stride, static_cast<const Real*>(p.pre), nullptr, mixed,
        width);
    for (int64_t g = 0; g < heads; g++) {
      Real* const of = mixed + g * width;
      for (int64_t c = n; c < width; c++) of[c] = -Real(__builtin_inff());  // exponential 0
      const Real top = largest(of, width);
      Sum<Real> sum;
      sweep<Real>(width, [&](auto part, int64_t c, int chain) FEATKD_BODY {
        const V e = exponential(part.load(of + c) - top);
        sum.of[chain] += e;
        part.store(of + c, e);
      });
      const Real total = sum.total();
      for (int64_t h = 0; h < heads; h++)
        shares[h * heads + g] = static_cast<const Real*>(p.post)[h * heads + g] / total;
    }
    mix(static_cast<const Real*>(mixed), width, shares, static_cast<const Real*>(p.bias), scores,
        stride);
    return 0;
  }

 private:
  // out_g = sum_h weights_gh in_h + bias_g, rows of `keys` numbers; `out` is not `in`
  template <class From, class To>
  void mix(const From* in, int64_t in_stride, const Real* weights, const Real* bias, To* out,
           int64_t out_stride) const {
    const auto columns_at = [&](auto part, auto count, int64_t c) FEATKD_BODY {
      columns<decltype(count)::value>(part, in + c, in_stride, weights, bias, out + c, out_stride);
    };
    int64_t c = 0;
    for (; c + CHAINS * L <= p.keys; c += CHAINS * L)
      columns_at(Whole<Real>(), std::integral_constant<int, CHAINS>(), c);
    for (; c + L <= p.keys; c += L) columns_at(Whole<Real>(), std::integral_constant<int, 1>(), c);
    if (c == p.keys) return;
    if (p.keys >= L)  // the last whole vector, of which a part is there already
      columns_at(Whole<Real>(), std::integral_constant<int, 1>(), p.keys - L);
    else
      columns_at(Rest<Real>{int(p.keys)}, std::integral_constant<int, 1>(), 0);
  }

  // Some heads at a time: a vector that is loaded serves all of them, a weight all of the vectors.
  template <int COUNT, class Part, class From, class To>
  void columns(Part part, const From* in, int64_t in_stride, const Real* weights,
               const Real* bias, To* out, int64_t out_stride) const {
    int64_t g = 0;
    for (; g + HEADS <= p.heads; g += HEADS)
      tile<HEADS, COUNT>(part, in, in_stride, weights, bias, out, out_stride, g);
    for (; g < p.heads; g++)
      tile<1, COUNT>(part, in, in_stride, weights, bias, out, out_stride, g);
  }

  template <int TILE, int COUNT, class Part, class From, class To>
  FEATKD_INLINE void tile(Part part, const From* in, int64_t in_stride, const Real* weights,
                          const Real* bias, To* out, int64_t out_stride, int64_t g) const {
    V sums[TILE][COUNT];
    FEATKD_UNROLLED
    for (int i = 0; i < TILE; i++)
      FEATKD_UNROLLED
      for (int k = 0; k < COUNT; k++) sums[i][k] = (bias ? bias[g + i] : 0) - V{};
    for (int64_t h = 0; h < p.heads; h++) {
      V x[COUNT];
      FEATKD_UNROLLED
      for (int k = 0; k < COUNT; k++) x[k] = load_stored(part, in + h * in_stride + k * L);
      FEATKD_UNROLLED
      for (int i = 0; i < TILE; i++)
        FEATKD_UNROLLED
        for (int k = 0; k < COUNT; k++) sums[i][k] += weights[(g + i) * p.heads + h] * x[k];
    }
    FEATKD_UNROLLED
    for (int i = 0; i < TILE; i++)
      FEATKD_UNROLLED
      for (int k = 0; k < COUNT; k++)
        store_narrow(part, out + (g + i) * out_stride + k * L, sums[i][k]);
  }
};

}  // namespace
}  // namespace featkd::FEATKD_ISA
