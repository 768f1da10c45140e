// What softmaxes of rows are made of: a row's largest number, and exponentials.
#pragma once

#include "rows.h"

namespace featkd::FEATKD_ISA {
namespace {

FEATKD_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Numbers<double>::COUNT; i++) x[i] = __builtin_exp(x[i]);
  return x;
}

// Of x <= 0 or NaN, to 1e-7 of itself: 2^n e^r with |r| <= ln 2 / 2, and 0 where it is subnormal.
// e^r by the polynomial of the Cephes library's expf (S. Moshier).
FEATKD_INLINE Vec<float> exponential(Vec<float> x) {
  typedef int32_t Bits __attribute__((vector_size(FEATKD_VECTOR_BYTES)));
  constexpr float ROUND = 0x1.8p23f;  // its last place is worth 1
  const Vec<float> zero = {}, shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1;
  const Bits power = (Bits(shifted) - 0x4b400000 + 127) << 23;
  return x < -87.33f ? zero : y * Vec<float>(power);
}

template <class Real>
FEATKD_INLINE Real largest(const Real* row, int64_t count) {
  const Real least = -Real(__builtin_inff());
  Vec<Real> most[CHAINS];
  for (Vec<Real>& lane : most) lane = least - Vec<Real>{};
  sweep<Real>(count, [&](auto part, int64_t c, int chain) FEATKD_BODY {
    const Vec<Real> found = part.keep(part.load(row + c), least);
    most[chain] = found > most[chain] ? found : most[chain];
  });
  const auto larger = [](const auto& a, const auto& b) FEATKD_BODY { return a > b ? a : b; };
  const Vec<Real> all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  Real parts[Numbers<Real>::COUNT];
  for (int i = 0; i < Numbers<Real>::COUNT; i++) parts[i] = all[i];
  for (int half = Numbers<Real>::COUNT / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = larger(parts[i], parts[i + half]);
  return parts[0];
}

}  // namespace
}  // namespace featkd::FEATKD_ISA
