// Teams: the parallel workers on one matrix. The algorithms are templates over the team, and are
// written once for a CUDA block, a single CPU thread and, in tests, several CPU threads.
//
// A team has size() groups that run in parallel. A group has lanes that run in lockstep: the 32
// threads of a CUDA warp, or the lanes of a CPU thread's vector registers. A Lane<Real> has one
// value per lane: it is a scalar in CUDA code and a vector on a CPU. A team provides:
//
//   width<Team, Real>                     lanes per group
//   rank(), size()                        index of this group, number of groups
//   barrier(At<number>())                 barrier for all groups; each call has its own number
//   is_leader()                           true in one lane of a group
//   lane(), lanes()                       for scalar loops: 0 and 1 on a CPU
//   load(p), store(p, x)                  lane l accesses p[l]
//   load_upto(p, count), store_upto(...)  only the lanes below count; the others load 0
//   accumulate(p, x, count, add)          p[l] (+)= x, in p's type
//   splat(x), iota(Real())                x in every lane; 0, 1, 2, ...
//   first_lane(x)                         value of the first lane; in CUDA code, of each lane
//   widen(x), narrow(x, Real())           conversion to float64 lanes and back
//   sum(x), maximum(x)                    over the lanes of a group, returned in every lane
//   sign_bits(x), as_real(n, Real())      1 if the sign bit is set; integer lanes to Real
//   signs_differ(x, y)                    1 if the sign bits of float64 lanes differ
//   normalize(x, y)                       scales both so that the larger is in [1, 2)
//   ROWS, GRAM_ROWS, UNROLL, PACK_DEPTH   tile sizes that fit the registers and the cache
//   PACKED, PAD                           layout of matrices in scratch memory
//   STAGED                                whether rows are copied from global to scratch memory
//   GramSum                               type in which the Gram matrix is added up
//
// Groups exchange data through memory only, with a barrier in between. All lanes of all groups must
// reach every barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../target.h"

namespace featkd::FEATKD_ISA {

template <int NUMBER>
struct At {};

template <class Real>
struct Bits;
template <>
struct Bits<float> {
  using Type = int32_t;
};
template <>
struct Bits<double> {
  using Type = int64_t;
};

constexpr uint64_t EXPONENT = uint64_t(0x7ff) << 52;  // of a float64 number
constexpr uint64_t EXPONENT_OF_ONE = uint64_t(0x3ff) << 52;

template <class Team, class Real>
constexpr int width = Team::LANE_BYTES / int(sizeof(Real));

template <class Team, class Real>
using Lane = typename Team::template LaneOf<Real>;

// Lane operations for groups that are CPU threads.
template <int BYTES>
struct VectorLanes {
  static constexpr int LANE_BYTES = BYTES;
  static constexpr bool PACKED = false;
  static constexpr int PAD = 0;
  template <class Real>
  using GramSum = double;

  // may_alias: scratch memory holds plain arrays, which are aligned to whole vectors.
  template <class Real>
  struct Vector {
    typedef Real Type __attribute__((vector_size(BYTES), may_alias));
    typedef typename Bits<Real>::Type Count __attribute__((vector_size(BYTES), may_alias));
    typedef uint64_t Word __attribute__((vector_size(BYTES), may_alias));
    typedef double Wide __attribute__((vector_size(BYTES / sizeof(Real) * sizeof(double))));
  };
  template <class Real>
  using LaneOf = typename Vector<Real>::Type;
  template <class Real>
  using CountOf = typename Vector<Real>::Count;
  template <class Real>
  using WordOf = typename Vector<Real>::Word;
  template <class Real>
  using WideOf = typename Vector<Real>::Wide;

  FEATKD_INLINE static bool is_leader() { return true; }
  FEATKD_INLINE static int lane() { return 0; }
  FEATKD_INLINE static int lanes() { return 1; }

