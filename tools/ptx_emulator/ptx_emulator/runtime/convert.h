// Conversions between floats, and between floats and integers.
#pragma once
#include "numeric.h"

template <class T>
inline double widen(T x) {
  if constexpr (is_half<T>)
    return (double)(float)x;
  else
    return (double)x;
}

// .ftz of cvt applies to f32 only.
template <bool FTZ, class T>
inline T flush_single(T x) {
  return flush < FTZ && std::is_same_v < T, float >> (x);
}

// Rounds to an integer and clamps it to the range; NaN becomes what the hardware returns.
template <class I, Rounding R, bool FTZ, class F>
inline I to_int(F from) {
  if (from != from) {
    const bool high_bit = std::is_same_v<F, double> || sizeof(I) == 8;
    return high_bit ? (I)(std::make_unsigned_t<I>)((u64)1 << (8 * sizeof(I) - 1)) : I(0);
  }
  double x = widen(flush_single<FTZ>(from));
  x = R == RN   ? std::nearbyint(x)
      : R == RZ ? std::trunc(x)
      : R == RM ? std::floor(x)
                : std::ceil(x);
  const double low = std::is_signed_v<I> ? -std::ldexp(1., 8 * sizeof(I) - 1) : 0;
  const double high = std::ldexp(1., 8 * sizeof(I) - (std::is_signed_v<I> ? 1 : 0));
  return x <= low    ? std::numeric_limits<I>::min()
         : x >= high ? std::numeric_limits<I>::max()
                     : (I)x;
}

template <class F, Rounding R, bool SAT, class I>
inline F int_to_float(I x) {
  F result;
  if constexpr (is_half<F>) {
    // the double is rounded to odd, so that the half is rounded correctly
    double wide = rounded<RZ, double>(
        [&](double, double, double) {
          volatile I v = x;
          return (double)v;
        },
        0.);
    if ((__int128)wide != (__int128)x) wide = bits_as<double>(bits_as<u64>(wide) | 1);
    result = as<F>(
        (u16)narrow<std::is_same_v<F, f16> ? 5 : 8, std::is_same_v<F, f16> ? 10 : 7>(wide, R));
  } else {
    result = rounded<R, F>(
        [&](F, F, F) {
          volatile I v = x;
          return (F)v;
        },
        F(0));
  }
  return finish<false, SAT>(result);
}

template <class To, Rounding R, bool FTZ, bool SAT, bool RELU, class From>
inline To to_float(From from) {
  const From x = flush_single<FTZ>(from);
  To result;
  if constexpr (std::is_same_v<To, double>)
    result = widen(x);
  else if constexpr (std::is_same_v<To, float>) {
    if constexpr (std::is_same_v<From, double> && R != RN)
      result = bits_as<float>(narrow<8, 23>(x, R));
    else
      result = x != x ? bits_as<float>(0x7fffffffu) : (float)x;
  } else if constexpr (R == RN)
    result = To(x);
  else
    result = as<To>((u16)narrow<std::is_same_v<To, f16> ? 5 : 8, std::is_same_v<To, f16> ? 10 : 7>(
        widen(x), R));
  if constexpr (RELU)
    if ((float)result < 0 || std::signbit((float)result))
      result = result != result ? result : To(0.f);
  return finish<false, SAT>(flush_single<FTZ>(result));
}

// Rounds to a whole number of the same type.
template <class T, Rounding R, bool FTZ, bool SAT>
inline T to_whole(T from) {
  if constexpr (is_half<T>)
    return T(to_whole<float, R, false, SAT>((float)from));
  else {
    const T x = flush<FTZ>(from);
    return finish<FTZ, SAT>(R == RN   ? std::nearbyint(x)
                            : R == RZ ? std::trunc(x)
                            : R == RM ? std::floor(x)
                                      : std::ceil(x));
  }
}

template <Rounding R>
inline u32 to_tf32(float x) {
  return x != x ? 0x7fffffffu : narrow<8, 10>((double)x, R) << 13;
}
