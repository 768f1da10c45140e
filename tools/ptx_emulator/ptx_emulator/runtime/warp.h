// Operations of a warp: shuffles, votes, matches, reductions.
#pragma once
#include "matrix.h"
#include "tensor.h"
#include "wgmma.h"

inline void shuffle(Thread* w, u32 mask, u32 operation) {
  for (u32 rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const u32 amount = (u32)w[lane].in[1] & 31, control = (u32)w[lane].in[2];
    const int clamp = control & 31, segment = (control >> 8) & 31;
    const int top = (lane & segment) | (clamp & ~segment), bottom = lane & segment;
    int source;
    bool inside;
    if (operation == W_UP)
      source = lane - (int)amount, inside = source >= top;
    else if (operation == W_DOWN)
      source = lane + (int)amount, inside = source <= top;
    else if (operation == W_BFLY)
      source = lane ^ (int)amount, inside = source <= top;
    else
      source = bottom | ((int)amount & ~segment), inside = source <= top;
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
    case W_ADD:
      return a + b;
    case W_MIN:
      return std::min(a, b);
    case W_MAX:
      return std::max(a, b);
    case W_AND:
      return a & b;
    case W_OR:
      return a | b;
    case W_XOR:
      return a ^ b;
    case W_MIN_SIGNED:
      return (u32)std::min((s32)a, (s32)b);
    default:
      return (u32)std::max((s32)a, (s32)b);
  }
}

inline void complete_warp(Block& b, u32 first, u32 mask) {
  Thread* w = &b.threads[first];
  const u32 leader = __builtin_ctz(mask), operation = w[leader].operation;
  if (operation == W_SYNC) return;
  if (operation >= W_UP && operation <= W_IDX) return shuffle(w, mask, operation);
  if (operation >= W_LDMATRIX) {
    if (mask != ~0u) {
      if (kCheck) report(w[leader], WARP_MISMATCH, w[leader].line);
      return;
    }
    switch (operation) {
      case W_MMA:
        return mma(w);
      case W_PRODUCT:
        return issue_products(w);
      case W_PRODUCT_WAIT:
        return finish_products(w);
      default:
        return matrix_transfer(w, operation == W_LDMATRIX);
    }
  }
  u32 yes = 0, result = (u32)w[leader].in[0];
  for (u32 rest = mask; rest; rest &= rest - 1) {
    const u32 lane = __builtin_ctz(rest);
    if (w[lane].in[0]) yes |= 1u << lane;
    if (operation >= W_ADD && lane != leader)
      result = reduce(operation, result, (u32)w[lane].in[0]);
  }
  for (u32 rest = mask; rest; rest &= rest - 1) {
    Thread& t = w[__builtin_ctz(rest)];
    u32 equal = 0;
    if (operation == W_MATCH_ANY || operation == W_MATCH_ALL)
      for (u32 others = mask; others; others &= others - 1)
        if (w[__builtin_ctz(others)].in[0] == t.in[0]) equal |= 1u << __builtin_ctz(others);
    switch (operation) {
      case W_ALL:
        t.out[0] = yes == mask;
        break;
      case W_ANY:
        t.out[0] = yes != 0;
        break;
      case W_BALLOT:
        t.out[0] = yes;
        break;
      case W_UNI:
        t.out[0] = yes == mask || !yes;
        break;
      case W_MATCH_ANY:
        t.out[0] = equal;
        break;
      case W_MATCH_ALL:
        t.out[0] = equal == mask ? mask : 0, t.out[1] = equal == mask;
        break;
      default:
        t.out[0] = result;
    }
  }
}
