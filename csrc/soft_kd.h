// (1 - alpha) CE + alpha tau^2 KL of rows of logits and its gradient: one read of a row, two or
// three exponentials a class.
#pragma once

#include "exponential.h"

namespace featkd::FEATKD_ISA {
namespace {

template <class Real>
struct SoftRows {
  using V = Vec<Real>;

  const SoftProblem& p;
  const int64_t n;
  static constexpr int64_t group = 1;
  Real *x, *z, *y;  // (n) copies of the student's and the teacher's logits and of soft labels
  Real *e1, *es, *et;  // (n) exponentials of the student's at 1 and at tau, of the teacher's
  Real* out;  // (n)

  static size_t bytes(const SoftProblem& p) { return size_t(7 * p.classes) * sizeof(Real); }

  SoftRows(const SoftProblem& problem, void* scratch, void*)
      : p(problem),
        n(p.classes),
        x(static_cast<Real*>(scratch)),
        z(x + n),
        y(z + n),
        e1(y + n),
        es(e1 + n),
        et(es + n),
        out(et + n) {}

  double run(int64_t row) const {
    const bool shared = p.tau == 1 && has_target();
    if (!p.teacher.data) return finish<true, false, false>(row);
    if (!has_target()) return finish<false, true, false>(row);
    return shared ? finish<true, true, true>(row) : finish<true, true, false>(row);
  }

 private:
  bool has_target() const { return p.labels || p.soft.data; }

  // CE, KL: whether there are these terms; SHARED: at tau 1 both have the student's softmax.
  template <bool CE, bool KL, bool SHARED>
  double finish(int64_t row) const {
    const int64_t n = this->n;
    const Real* const logits = read_row(p.student, row, n, x);
    const Real* const guide = KL ? read_row(p.teacher, row, n, z) : nullptr;
    const Real* const soft = CE && p.soft.data ? read_row(p.soft, row, n, y) : nullptr;
    const int64_t label = CE && p.labels ? p.labels[row * p.label_stride] : 0;
    const Real top = largest(logits, n), guide_top = KL ? largest(guide, n) : 0;
    const Real warmth = Real(1 / p.tau), hard = Real(1 - p.alpha);
    Real *const e1 = this->e1, *const es = SHARED ? e1 : this->es, *const et = this->et;

    Sum<Real> sum_1, sum_s, sum_t, apart, labels, picked;
    sweep<Real>(n, [&](auto part, int64_t c, int chain) FEATKD_BODY {
      const V at_1 = part.load(logits + c) - top;
      if (CE) {
        const V e = part.keep(exponential(at_1));
        sum_1.of[chain] += e;
        part.store(e1 + c, e);
      }
      if (CE && soft) {
        const V share = part.load(soft + c);
        labels.of[chain] += share;
        picked.of[chain] += part.keep(share * at_1);
      }
      if (KL) {
        const V at = SHARED ? at_1 : at_1 * warmth;
        const V guided = (part.load(guide + c) - guide_top) * (SHARED ? Real(1) : warmth);
        const V e = part.keep(exponential(guided));
        sum_t.of[chain] += e;
        apart.of[chain] += part.keep(e * (guided - at));
        part.store(et + c, e);
        if (!SHARED) {
          const V e_s = part.keep(exponential(at));
          sum_s.of[chain] += e_s;
          part.store(es + c, e_s);
        }
      }
    });
    const double z_1 = sum_1.total(), z_s = SHARED ? z_1 : sum_s.total(), z_t = sum_t.total();
    const double mass = soft ? labels.total() : 1;
    double loss = 0;
    if (CE) {
      const double chosen = soft ? double(picked.total()) : double(logits[label] - top);
      loss -= (1 - p.alpha) * (chosen - mass * __builtin_log(z_1));
    }
    if (KL)
      loss += p.alpha * p.tau * p.tau * (apart.total() / z_t + __builtin_log(z_s / z_t));
    static_cast<Real*>(p.losses)[row] = Real(loss);
    if (!p.slope.data) return 0;

    Real* const slope = result_row(p.slope, row, n, out);
    const Real by_1 = Real(CE ? (mass * (1 - p.alpha) + (SHARED ? p.alpha : 0)) / z_1 : 0);
    const Real by_s = Real(p.alpha * p.tau / z_s), by_t = Real(p.alpha * p.tau / z_t);
    sweep<Real>(n, [&](auto part, int64_t c, int) FEATKD_BODY {
      V d = {};
      // s - t first: where they agree nothing is left of their roundings
      if (KL && !SHARED) d = part.load(es + c) * by_s;
      if (KL) d -= part.load(et + c) * by_t;
      if (CE) d += part.load(e1 + c) * by_1;
      if (CE && soft) d -= part.load(soft + c) * hard;
      part.store(slope + c, d);
    });
    if (CE && !soft) slope[label] -= hard;
    finish_row(p.slope, row, n, slope);
    return 0;
  }
};

}  // namespace
}  // namespace featkd::FEATKD_ISA
