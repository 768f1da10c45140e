// Sweeps over the rows of maps and logits: vectors of any length, and element types at the edges.
//
// A sweep calls its body with a part of a row: whole vectors, then what is left. A part loads,
// stores and, in sums that zeros would not leave alone, keeps only what the row has.
#pragma once

#include <type_traits>

#include "numbers.h"
#include "rows_problem.h"

#ifndef FEATKD_VECTOR_BYTES
#define FEATKD_VECTOR_BYTES 16
#endif
#define FEATKD_BODY __attribute__((always_inline))

namespace featkd::FEATKD_ISA {
// unnamed: no weak symbols (rows_isa.cpp)
namespace {

constexpr int CHAINS = 4;  // of a reduction, one behind the other: an addition takes 3 to 4 cycles

// A vector of numbers that need no alignment.
template <class Real>
struct Numbers {
  static constexpr int COUNT = FEATKD_VECTOR_BYTES / int(sizeof(Real));
  typedef Real Vector __attribute__((vector_size(FEATKD_VECTOR_BYTES)));
  typedef Real Anywhere
      __attribute__((vector_size(FEATKD_VECTOR_BYTES), aligned(sizeof(Real)), may_alias));
};
template <class Real>
using Vec = typename Numbers<Real>::Vector;

template <class Real>
struct Whole {
  FEATKD_INLINE Vec<Real> load(const Real* p) const {
    return *reinterpret_cast<const typename Numbers<Real>::Anywhere*>(p);
  }
  FEATKD_INLINE void store(Real* p, Vec<Real> x) const {
    *reinterpret_cast<typename Numbers<Real>::Anywhere*>(p) = x;
  }
  FEATKD_INLINE Vec<Real> keep(Vec<Real> x, Real = 0) const { return x; }
};

template <class Real>
struct Rest {
  int count;
  FEATKD_INLINE Vec<Real> load(const Real* p) const {
    Vec<Real> x = {};
    for (int i = 0; i < count; i++) x[i] = p[i];
    return x;
  }
  FEATKD_INLINE void store(Real* p, Vec<Real> x) const {
    for (int i = 0; i < count; i++) p[i] = x[i];
  }
  FEATKD_INLINE Vec<Real> keep(Vec<Real> x, Real other = 0) const {
    for (int i = count; i < Numbers<Real>::COUNT; i++) x[i] = other;
    return x;
  }
};

// body(part, first, chain): `chain` below CHAINS is a constant once the compiler is done.
template <class Real, class Body>
FEATKD_INLINE void sweep(int64_t count, const Body& body) {
  constexpr int L = Numbers<Real>::COUNT;
  int64_t c = 0;
  for (; c + CHAINS * L <= count; c += CHAINS * L) {
    FEATKD_UNROLLED
    for (int chain = 0; chain < CHAINS; chain++) body(Whole<Real>(), c + chain * L, chain);
  }
  for (; c + L <= count; c += L) body(Whole<Real>(), c, 0);
  if (c < count) body(Rest<Real>{int(count - c)}, c, 0);
}

template <class Real>
struct Sum {
  Vec<Real> of[CHAINS] = {};
  FEATKD_INLINE Real total() const {
    const Vec<Real> x = (of[0] + of[1]) + (of[2] + of[3]);
    Real parts[Numbers<Real>::COUNT];
    for (int i = 0; i < Numbers<Real>::COUNT; i++) parts[i] = x[i];
    for (int half = Numbers<Real>::COUNT / 2; half; half /= 2)
      for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
  }
};

FEATKD_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
FEATKD_INLINE void narrow(float x, float* out) { *out = x; }
FEATKD_INLINE void narrow(double x, double* out) { *out = x; }
FEATKD_INLINE void narrow(double x, float* out) { *out = float(x); }
FEATKD_INLINE void narrow(float x, double* out) { *out = x; }
// To nearest, ties to even: the carry of the rounding runs into the exponent as it should.
FEATKD_INLINE void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_of(x);
  const uint16_t rounded = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  out->bits = x == x ? rounded : uint16_t(0x7fc0);
}
FEATKD_INLINE void narrow(float x, Half* out) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  // below 2^-14 a sum with 1/2 rounds to halves' least step, 2^-24
  const uint32_t small = bits_of(from_bits(size) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
  const uint32_t finite = size < 0x38800000u ? small : normal;
  const uint32_t large = size > 0x7f800000u ? 0x7e00 : 0x7c00;
  out->bits = uint16_t(sign | (size >= 0x477ff000u ? large : finite));
}
template <class Real>
FEATKD_INLINE void narrow(Real x, BFloat16* out) { narrow(float(x), out); }
template <class Real>
FEATKD_INLINE void narrow(Real x, Half* out) { narrow(float(x), out); }

// A part of a row that is stored as bf16, which lacks instructions of its own here.
FEATKD_INLINE Vec<float> load_stored(Whole<float>, const BFloat16* p) {
  typedef uint16_t Stored __attribute__((vector_size(FEATKD_VECTOR_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(FEATKD_VECTOR_BYTES)));
  return Vec<float>(__builtin_convertvector(*reinterpret_cast<const Stored*>(p), Bits) << 16);
}
// as `narrow`
FEATKD_INLINE void store_narrow(Whole<float>, BFloat16* p, Vec<float> x) {
  typedef uint16_t Stored __attribute__((vector_size(FEATKD_VECTOR_BYTES / 2), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(FEATKD_VECTOR_BYTES)));
  const Bits bits = Bits(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits nan = Bits{} + 0x7fc0;
  *reinterpret_cast<Stored*>(p) = __builtin_convertvector(x == x ? rounded : nan, Stored);
}
FEATKD_INLINE Vec<float> load_stored(Rest<float> part, const BFloat16* p) {
  Vec<float> x = {};
  for (int i = 0; i < part.count; i++) x[i] = widen(p[i]);
  return x;
}
FEATKD_INLINE void store_narrow(Rest<float> part, BFloat16* p, Vec<float> x) {
  for (int i = 0; i < part.count; i++) narrow(x[i], p + i);
}
template <class Part, class Real>
FEATKD_INLINE Vec<Real> load_stored(Part part, const Real* p) {
  return part.load(p);
}
template <class Part, class Real>
FEATKD_INLINE void store_narrow(Part part, Real* p, Vec<Real> x) {
  part.store(p, x);
}

template <class Real>
constexpr Type type_as = sizeof(Real) == sizeof(double) ? Type::f64 : Type::f32;

template <class In, class Real>
__attribute__((noinline)) void gather(const void* row, int64_t stride, int64_t count, Real* out) {
  const In* p = static_cast<const In*>(row);
  if (stride == 1)
    for (int64_t c = 0; c < count; c++) out[c] = Real(widen(p[c]));
  else
    for (int64_t c = 0; c < count; c++) out[c] = Real(widen(p[c * stride]));
}

template <class Out, class Real>
__attribute__((noinline)) void scatter(const Real* row, int64_t count, void* to) {
  Out* out = static_cast<Out*>(to);
  if constexpr (std::is_same_v<Out, BFloat16> && std::is_same_v<Real, float>) {
    sweep<float>(count, [&](auto part, int64_t c, int) FEATKD_BODY {
      store_narrow(part, out + c, part.load(row + c));
    });
  } else {
    for (int64_t c = 0; c < count; c++) narrow(row[c], out + c);
  }
}

// Row `row` of a map as numbers: where it is, or, of another type or scattered, copied to `copy`.
template <class Real>
FEATKD_INLINE const Real* read_row(const Rows& x, int64_t row, int64_t count, Real* copy) {
  const int64_t offset = row / x.tokens * x.image_stride + row % x.tokens * x.token_stride;
  const char* p = static_cast<const char*>(x.data) + offset * size_of(x.type);
  if (x.type == type_as<Real> && x.stride == 1) return reinterpret_cast<const Real*>(p);
  switch (x.type) {
    case Type::f32: gather<float>(p, x.stride, count, copy); break;
    case Type::f64: gather<double>(p, x.stride, count, copy); break;
    case Type::bf16: gather<BFloat16>(p, x.stride, count, copy); break;
    case Type::f16: gather<Half>(p, x.stride, count, copy); break;
  }
  return copy;
}

// Where to write row `row` of contiguous results: in place, or first to `copy`.
template <class Real>
FEATKD_INLINE Real* result_row(const Results& x, int64_t row, int64_t count, Real* copy) {
  if (x.type != type_as<Real>) return copy;
  return static_cast<Real*>(x.data) + row * count;
}

// Ends what result_row began.
template <class Real>
FEATKD_INLINE void finish_row(const Results& x, int64_t row, int64_t count, const Real* copy) {
  if (x.type == type_as<Real>) return;
  char* p = static_cast<char*>(x.data) + row * count * size_of(x.type);
  switch (x.type) {
    case Type::f32: scatter<float>(copy, count, p); break;
    case Type::f64: scatter<double>(copy, count, p); break;
    case Type::bf16: scatter<BFloat16>(copy, count, p); break;
    case Type::f16: scatter<Half>(copy, count, p); break;
  }
}

template <class Real>
struct Moments {
  Real mean, rstd;
};

// Mean and 1 / standard deviation of a row, in two sweeps: the second's squares do not cancel.
template <class Real>
FEATKD_INLINE Moments<Real> moments(const Real* x, int64_t count, double eps) {
  Sum<Real> sum, squares;
  sweep<Real>(count, [&](auto part, int64_t c, int chain) FEATKD_BODY {
    sum.of[chain] += part.load(x + c);
  });
  const Real mean = sum.total() / Real(count);
  sweep<Real>(count, [&](auto part, int64_t c, int chain) FEATKD_BODY {
    const Vec<Real> apart = part.keep(part.load(x + c) - mean);
    squares.of[chain] += apart * apart;
  });
  return {mean, 1 / root(squares.total() / Real(count) + Real(eps))};
}

}  // namespace
}  // namespace featkd::FEATKD_ISA
