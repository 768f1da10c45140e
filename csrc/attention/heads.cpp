// Mixes and normalises the attention scores of talking heads. This file is compiled once per
// instruction set, with the set's compiler flags and its name in FEATKD_ISA. It must define no weak
// symbols: the linker would keep a single copy for all instruction sets.
#include "heads.h"

#include "../target.h"

namespace featkd {
namespace {

constexpr int BYTES = FEATKD_VECTOR_BYTES, L = BYTES / int(sizeof(float));
constexpr int TILE_VECTORS = 4;  // vectors of keys in a tile; they share each loaded weight
// Heads in a tile. Its sums and one head's vectors of keys must fit the 16 or 32 vector registers.
constexpr int TILE_HEADS = BYTES == 64 ? 4 : 2;

typedef float Vec __attribute__((vector_size(BYTES)));
typedef int32_t Signed __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
typedef uint16_t BFloat16s __attribute__((vector_size(BYTES / 2)));

// Loads `count` numbers from p and sets the other lanes to zero. With the default count, the copy
// has a constant size and compiles to one vector load.
FEATKD_INLINE Vec load(const float* p, int count = L) {
  Vec x = {};
  __builtin_memcpy(&x, p, size_t(count) * sizeof *p);
  return x;
}
FEATKD_INLINE Vec load(const uint16_t* p, int count = L) {
  BFloat16s x = {};
  __builtin_memcpy(&x, p, size_t(count) * sizeof *p);
  return Vec(__builtin_convertvector(x, Bits) << 16);
}
FEATKD_INLINE void store(float* p, Vec x, int count = L) {
  __builtin_memcpy(p, &x, size_t(count) * sizeof *p);
}
// Rounds to nearest, ties to even. A carry from the mantissa correctly increments the exponent.
FEATKD_INLINE void store(uint16_t* p, Vec x, int count = L) {
  const Bits bits = Bits(x), nan = Bits{} + 0x7fc0;
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const BFloat16s narrow = __builtin_convertvector(x == x ? rounded : nan, BFloat16s);
  __builtin_memcpy(p, &narrow, size_t(count) * sizeof *p);
}

// e^x for x <= 0 or NaN with a relative error of 1e-7; 0 if the result is subnormal. Computes
// 2^n e^r with |r| <= ln 2 / 2; e^r is the polynomial of expf in the Cephes library (S. Moshier).
FEATKD_INLINE Vec exponential(Vec x) {
  constexpr float ROUND = 0x1.8p23f;  // its last mantissa bit has the value 1
  const Vec zero = {}, shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1;
  const Signed power = (Signed(shifted) - 0x4b400000 + 127) << 23;
  return x < -87.33f ? zero : y * Vec(power);
}

template <class Combine>
FEATKD_INLINE float reduce(Vec x, const Combine& combine) {
  float lanes[L];
  store(lanes, x);
  for (int half = L / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

// Replaces each x by e^(x - maximum) and returns the sum; `count` is a multiple of L.
FEATKD_INLINE float exponentials(float* row, int64_t count) {
  Vec maximum = load(row), sum = {};
  for (int64_t c = L; c < count; c += L) {
    const Vec x = load(row + c);
    maximum = x > maximum ? x : maximum;
  }
  const float top = reduce(maximum, [](float a, float b) { return a > b ? a : b; });
  for (int64_t c = 0; c < count; c += L) {
    const Vec e = exponential(load(row + c) - top);
    sum += e;
    store(row + c, e);
  }
  return reduce(sum, [](float a, float b) { return a + b; });
}

// Rows of `keys` scores, one per head, `stride` apart.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;
};

// out_g = sum_h weights_gh in_h + bias_g for HEADS heads from g on and VECTORS vectors of keys from
// c on. A `count` below L is the number of keys in an incomplete vector.
template <int HEADS, int VECTORS, class From, class To>
FEATKD_INLINE void mix_tile(int64_t heads, const float* weights, const float* bias,
                            HeadRows<From> in, HeadRows<To> out, int64_t g, int64_t c,
                            int count = L) {
  Vec sums[HEADS][VECTORS];
  FEATKD_UNROLLED
  for (int i = 0; i < HEADS; i++) FEATKD_UNROLLED
  for (int k = 0; k < VECTORS; k++) sums[i][k] = Vec{} + (bias ? bias[g + i] : 0);
  for (int64_t h = 0; h < heads; h++) {
    Vec x[VECTORS];
    FEATKD_UNROLLED
    for (int k = 0; k < VECTORS; k++) x[k] = load(in.data + h * in.stride + c + k * L, count);
    FEATKD_UNROLLED
    for (int i = 0; i < HEADS; i++) FEATKD_UNROLLED
    for (int k = 0; k < VECTORS; k++) sums[i][k] += weights[(g + i) * heads + h] * x[k];
  }
  FEATKD_UNROLLED
  for (int i = 0; i < HEADS; i++) FEATKD_UNROLLED
  for (int k = 0; k < VECTORS; k++)
    store(out.data + (g + i) * out.stride + c + k * L, sums[i][k], count);
}

// All heads, in tiles: the heads of a tile share each loaded vector.
template <int VECTORS, class From, class To>
void mix_vectors(int64_t heads, const float* weights, const float* bias, HeadRows<From> in,
                 HeadRows<To> out, int64_t c) {
  int64_t g = 0;
  for (; g + TILE_HEADS <= heads; g += TILE_HEADS)
    mix_tile<TILE_HEADS, VECTORS>(heads, weights, bias, in, out, g, c);
  for (; g < heads; g++) mix_tile<1, VECTORS>(heads, weights, bias, in, out, g, c);
}

// All heads and keys; `out` must not overlap `in`.
template <class From, class To>
void mix(int64_t heads, int64_t keys, const float* weights, const float* bias, HeadRows<From> in,
         HeadRows<To> out) {
  if (keys < L) {
    for (int64_t g = 0; g < heads; g++)
      mix_tile<1, 1>(heads, weights, bias, in, out, g, 0, int(keys));
    return;
  }
  int64_t c = 0;
  for (; c + TILE_VECTORS * L <= keys; c += TILE_VECTORS * L)
    mix_vectors<TILE_VECTORS>(heads, weights, bias, in, out, c);
  for (; c + L <= keys; c += L) mix_vectors<1>(heads, weights, bias, in, out, c);
  // The last vector ends with the last key; the keys that it shares with the vector before are
  // computed again.
  if (c < keys) mix_vectors<1>(heads, weights, bias, in, out, keys - L);
}

// Mixes, softmax and second mix for one query and all heads, small enough to stay in the cache.
template <class Stored>
void mix_query(const HeadsProblem& p, int64_t index, float* scratch) {
  const int64_t heads = p.heads, keys = p.keys, width = (keys + L - 1) / L * L;
  const int64_t stride = p.queries * keys;
  Stored* const first = static_cast<Stored*>(p.scores) + index / p.queries * heads * stride +
                        index % p.queries * keys;
  const HeadRows<Stored> scores{first, stride};
  const HeadRows<float> mixed{scratch, width};
  // (heads, heads): `post` divided by the softmax sums
  float* const post_over_sums = scratch + heads * width;
  mix(heads, keys, p.pre, nullptr, scores, mixed);
  for (int64_t g = 0; g < heads; g++) {
    float* const row = scratch + g * width;
    for (int64_t c = keys; c < width; c++) row[c] = -__builtin_inff();  // its exponential is 0
    const float sum = exponentials(row, width);
    for (int64_t h = 0; h < heads; h++) post_over_sums[h * heads + g] = p.post[h * heads + g] / sum;
  }
  mix(heads, keys, post_over_sums, p.bias, mixed, scores);
}

}  // namespace

extern MixHeads FEATKD_JOIN(mix_heads_, FEATKD_ISA);
void FEATKD_JOIN(mix_heads_, FEATKD_ISA)(const HeadsProblem& p, int64_t first, int64_t last,
                                         float* scratch) {
  for (int64_t index = first; index < last; index++)
    p.bf16 ? mix_query<uint16_t>(p, index, scratch) : mix_query<float>(p, index, scratch);
}

}  // namespace featkd