  template <class Real>
  FEATKD_INLINE static LaneOf<Real> load(const Real* p) {
    return *reinterpret_cast<const LaneOf<Real>*>(p);
  }
  template <class Real>
  FEATKD_INLINE static void store(Real* p, LaneOf<Real> x) {
    *reinterpret_cast<LaneOf<Real>*>(p) = x;
  }
  // Rows are padded to whole vectors here, so accesses beyond `count` touch only padding.
  template <class Real>
  FEATKD_INLINE static LaneOf<Real> load_upto(const Real* p, int count) {
    const LaneOf<Real> zero = {};
    return iota(Real()) < splat(Real(count)) ? load(p) : zero;
  }
  template <class Real>
  FEATKD_INLINE static void store_upto(Real* p, LaneOf<Real> x, int) {
    store(p, x);
  }
  template <class Real>
  FEATKD_INLINE static LaneOf<Real> splat(Real x) {
    return x - LaneOf<Real>{};
  }
  template <class Real>
  FEATKD_INLINE static LaneOf<Real> iota(Real) {
    LaneOf<Real> x = {};
    for (int i = 0; i < BYTES / int(sizeof(Real)); i++) x[i] = Real(i);
    return x;
  }
  template <class V>
  FEATKD_INLINE static void accumulate(double* p, V x, int, bool add) {
    constexpr int L = BYTES / int(sizeof(double)), COUNT = sizeof(V) / sizeof(x[0]);
    FEATKD_UNROLLED
    for (int part = 0; part < COUNT; part += L) {
      LaneOf<double> each = {};
      for (int i = 0; i < L; i++) each[i] = x[part + i];
      store(p + part, add ? load(p + part) + each : each);
    }
  }
  template <class V, class Real>
  FEATKD_INLINE static Real first_lane(V x, Real) {
    return x[0];
  }
  FEATKD_INLINE static WideOf<float> widen(LaneOf<float> x) {
    return __builtin_convertvector(x, WideOf<float>);
  }
  FEATKD_INLINE static WideOf<double> widen(LaneOf<double> x) { return x; }
  FEATKD_INLINE static LaneOf<float> narrow(WideOf<float> x, float) {
    return __builtin_convertvector(x, LaneOf<float>);
  }
  FEATKD_INLINE static LaneOf<double> narrow(WideOf<double> x, double) { return x; }
  template <class V>
  FEATKD_INLINE static auto sum(V x) {
    constexpr int COUNT = sizeof(V) / sizeof(x[0]);
    typename std::remove_reference<decltype(x[0])>::type parts[COUNT];
    for (int i = 0; i < COUNT; i++) parts[i] = x[i];
    for (int half = COUNT / 2; half; half /= 2)
      for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
  }
  FEATKD_INLINE static uint64_t maximum(uint64_t x) { return x; }

  FEATKD_INLINE static LaneOf<float> as_real(CountOf<float> x, float) {
    return __builtin_convertvector(x, LaneOf<float>);
  }
  FEATKD_INLINE static LaneOf<double> as_real(CountOf<double> x, double) {
    return __builtin_convertvector(x, LaneOf<double>);
  }
  // 1 in lanes with the sign bit set.
  FEATKD_INLINE static CountOf<float> sign_bits(LaneOf<float> x) {
    return -(CountOf<float>(x) >> 31);
  }
  FEATKD_INLINE static CountOf<double> sign_bits(LaneOf<double> x) {
    return -(CountOf<double>(x) >> 63);
  }
  FEATKD_INLINE static CountOf<double> signs_differ(LaneOf<double> x, LaneOf<double> y) {
    return CountOf<double>((WordOf<double>(x) ^ WordOf<double>(y)) >> 63);
  }
  template <class V>
  FEATKD_INLINE static void normalize(V& x, V& y) {
    using W = WordOf<double>;
    const W one = W(x) & EXPONENT, other = W(y) & EXPONENT;
    const W maximum = CountOf<double>(one) > CountOf<double>(other) ? one : other;
    const V factor = V(EXPONENT_OF_ONE - maximum + EXPONENT_OF_ONE);
    x *= factor;
    y *= factor;
  }
};

// A single CPU thread; the team that the CPU kernels use.
template <int BYTES, int ROWS_, int UNROLL_>
struct TeamOfOne : VectorLanes<BYTES> {
  static constexpr int ROWS = ROWS_, GRAM_ROWS = 4, UNROLL = UNROLL_, PACK_DEPTH = 64;
  static constexpr bool STAGED = false;
  FEATKD_INLINE static int rank() { return 0; }
  FEATKD_INLINE static int size() { return 1; }
  template <int NUMBER>
  FEATKD_INLINE static void barrier(At<NUMBER>) {}
};

#if defined(__CUDACC__)
// A CUDA block; its groups are warps.
struct Block {
  static constexpr int ROWS = 4, GRAM_ROWS = 4, UNROLL = 1, PACK_DEPTH = 16, PAD = 1;
  static constexpr bool PACKED = true, STAGED = true;
  template <class Real>
  using GramSum = Real;
  template <class Real>
  using LaneOf = Real;
  template <class Real>
  using CountOf = int;
  template <class Real>
  using WideOf = double;

