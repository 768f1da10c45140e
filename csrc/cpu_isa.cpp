// The CPU kernels for one instruction set: compiled once for each, with its flags and a name of
// its own in FEATKD_ISA. Nothing here may be a weak symbol, for the linker would keep one copy.
#include "cpu.h"
#include "distance.h"
#include "jacobi.h"
#include "soft_kd.h"
#include "spectrum.h"
#include "two_norms.h"

#define FEATKD_JOIN_(a, b) a##b
#define FEATKD_JOIN(a, b) FEATKD_JOIN_(a, b)
#define FEATKD_QUOTE_(a) #a
#define FEATKD_QUOTE(a) FEATKD_QUOTE_(a)

namespace featkd {
namespace FEATKD_ISA {
namespace {

using One = TeamOfOne<FEATKD_VECTOR_BYTES, FEATKD_ROWS, FEATKD_UNROLL>;

template <class Real>
__attribute__((noinline)) bool solve_as(const Problem& p, int64_t index, void* memory) {
  const Scratch<One, Real> scratch(memory, p.rows, 1);
  return write_results(p, index, solve(One(), p, index, scratch));
}

size_t bytes(const Problem& p) {
  const size_t wide = Scratch<One, double>::bytes(p.rows, 1);
  const size_t narrow = Scratch<One, float>::bytes(p.rows, 1);
  return ((wide > narrow ? wide : narrow) + 63) / 64 * 64;
}

void solve_one(const Problem& p, int64_t index, void* memory) {
  const bool narrow = !p.wide && p.type != Type::f64;
  p.resolved[index] = narrow && solve_as<float>(p, index, memory);
  if (!narrow || p.resolved[index]) solve_as<double>(p, index, memory);
}

int jacobi_one(int n, double* rows, double* turns, int length) {
  return jacobi(One(), n, rows, turns, length);
}

template <class Rows, class Problem>
__attribute__((noinline)) double run_rows(const Problem& p, int64_t first, int64_t last,
                                          void* scratch, void* partial) {
  const Rows rows(p, scratch, partial);
  double total = 0;
  for (int64_t row = first; row < last; row += rows.group) total += rows.run(row);
  return total;
}

size_t distance_bytes(const DistanceProblem& p) {
  return p.wide ? DistanceRows<double, true>::bytes(p) : DistanceRows<float, true>::bytes(p);
}

double distance(const DistanceProblem& p, int64_t first, int64_t last, void* scratch,
                void* partial) {
  if (p.wide)
    return p.gamma ? run_rows<DistanceRows<double, true>>(p, first, last, scratch, partial)
                   : run_rows<DistanceRows<double, false>>(p, first, last, scratch, partial);
  return p.gamma ? run_rows<DistanceRows<float, true>>(p, first, last, scratch, partial)
                 : run_rows<DistanceRows<float, false>>(p, first, last, scratch, partial);
}

size_t soft_bytes(const SoftProblem& p) {
  return p.wide ? SoftRows<double>::bytes(p) : SoftRows<float>::bytes(p);
}

double soft(const SoftProblem& p, int64_t first, int64_t last, void* scratch, void* partial) {
  return p.wide ? run_rows<SoftRows<double>>(p, first, last, scratch, partial)
                : run_rows<SoftRows<float>>(p, first, last, scratch, partial);
}

size_t norms_bytes(const NormsProblem& p) {
  return p.wide ? NormRows<double>::bytes(p) : NormRows<float>::bytes(p);
}

double norms(const NormsProblem& p, int64_t first, int64_t last, void* scratch, void* partial) {
  return p.wide ? run_rows<NormRows<double>>(p, first, last, scratch, partial)
                : run_rows<NormRows<float>>(p, first, last, scratch, partial);
}

}  // namespace
}  // namespace FEATKD_ISA

extern const CpuKernels FEATKD_JOIN(cpu_, FEATKD_ISA);
const CpuKernels FEATKD_JOIN(cpu_, FEATKD_ISA) = {
    FEATKD_QUOTE(FEATKD_ISA), FEATKD_ISA::bytes,          FEATKD_ISA::solve_one,
    FEATKD_ISA::jacobi_one,   FEATKD_ISA::distance_bytes, FEATKD_ISA::distance,
    FEATKD_ISA::soft_bytes,   FEATKD_ISA::soft,           FEATKD_ISA::norms_bytes,
    FEATKD_ISA::norms};

}  // namespace featkd
