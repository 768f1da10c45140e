// Integer and bit operations with PTX semantics: wrapping, saturation, long shifts, bit fields.
#pragma once
#include "numeric.h"

template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, s64, u64>,
                       std::conditional_t<std::is_signed_v<T>, s32, u32>>>;
template <class T>
inline T mul_lo(T a, T b) {
  return (T)((Wide<std::make_unsigned_t<T>>)a * (Wide<std::make_unsigned_t<T>>)b);
}
template <class T>
inline T mul_hi(T a, T b) {
  return (T)(((Wide<T>)a * (Wide<T>)b) >> (8 * sizeof(T)));
}
template <class T>
inline Wide<T> mul_wide(T a, T b) {
  return (Wide<T>)a * (Wide<T>)b;
}
template <class T>
inline T wrap_add(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return (T)(U)((U)a + (U)b);
}
template <class T>
inline T wrap_sub(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return (T)(U)((U)a - (U)b);
}
template <class T>
inline T sat_to(__int128 x) {
  return (T)std::min<__int128>(std::max<__int128>(x, std::numeric_limits<T>::min()),
                               std::numeric_limits<T>::max());
}
// Division by zero returns all ones, as on the hardware; the minimum divided by -1 wraps.
template <class T>
inline T div_int(T a, T b) {
  return b == 0 ? (T)-1 : (T)((Wide<T>)a / (Wide<T>)b);
}
template <class T>
inline T rem_int(T a, T b) {
  return b == 0 ? a : (T)((Wide<T>)a % (Wide<T>)b);
}
// Shifts by the width or more return zero, or the sign.
template <class T>
inline T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : (T)(a << n);
}
template <class T>
inline T shift_right(T a, u32 n) {
  if constexpr (std::is_signed_v<T>)
    return (T)(a >> std::min<u32>(n, 8 * sizeof(T) - 1));
  else
    return n >= 8 * sizeof(T) ? T(0) : (T)(a >> n);
}
inline u32 funnel_left(u32 low, u32 high, u32 n) {
  return (u32)(((((u64)high << 32) | low) << n) >> 32);
}
inline u32 funnel_right(u32 low, u32 high, u32 n) { return (u32)((((u64)high << 32) | low) >> n); }
template <class T>
inline u32 leading_zeros(T a) {
  return a == 0 ? 8 * sizeof(T) : sizeof(T) == 8 ? __builtin_clzll(a) : __builtin_clz((u32)a);
}
template <class T>
inline u32 find_top(T a, bool shift_amount) {
  std::make_unsigned_t<T> x = (std::make_unsigned_t<T>)(a < 0 ? ~a : a);
  if (x == 0) return ~0u;
  const u32 lead = leading_zeros(x);
  return shift_amount ? lead : 8 * sizeof(T) - 1 - lead;
}
template <class T>
inline T reverse_bits(T a) {
  T r = 0;
  for (u32 i = 0; i < 8 * sizeof(T); i++) r |= ((a >> i) & 1) << (8 * sizeof(T) - 1 - i);
  return r;
}
template <class T>
inline T extract_field(T a, u32 start, u32 length) {
  using U = std::make_unsigned_t<T>;
  const u32 width = 8 * sizeof(T);
  start &= 255, length &= 255;
  const u32 top = std::min(start + length - 1, width - 1);
  const bool sign = std::is_signed_v<T> && length && (((U)a >> top) & 1);
  U result = 0;
  for (u32 i = 0; i < width; i++) {
    const bool bit = i < length && start + i < width ? ((U)a >> (start + i)) & 1 : sign;
    result |= (U)bit << i;
  }
  return (T)result;
}
template <class T>
inline T insert_field(T field, T into, u32 start, u32 length) {
  start &= 255, length &= 255;
  for (u32 i = 0; i < length && start + i < 8 * sizeof(T); i++)
    into = (into & ~((T)1 << (start + i))) | (((field >> i) & 1) << (start + i));
  return into;
}
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 source = a | (u64)b << 32;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 nibble = selector >> (4 * i);
    u8 byte = (u8)(source >> (8 * (nibble & 7)));
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= (u32)byte << (8 * i);
  }
  return result;
}
inline u32 lop3_(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline u32 dot4(u32 a, bool a_signed, u32 b, bool b_signed, u32 c) {
  for (int i = 0; i < 32; i += 8)
    c += (u32)((a_signed ? (s32)(s8)(a >> i) : (s32)(u8)(a >> i)) *
               (b_signed ? (s32)(s8)(b >> i) : (s32)(u8)(b >> i)));
  return c;
}
