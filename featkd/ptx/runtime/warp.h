// Operations that a whole warp does together: shuffles, votes, reductions, matrices.
#pragma once
#include "copies.h"

enum MmaType : u32 { MMA_BF16, MMA_F16, MMA_TF32, MMA_F64, MMA_S8, MMA_U8 };

inline void shuffle(Block& b, Thread* w, u32 mask, u32 operation) {
  (void)b;
  for (u32 rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const u32 amount = (u32)w[lane].in[1] & 31, control = (u32)w[lane].in[2];
    const int clamp = control & 31, segment = (control >> 8) & 31;
    const int top = (lane & segment) | (clamp & ~segment), bottom = lane & segment;
    int source;
    bool inside;
    if (operation == W_UP) source = lane - (int)amount, inside = source >= top;
    else if (operation == W_DOWN) source = lane + (int)amount, inside = source <= top;
    else if (operation == W_BFLY) source = lane ^ (int)amount, inside = source <= top;
    else source = bottom | ((int)amount & ~segment), inside = source <= top;
    if (!inside) source = lane;
    if (!(mask >> source & 1)) {
      if (kCheck) report(w[lane], WARP_MISMATCH, w[lane].line, NO_SPACE, 0, 0, -1, source);
      source = lane;
    }
    w[lane].out[0] = w[source].in[0];
    w[lane].out[1] = inside;
  }
}

inline u32 reduce(u32 operation, u32 a, u32 b) {
  switch (operation) {
    case W_ADD: return a + b;
    case W_MIN: return std::min(a, b);
    case W_MAX: return std::max(a, b);
    case W_AND: return a & b;
    case W_OR: return a | b;
    case W_XOR: return a ^ b;
    case W_MIN_SIGNED: return (u32)std::min((s32)a, (s32)b);
    default: return (u32)std::max((s32)a, (s32)b);
  }
}

// Row r of matrix m starts where lane 8m+r says; lane l holds elements (l/4, 2(l%4)) and the next.
inline void matrix_transfer(Thread* w, bool is_load) {
  const u32 matrices = (u32)w[0].in[1];
  const bool transposed = w[0].in[2];
  for (u32 m = 0; m < matrices; m++)
    for (u32 lane = 0; lane < 32; lane++) {
      u16 half[2];
      if (!is_load) half[0] = (u16)w[lane].in[3 + m], half[1] = (u16)(w[lane].in[3 + m] >> 16);
      for (u32 h = 0; h < 2; h++) {
        u32 row = lane / 4, column = lane % 4 * 2 + h;
        if (transposed) std::swap(row, column);
        const u64 at = (w[m * 8 + row].in[0] & kOffsetMask) + 2 * column;
        u8* memory = shared_access(w[lane], at, 2, 2, is_load ? READ : WRITE, false, w[0].line);
        if (is_load) memcpy(&half[h], memory, 2);
        else memcpy(memory, &half[h], 2);
      }
      if (is_load) w[lane].out[m] = half[0] | (u32)half[1] << 16;
    }
  if constexpr (kCheck)
    for (u32 row = 0; row < matrices * 8; row++)
      if (w[row].in[0] % 16) report(w[row], MISALIGNED, w[0].line, SHARED, w[row].in[0] & kOffsetMask, 16);
  if constexpr (kCount)
    for (u32 row = 0; row < matrices * 8; row++) log_access(w[row], SHARED, w[row].in[0] & kOffsetMask, 16, READ, (u32)w[0].in[8]);
}

inline double element(u64 bits, u32 index, u32 type) {
  switch (type) {
    case MMA_BF16: return (float)as<bf16>((u16)(bits >> (16 * index)));
    case MMA_F16: return (float)as<f16>((u16)(bits >> (16 * index)));
    case MMA_TF32: return bits_as<float>((u32)bits & 0xffffe000u);
    case MMA_F64: return bits_as<double>(bits);
    case MMA_S8: return (s8)(bits >> (8 * index));
    default: return (u8)(bits >> (8 * index));
  }
}

