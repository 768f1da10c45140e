// Element types of inputs, and functions on numbers for all targets.
#pragma once

#include "problem.h"
#include "team.h"

namespace featkd::FEATKD_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FEATKD_INLINE float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

FEATKD_INLINE float widen(float x) { return x; }
FEATKD_INLINE double widen(double x) { return x; }
FEATKD_INLINE float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

// A product rebiases the exponent, which is exact for subnormal numbers too.
FEATKD_INLINE float widen(Half x) {
  const uint32_t rest = x.bits & 0x7fff;
  const float size = rest < 0x7c00 ? from_bits(rest << 13) * 0x1p112f
                                   : from_bits(0x7f800000u | (rest & 0x3ff) << 13);
  return x.bits & 0x8000 ? -size : size;
}

// Returns the bits of |x|. Their integer order is that of |x|; infinity and NaN are above all
// numbers.
FEATKD_INLINE uint32_t bits_of_magnitude(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x) & 0x7fffffffu;
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
#endif
}
FEATKD_INLINE uint64_t bits_of_magnitude(double x) {
#if defined(__CUDA_ARCH__)
  return __double_as_longlong(x) & 0x7fffffffffffffffull;
#else
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffffffffffull;
#endif
}
FEATKD_INLINE uint16_t bits_of_magnitude(BFloat16 x) { return x.bits & 0x7fff; }
FEATKD_INLINE uint16_t bits_of_magnitude(Half x) { return x.bits & 0x7fff; }

template <class In>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr Bits INFINITE = 0x7f800000u;
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr Bits INFINITE = 0x7ff0000000000000ull;
};
template <>
struct Format<BFloat16> {
  using Bits = uint16_t;
  static constexpr Bits INFINITE = 0x7f80;
};
template <>
struct Format<Half> {
  using Bits = uint16_t;
  static constexpr Bits INFINITE = 0x7c00;
};
FEATKD_INLINE double value_of_bits(uint64_t bits, double) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(bits);
#else
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}
FEATKD_INLINE double value_of_bits(uint64_t bits, float) { return from_bits(uint32_t(bits)); }
FEATKD_INLINE double value_of_bits(uint64_t bits, BFloat16) {
  return widen(BFloat16{uint16_t(bits)});
}
FEATKD_INLINE double value_of_bits(uint64_t bits, Half) { return widen(Half{uint16_t(bits)}); }

FEATKD_INLINE float power_of_two(int exponent, float) {
  return from_bits(uint32_t(exponent + 127) << 23);
}
FEATKD_INLINE double power_of_two(int exponent, double) {
  return value_of_bits(uint64_t(exponent + 1023) << 52, double());
}

// Returns e with 2^(e-1) <= x < 2^e, for x > 0.
FEATKD_INLINE int exponent_of(double x) {
  const bool subnormal = x < 0x1p-1022;
  return int(bits_of_magnitude(subnormal ? x * 0x1p64 : x) >> 52) - 1022 - 64 * subnormal;
}

// A column with a squared norm up to TINY needs no reflection; TINY is far above underflow. Squared
// off-diagonal entries below E2_FLOOR are raised to it, because Sturm counts need them positive;
// its root is far below the rounding error of an eigenvalue.
template <class Real>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float TINY = 0x1p-100f, E2_FLOOR = 0x1p-100f;
  static constexpr int BITS = 24;
};
template <>
struct Limits<double> {
  static constexpr double TINY = 0x1p-900, E2_FLOOR = 0x1p-160;
  static constexpr int BITS = 53;
};

FEATKD_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
FEATKD_INLINE double magnitude(double x) { return __builtin_fabs(x); }
FEATKD_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FEATKD_INLINE double square_root(double x) { return __builtin_sqrt(x); }

}  // namespace featkd::FEATKD_ISA
