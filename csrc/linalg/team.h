// Who works on one matrix, written once for a CUDA block, one CPU thread and several CPU threads.
//
// A team has size() groups that run in parallel, and a group has lanes that run in step: the 32
// threads of a CUDA warp, or the lanes of one CPU thread's vector registers. A Lane<Real> is a
// value that each lane has its own of: a scalar in CUDA code, a vector on a CPU. The concept:
//
//   width<Team, Real>                     lanes of a group
//   rank(), size()                        this group among the team's
//   barrier(At<number>())                 all groups meet; every number names one place
//   is_leader()                           true in one lane of a group
//   lane(), lanes()                       for plain loops: the compiler makes vectors of a CPU's
//   load(p), store(p, x)                  lane l touches p[l]
//   load_upto(p, count), store_upto(...)  lanes below count alone; the others load 0
//   accumulate(p, x, count, add)          p[l] (+)= x, in p's type
//   splat(x), iota(Real())                the same in every lane; 0, 1, 2, ...
//   first(x)                              the first lane's value; each lane's own in CUDA code
//   widen(x), narrow(x, Real())           to float64 lanes and back
//   sum(x), most(x)                       over a group's lanes, the same in every lane
//   signs(x), as_real(count, Real())      1 where the sign bit is set, to be counted
//   unlike(x, y)                          1 where the sign bits of float64 lanes differ
//   scale(x, y)                           both by the power of two that brings the larger to [1, 2)
//   ROWS, GRAM_ROWS, UNROLL, SLAB_DEPTH   how much fits the registers and the nearest memory
//   PACKED, PAD                           how matrices lie in the scratch memory
//   STAGED                                whether rows far off are copied there to be worked on
//   GramSum                               the type in which a slab's sums are added up
//
// Groups talk through memory only, and only across a barrier. No lane returns before one.
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

// The part of a team whose groups are CPU threads.
template <int BYTES>
struct VectorLanes {
  static constexpr int LANE_BYTES = BYTES;
  static constexpr bool PACKED = false;
  static constexpr int PAD = 0;
  template <class Real>
  using GramSum = double;

  // may_alias and aligned: the scratch memory holds plain arrays, aligned to whole vectors
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
  // rows end in whole vectors here: what lies behind them is there, and nobody else's
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
  FEATKD_INLINE static Real first(V x, Real) {
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
  FEATKD_INLINE static uint64_t most(uint64_t x) { return x; }

  FEATKD_INLINE static LaneOf<float> as_real(CountOf<float> x, float) {
    return __builtin_convertvector(x, LaneOf<float>);
  }
  FEATKD_INLINE static LaneOf<double> as_real(CountOf<double> x, double) {
    return __builtin_convertvector(x, LaneOf<double>);
  }
  // 1 in lanes with the sign bit set
  FEATKD_INLINE static CountOf<float> signs(LaneOf<float> x) { return -(CountOf<float>(x) >> 31); }
  FEATKD_INLINE static CountOf<double> signs(LaneOf<double> x) {
    return -(CountOf<double>(x) >> 63);
  }
  FEATKD_INLINE static CountOf<double> unlike(LaneOf<double> x, LaneOf<double> y) {
    return CountOf<double>((WordOf<double>(x) ^ WordOf<double>(y)) >> 63);
  }
  template <class V>
  FEATKD_INLINE static void scale(V& x, V& y) {
    using W = WordOf<double>;
    const W one = W(x) & EXPONENT, other = W(y) & EXPONENT;
    const W most = CountOf<double>(one) > CountOf<double>(other) ? one : other;
    const V factor = V(EXPONENT_OF_ONE - most + EXPONENT_OF_ONE);
    x *= factor;
    y *= factor;
  }
};

// One CPU thread with its vector registers: what production runs.
template <int BYTES, int ROWS_, int UNROLL_>
struct TeamOfOne : VectorLanes<BYTES> {
  static constexpr int ROWS = ROWS_, GRAM_ROWS = 4, UNROLL = UNROLL_, SLAB_DEPTH = 64;
  static constexpr bool STAGED = false;
  FEATKD_INLINE static int rank() { return 0; }
  FEATKD_INLINE static int size() { return 1; }
  template <int NUMBER>
  FEATKD_INLINE static void barrier(At<NUMBER>) {}
};

#if defined(__CUDACC__)
// A block of whole warps.
struct Block {
  static constexpr int ROWS = 4, GRAM_ROWS = 4, UNROLL = 1, SLAB_DEPTH = 16, PAD = 1;
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
    asm volatile("// featkd barrier %0" ::"n"(NUMBER));  // tests find it in the PTX, and drop it
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
  FEATKD_INLINE static Real first(Real x, Real) {
    return x;
  }
  FEATKD_INLINE static double widen(double x) { return x; }
  template <class Real>
  FEATKD_INLINE static Real narrow(double x, Real) {
    return Real(x);
  }
  // both lanes of a pair add the same two numbers: every lane ends with the same bits
  template <class Real>
  FEATKD_INLINE static Real sum(Real x) {
    FEATKD_UNROLLED
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
  FEATKD_INLINE static uint64_t most(uint64_t x) {
    FEATKD_UNROLLED
    for (int step = 16; step; step /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffffu, (unsigned long long)x, step);
      x = other > x ? other : x;
    }
    return x;
  }
  FEATKD_INLINE static int signs(float x) { return int(__float_as_uint(x) >> 31); }
  FEATKD_INLINE static int signs(double x) { return int(unsigned(__double2hiint(x)) >> 31); }
  FEATKD_INLINE static int unlike(double x, double y) { return signs(x) ^ signs(y); }
  FEATKD_INLINE static void scale(double& x, double& y) {
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