// D = A B + C with A (M x K) row-major and B (K x 8) column-major fragments, as the PTX manual
// lays them over the lanes: lane l owns row l/4 (and +8), columns in packs of one register.
// in[0..3] A, in[4..5] B, in[6..9] C, in[10] the two types, in[11] M << 8 | K.
inline void mma(Thread* w) {
  const u32 a_type = w[0].in[10] & 15, b_type = w[0].in[10] >> 4 & 15, c_kind = w[0].in[10] >> 8;
  const u32 M = (u32)w[0].in[11] >> 8, K = (u32)w[0].in[11] & 255;
  const u32 pack = a_type <= MMA_F16 ? 2 : a_type >= MMA_S8 ? 4 : 1;
  const u32 row_groups = M / 8, step = 4 * pack, column_groups = K / step;
  double a[16][32], b[32][8], c[16][8];
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 row = lane / 4, quad = lane % 4;
    for (u32 i = 0; i < row_groups * column_groups; i++)
      for (u32 h = 0; h < pack; h++)
        a[row + 8 * (i % row_groups)][quad * pack + h + step * (i / row_groups)] = element(w[lane].in[i], h, a_type);
    for (u32 i = 0; i < column_groups; i++)
      for (u32 h = 0; h < pack; h++) b[quad * pack + h + step * i][row] = element(w[lane].in[4 + i], h, b_type);
    for (u32 i = 0; i < 2 * row_groups; i++) {
      const u64 bits = w[lane].in[6 + (c_kind == 1 ? i / 2 : i)];
      c[row + 8 * (i / 2)][quad * 2 + i % 2] = c_kind == 0   ? (double)bits_as<float>((u32)bits)
                                               : c_kind == 1 ? element(bits, i % 2, MMA_F16)
                                               : c_kind == 2 ? bits_as<double>(bits)
                                                             : (double)(s32)bits;
    }
  }
  for (u32 row = 0; row < M; row++)
    for (u32 k = 0; k < K; k++)
      for (u32 column = 0; column < 8; column++) {
        if (c_kind == 2) c[row][column] = std::fma(a[row][k], b[k][column], c[row][column]);
        else c[row][column] += a[row][k] * b[k][column];
      }
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 row = lane / 4, quad = lane % 4;
    for (u32 i = 0; i < 2 * row_groups; i++) {
      const double sum = c[row + 8 * (i / 2)][quad * 2 + i % 2];
      u64& out = w[lane].out[c_kind == 1 ? i / 2 : i];
      if (c_kind == 0) out = bits_as<u32>((float)sum);
      else if (c_kind == 1) out = i % 2 ? out | (u64)f16(sum).bits << 16 : f16(sum).bits;
      else if (c_kind == 2) out = bits_as<u64>(sum);
      else out = (u32)(s64)sum;
    }
  }
}

inline void complete_warp(Block& b, u32 first, u32 mask) {
  Thread* w = &b.threads[first];
  const u32 leader = __builtin_ctz(mask), operation = w[leader].operation;
  if (operation == W_SYNC) return;
  if (operation >= W_UP && operation <= W_IDX) return shuffle(b, w, mask, operation);
  if (operation >= W_LDMATRIX) {
    if (mask != ~0u) {
      if (kCheck) report(w[leader], WARP_MISMATCH, w[leader].line);
      return;
    }
    return operation == W_MMA ? mma(w) : matrix_transfer(w, operation == W_LDMATRIX);
  }
  u32 yes = 0, result = (u32)w[leader].in[0];
  for (u32 rest = mask; rest; rest &= rest - 1) {
    const u32 lane = __builtin_ctz(rest);
    if (w[lane].in[0]) yes |= 1u << lane;
    if (operation >= W_ADD && lane != leader) result = reduce(operation, result, (u32)w[lane].in[0]);
  }
  for (u32 rest = mask; rest; rest &= rest - 1) {
    Thread& t = w[__builtin_ctz(rest)];
    u32 equal = 0;
    if (operation == W_MATCH_ANY || operation == W_MATCH_ALL)
      for (u32 others = mask; others; others &= others - 1)
        if (w[__builtin_ctz(others)].in[0] == t.in[0]) equal |= 1u << __builtin_ctz(others);
    switch (operation) {
      case W_ALL: t.out[0] = yes == mask; break;
      case W_ANY: t.out[0] = yes != 0; break;
      case W_BALLOT: t.out[0] = yes; break;
      case W_UNI: t.out[0] = yes == mask || !yes; break;
      case W_MATCH_ANY: t.out[0] = equal; break;
      case W_MATCH_ALL: t.out[0] = equal == mask ? mask : 0, t.out[1] = equal == mask; break;
      default: t.out[0] = result;
    }
  }
}

inline u64 shuffle_(Thread& t, u32 operation, u32 value, u32 amount, u32 control, u32 mask, u32 line) {
  t.in[0] = value, t.in[1] = amount, t.in[2] = control;
  warp_sync(t, operation, mask, line);
  return t.out[0];
}
inline u64 vote_(Thread& t, u32 operation, u64 value, u32 mask, u32 line) {
  t.in[0] = value;
  warp_sync(t, operation, mask, line);
  return t.out[0];
}
