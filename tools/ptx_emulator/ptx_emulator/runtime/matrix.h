// Matrix instructions of a warp: ldmatrix, stmatrix and mma.
#pragma once
#include "memory.h"

// Lane 8m+r holds the address of row r of matrix m; lane l holds elements (l/4, 2(l%4)) and the
// next one.
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
        if (is_load)
          memcpy(&half[h], memory, 2);
        else
          memcpy(memory, &half[h], 2);
      }
      if (is_load) w[lane].out[m] = half[0] | (u32)half[1] << 16;
    }
  if constexpr (kCheck)
    for (u32 row = 0; row < matrices * 8; row++)
      if (w[row].in[0] % 16)
        report(w[row], MISALIGNED, w[0].line, SHARED, w[row].in[0] & kOffsetMask, 16);
  if constexpr (kCount)
    for (u32 row = 0; row < matrices * 8; row++)
      log_access(w[row], SHARED, w[row].in[0] & kOffsetMask, 16, READ, (u32)w[0].in[8]);
}

// Returns element `index` of a register.
inline double element(u64 bits, u32 index, u32 type) {
  switch (type) {
    case MMA_BF16:
      return (float)as<bf16>((u16)(bits >> (16 * index)));
    case MMA_F16:
      return (float)as<f16>((u16)(bits >> (16 * index)));
    case MMA_TF32:
      return bits_as<float>((u32)bits & 0xffffe000u);
    case MMA_F64:
      return bits_as<double>(bits);
    case MMA_S8:
      return (s8)(bits >> (8 * index));
    default:
      return (u8)(bits >> (8 * index));
  }
}

// D = A B + C with fragments of A (M x K), B (K x 8) and C (M x 8) in the registers of the lanes,
// as in the PTX manual: lane l holds row l/4 (and that 8 below), and one register holds adjacent
// columns. in[0..3]: A, in[4..5]: B, in[6..9]: C, in[10]: types of A, B and C, in[11]: M << 8 | K.
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
        a[row + 8 * (i % row_groups)][quad * pack + h + step * (i / row_groups)] =
            element(w[lane].in[i], h, a_type);
    for (u32 i = 0; i < column_groups; i++)
      for (u32 h = 0; h < pack; h++)
        b[quad * pack + h + step * i][row] = element(w[lane].in[4 + i], h, b_type);
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
        if (c_kind == 2)
          c[row][column] = std::fma(a[row][k], b[k][column], c[row][column]);
        else
          c[row][column] += a[row][k] * b[k][column];
      }
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 row = lane / 4, quad = lane % 4;
    for (u32 i = 0; i < 2 * row_groups; i++) {
      const double sum = c[row + 8 * (i / 2)][quad * 2 + i % 2];
      u64& out = w[lane].out[c_kind == 1 ? i / 2 : i];
      if (c_kind == 0)
        out = bits_as<u32>((float)sum);
      else if (c_kind == 1)
        out = i % 2 ? out | (u64)f16(sum).bits << 16 : f16(sum).bits;
      else if (c_kind == 2)
        out = bits_as<u64>(sum);
      else
        out = (u32)(s64)sum;
    }
  }
}
