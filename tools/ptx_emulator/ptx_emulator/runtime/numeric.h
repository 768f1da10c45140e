// Number formats, rounding, and floating-point arithmetic with PTX semantics.
#pragma once
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;
typedef u8 b8;
typedef u16 b16;
typedef u32 b32;
typedef u64 b64;

enum Rounding { RN, RZ, RM, RP, RNA };

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit casts keep the size");
  To to;
  memcpy((void*)&to, &from, sizeof to);
  return to;
}

// Rounds x to a format with EXPONENT and MANTISSA bits; returns its bits. NaN is the canonical one.
template <int EXPONENT, int MANTISSA>
inline u32 narrow(double x, Rounding rounding) {
  const u32 infinity = ((1u << EXPONENT) - 1) << MANTISSA;
  const u32 sign = std::signbit(x) ? 1u << (EXPONENT + MANTISSA) : 0;
  if (x != x) return infinity | ((1u << MANTISSA) - 1);
  if (std::isinf(x)) return sign | infinity;
  if (x == 0) return sign;
  const int bias = (1 << (EXPONENT - 1)) - 1;
  int exponent;
  std::frexp(x, &exponent);
  int last = std::max(exponent - 1, 1 - bias) - MANTISSA;  // exponent of the last kept bit
  const double scaled = std::ldexp(std::fabs(x), -last);
  u32 kept = (u32)scaled;
  const double rest = scaled - kept;
  const bool away = rounding == RN    ? rest > 0.5 || (rest == 0.5 && (kept & 1))
                    : rounding == RNA ? rest >= 0.5
                    : rounding == RM  ? sign && rest > 0
                    : rounding == RP  ? !sign && rest > 0
                                      : false;
  kept += away;
  if (kept >> (MANTISSA + 1)) {
    kept >>= 1;
    last++;
  }
  if (kept < (1u << MANTISSA)) return sign | kept;
  const int biased = last + MANTISSA + bias;
  if (biased >= (1 << EXPONENT) - 1) {
    const bool to_infinity =
        rounding == RN || rounding == RNA || (rounding == RM && sign) || (rounding == RP && !sign);
    return sign | (to_infinity ? infinity : infinity - 1);
  }
  return sign | ((u32)biased << MANTISSA) | (kept - (1u << MANTISSA));
}

struct f16 {
  u16 bits;
  f16() = default;
  f16(float x) : bits(x != x ? 0x7fff : bits_as<u16>((_Float16)x)) {}
  f16(double x) : bits((u16)narrow<5, 10>(x, RN)) {}
  operator float() const { return (float)bits_as<_Float16>(bits); }
};

struct bf16 {
  u16 bits;
  bf16() = default;
  bf16(float x) {
    const u32 b = bits_as<u32>(x);
    bits = x != x ? 0x7fff : (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
  bf16(double x) : bits((u16)narrow<8, 7>(x, RN)) {}
  operator float() const { return bits_as<float>((u32)bits << 16); }
};

template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
constexpr bool is_float = is_half<T> || std::is_floating_point_v<T>;

// Returns the low bits of register r as a T.
template <class T, class R>
inline T as(R r) {
  if constexpr (std::is_same_v<T, bool>)
    return r;
  else {
    u64 wide = 0;
    memcpy(&wide, &r, sizeof r);
    T value;
    memcpy((void*)&value, &wide, sizeof value);
    return value;
  }
}

// Writes a value to register r: signed integers are sign-extended, other types zero-extended.
template <class R, class T>
inline void put(R& r, T value) {
  if constexpr (std::is_same_v<T, bool>)
    r = value;
  else {
    u64 wide = 0;
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>)
      wide = (u64)(s64)value;
    else
      memcpy(&wide, &value, sizeof value);
    memcpy((void*)&r, &wide, sizeof r);
  }
}

// Returns f(a, b, c) in a rounding mode; `volatile` keeps the operation between the mode switches.
template <Rounding R, class T, class F>
inline T rounded(F f, T a, T b = T(), T c = T()) {
  if constexpr (R == RN)
    return f(a, b, c);
  else {
    volatile T x = a, y = b, z = c;
    const int before = fegetround();
    fesetround(R == RZ ? FE_TOWARDZERO : R == RM ? FE_DOWNWARD : FE_UPWARD);
    volatile T result = f((T)x, (T)y, (T)z);
    fesetround(before);
    return result;
  }
}

template <class T>
constexpr double smallest_normal = std::is_same_v<T, f16>      ? 0x1p-14
                                   : std::is_same_v<T, double> ? 0x1p-1022
                                                               : 0x1p-126;
// .ftz: subnormals become zeros of the same sign.
template <bool FTZ, class T>
inline T flush(T x) {
  if constexpr (FTZ)
    return std::fabs((double)x) < smallest_normal<T> ? T(std::copysign(0.f, (float)x)) : x;
  else
    return x;
}

template <bool FTZ, bool SAT, class T>
inline T finish(T x) {
  x = flush<FTZ>(x);
  if constexpr (SAT) return (double)x > 0 ? ((double)x < 1 ? x : T(1.f)) : T(0.f);
  return x;
}

// Returns a * b + c of halves as a double rounded to odd, so that rounding to a half is correct.
inline double fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double back = sum - product;
  const double error = (product - (sum - back)) + (c - back);
  if (error == 0 || (bits_as<u64>(sum) & 1)) return sum;
  return std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
}