  FEATKD_INLINE static int lane() { return threadIdx.x & 31; }
  FEATKD_INLINE static int lanes() { return 32; }
  FEATKD_INLINE static int rank() { return threadIdx.x >> 5; }
  FEATKD_INLINE static int size() { return blockDim.x >> 5; }
  template <int NUMBER>
  FEATKD_INLINE static void barrier(At<NUMBER>) {
    asm volatile("// featkd barrier %0" ::"n"(NUMBER));  // a marker for the tests
    __syncthreads();
  }
  FEATKD_INLINE static bool is_leader() { return lane() == 0; }
  template <class Real>
  FEATKD_INLINE static Real load(const Real* p) {
    return p[lane()];
  }
  template <class Real>
  FEATKD_INLINE static void store(Real* p, Real x) {
    p[lane()] = x;
  }
  template <class Real>
  FEATKD_INLINE static Real load_upto(const Real* p, int count) {
    return lane() < count ? p[lane()] : Real(0);
  }
  template <class Real>
  FEATKD_INLINE static void store_upto(Real* p, Real x, int count) {
    if (lane() < count) p[lane()] = x;
  }
  template <class Real>
  FEATKD_INLINE static Real splat(Real x) {
    return x;
  }
  template <class Real>
  FEATKD_INLINE static Real iota(Real) {
    return Real(lane());
  }
  template <class Real>
  FEATKD_INLINE static void accumulate(Real* p, Real x, int count, bool add) {
    if (lane() < count) p[lane()] = add ? p[lane()] + x : x;
  }
  template <class Real>
  FEATKD_INLINE static Real first_lane(Real x, Real) {
    return x;
  }
  FEATKD_INLINE static double widen(double x) { return x; }
  template <class Real>
  FEATKD_INLINE static Real narrow(double x, Real) {
    return Real(x);
  }
  // Both lanes of a pair add the same two numbers, so the result is bitwise the same in all lanes.
  template <class Real>
  FEATKD_INLINE static Real sum(Real x) {
    FEATKD_UNROLLED
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  FEATKD_INLINE static uint64_t maximum(uint64_t x) {
    FEATKD_UNROLLED
    for (int step = 16; step; step /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffffu, (unsigned long long)x, step);
      x = other > x ? other : x;
    }
    return x;
  }
  FEATKD_INLINE static int sign_bits(float x) { return int(__float_as_uint(x) >> 31); }
  FEATKD_INLINE static int sign_bits(double x) { return int(unsigned(__double2hiint(x)) >> 31); }
  FEATKD_INLINE static int signs_differ(double x, double y) { return sign_bits(x) ^ sign_bits(y); }
  FEATKD_INLINE static void normalize(double& x, double& y) {
    constexpr int ALL = int(EXPONENT >> 32), ONE = int(EXPONENT_OF_ONE >> 32);
    const int one = __double2hiint(x) & ALL, other = __double2hiint(y) & ALL;
    const double factor = __hiloint2double(ONE - (one > other ? one : other) + ONE, 0);
    x *= factor;
    y *= factor;
  }
  template <class Real>
  FEATKD_INLINE static Real as_real(int x, Real) {
    return Real(x);
  }
};
template <class Real>
constexpr int width<Block, Real> = 32;
#endif

}  // namespace featkd::FEATKD_ISA
