// The sweep over talking heads' scores for one instruction set: compiled once for each, with its
// flags and a name of its own in FEATKD_ISA. Nothing here may be a weak symbol, for the linker
// would keep one copy.
#include "heads.h"

#include "../target.h"

namespace featkd {
namespace {

constexpr int BYTES = FEATKD_VECTOR_BYTES, L = BYTES / int(sizeof(float));
constexpr int MOST_COLUMNS = 4;  // vectors of keys at once: a weight serves all of them
// heads of a tile: its sums and a vector of each column stay in the 16 or 32 registers
constexpr int MOST_HEADS = BYTES == 64 ? 4 : 2;

typedef float Vec __attribute__((vector_size(BYTES)));
typedef int32_t Signed __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
typedef uint16_t BFloat16s __attribute__((vector_size(BYTES / 2)));

// `count` of the numbers at p, L of them where it is a constant; the other lanes are zero.
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
// To nearest, ties to even: the carry of the rounding runs into the exponent as it should.
FEATKD_INLINE void store(uint16_t* p, Vec x, int count = L) {
  const Bits bits = Bits(x), nan = Bits{} + 0x7fc0;
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const BFloat16s narrow = __builtin_convertvector(x == x ? rounded : nan, BFloat16s);
  __builtin_memcpy(p, &narrow, size_t(count) * sizeof *p);
}

// Of x <= 0 or NaN, to 1e-7 of itself: 2^n e^r with |r| <= ln 2 / 2, and 0 where it is subnormal.
// e^r by the polynomial of the Cephes library's expf (S. Moshier).
FEATKD_INLINE Vec exponential(Vec x) {
  constexpr float ROUND = 0x1.8p23f;  // its last place is worth 1
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

// e^(x - largest) of whole vectors in place; returns their sum.
FEATKD_INLINE float exponentials(float* row, int64_t count) {
  Vec most = load(row), sum = {};
  for (int64_t c = L; c < count; c += L) {
    const Vec x = load(row + c);
    most = x > most ? x : most;
  }
  const float top = reduce(most, [](float a, float b) { return a > b ? a : b; });
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

// out_g = sum_h weights_gh in_h + bias_g for HEADS heads from g on and COLUMNS vectors of keys from
// c on, of which only `count` keys are there where that is below a vector.
template <int HEADS, int COLUMNS, class From, class To>
FEATKD_INLINE void mix_tile(int64_t heads, const float* weights, const float* bias,
                            HeadRows<From> in, HeadRows<To> out, int64_t g, int64_t c,
                            int count = L) {
  Vec sums[HEADS][COLUMNS];
  FEATKD_UNROLLED
  for (int i = 0; i < HEADS; i++) FEATKD_UNROLLED
  for (int k = 0; k < COLUMNS; k++) sums[i][k] = Vec{} + (bias ? bias[g + i] : 0);
  for (int64_t h = 0; h < heads; h++) {
    Vec x[COLUMNS];
    FEATKD_UNROLLED
    for (int k = 0; k < COLUMNS; k++) x[k] = load(in.data + h * in.stride + c + k * L, count);
    FEATKD_UNROLLED
    for (int i = 0; i < HEADS; i++) FEATKD_UNROLLED
    for (int k = 0; k < COLUMNS; k++) sums[i][k] += weights[(g + i) * heads + h] * x[k];
  }
  FEATKD_UNROLLED
  for (int i = 0; i < HEADS; i++) FEATKD_UNROLLED
  for (int k = 0; k < COLUMNS; k++)
    store(out.data + (g + i) * out.stride + c + k * L, sums[i][k], count);
}

// Some heads at a time: a vector that is loaded serves all of them.
template <int COLUMNS, class From, class To>
void mix_columns(int64_t heads, const float* weights, const float* bias, HeadRows<From> in,
                 HeadRows<To> out, int64_t c) {
  int64_t g = 0;
  for (; g + MOST_HEADS <= heads; g += MOST_HEADS)
    mix_tile<MOST_HEADS, COLUMNS>(heads, weights, bias, in, out, g, c);
  for (; g < heads; g++) mix_tile<1, COLUMNS>(heads, weights, bias, in, out, g, c);
}

// The same for all keys; `out` is not `in`.
template <class From, class To>
void mix(int64_t heads, int64_t keys, const float* weights, const float* bias, HeadRows<From> in,
         HeadRows<To> out) {
  if (keys < L) {
    for (int64_t g = 0; g < heads; g++)
      mix_tile<1, 1>(heads, weights, bias, in, out, g, 0, int(keys));
    return;
  }
  int64_t c = 0;
  for (; c + MOST_COLUMNS * L <= keys; c += MOST_COLUMNS * L)
    mix_columns<MOST_COLUMNS>(heads, weights, bias, in, out, c);
  for (; c + L <= keys; c += L) mix_columns<1>(heads, weights, bias, in, out, c);
  // the last whole vector, of which a part is there already
  if (c < keys) mix_columns<1>(heads, weights, bias, in, out, keys - L);
}

// One query: both mixes and the softmax of its scores for all heads, in the cache.
template <class Stored>
void mix_query(const HeadsProblem& p, int64_t index, float* scratch) {
  const int64_t heads = p.heads, keys = p.keys, width = (keys + L - 1) / L * L;
  const int64_t stride = p.queries * keys;
  Stored* const first = static_cast<Stored*>(p.scores) + index / p.queries * heads * stride +
                        index % p.queries * keys;
  const HeadRows<Stored> scores{first, stride};
  const HeadRows<float> mixed{scratch, width};
  float* const shares = scratch + heads * width;  // (heads, heads): `post` over the sums
  mix(heads, keys, p.pre, nullptr, scores, mixed);
  for (int64_t g = 0; g < heads; g++) {
    float* const row = scratch + g * width;
    for (int64_t c = keys; c < width; c++) row[c] = -__builtin_inff();  // exponential 0
    const float sum = exponentials(row, width);
    for (int64_t h = 0; h < heads; h++) shares[h * heads + g] = p.post[h * heads + g] / sum;
  }
  mix(heads, keys, shares, p.bias, mixed, scores);
}

}  // namespace

extern MixHeads FEATKD_JOIN(mix_heads_, FEATKD_ISA);
void FEATKD_JOIN(mix_heads_, FEATKD_ISA)(const HeadsProblem& p, int64_t first, int64_t last,
                                         float* scratch) {
  for (int64_t index = first; index < last; index++)
    p.bf16 ? mix_query<uint16_t>(p, index, scratch) : mix_query<float>(p, index, scratch);
}

}  // namespace featkd