#define PTX_BINARY(name, symbol)                                                                \
  template <class T, Rounding R, bool FTZ, bool SAT>                                            \
  inline T name(T a, T b) {                                                                     \
    if constexpr (is_half<T>)                                                                   \
      return finish<FTZ, SAT>(T((double)flush<FTZ>(a) symbol(double) flush<FTZ>(b)));           \
    else                                                                                        \
      return finish<FTZ, SAT>(                                                                  \
          rounded<R, T>([](T x, T y, T) { return x symbol y; }, flush<FTZ>(a), flush<FTZ>(b))); \
  }
PTX_BINARY(add_, +)
PTX_BINARY(sub_, -)
PTX_BINARY(mul_, *)
PTX_BINARY(div_, /)
#undef PTX_BINARY

template <class T, Rounding R, bool FTZ, bool SAT>
inline T fma_(T a, T b, T c) {
  if constexpr (is_half<T>)
    return finish<FTZ, SAT>(T(fma_to_odd(flush<FTZ>(a), flush<FTZ>(b), flush<FTZ>(c))));
  else
    return finish<FTZ, SAT>(rounded<R, T>([](T x, T y, T z) { return std::fma(x, y, z); },
                                          flush<FTZ>(a), flush<FTZ>(b), flush<FTZ>(c)));
}

// Functions of one operand, such as the square root; `exact` computes the function.
template <Rounding R, bool FTZ, bool SAT, class T, class F>
inline T unary_(F exact, T a) {
  if constexpr (is_half<T>)
    return finish<FTZ, SAT>(T(exact((double)flush<FTZ>(a))));
  else
    return finish<FTZ, SAT>(rounded<R, T>([&](T x, T, T) { return (T)exact(x); }, flush<FTZ>(a)));
}

// Returns the minimum or the maximum: a NaN only if both are or NAN_WINS; -0 is less than +0.
template <bool LARGER, class T, bool NAN_WINS, bool FTZ>
inline T extreme(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return (a < b) == LARGER ? b : a;
  else {
    const bool nan_a = a != a, nan_b = b != b;
    if (nan_a || nan_b) {
      if (NAN_WINS || (nan_a && nan_b)) return T(std::numeric_limits<float>::quiet_NaN());
      return flush<FTZ>(nan_a ? b : a);
    }
    a = flush<FTZ>(a), b = flush<FTZ>(b);
    const bool a_below = a < b || (a == b && std::signbit((double)a));
    return a_below == LARGER ? b : a;
  }
}
template <class T, bool NAN_WINS, bool FTZ>
inline T min_(T a, T b) {
  return extreme<false, T, NAN_WINS, FTZ>(a, b);
}
template <class T, bool NAN_WINS, bool FTZ>
inline T max_(T a, T b) {
  return extreme<true, T, NAN_WINS, FTZ>(a, b);
}

// Applies f to each half of a pair.
template <class H, class F>
inline u32 pairwise(F f, u32 a, u32 b = 0, u32 c = 0) {
  u32 result = 0;
  for (int half = 0; half < 32; half += 16) {
    const H r = f(as<H>((u16)(a >> half)), as<H>((u16)(b >> half)), as<H>((u16)(c >> half)));
    result |= (u32)r.bits << half;
  }
  return result;
}

// Clears or flips the sign bit, also of NaN, as the hardware does.
template <class T>
inline T absolute(T a) {
  if constexpr (std::is_integral_v<T>)
    return a < 0 ? (T)(0 - (std::make_unsigned_t<T>)a) : a;
  else if constexpr (is_half<T>)
    return as<T>((u16)(a.bits & 0x7fff));
  else
    return std::fabs(a);
}
template <class T>
inline T negative(T a) {
  if constexpr (std::is_integral_v<T>)
    return (T)(0 - (std::make_unsigned_t<T>)a);
  else if constexpr (is_half<T>)
    return as<T>((u16)(a.bits ^ 0x8000));
  else
    return -a;
}
