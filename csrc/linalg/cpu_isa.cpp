// The CPU kernels for one instruction set: compiled once for each, with its flags and a name of
// its own in FEATKD_ISA. Nothing here may be a weak symbol, for the linker would keep one copy.
#include "cpu.h"
#include "jacobi.h"
#include "spectrum.h"

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
  int32_t memory[16];  // JacobiScratch::bytes
  return jacobi(One(), Band<double>{rows, turns, n, length}, {memory, 1});
}

}  // namespace
}  // namespace FEATKD_ISA

extern const CpuKernels FEATKD_JOIN(cpu_, FEATKD_ISA);
const CpuKernels FEATKD_JOIN(cpu_, FEATKD_ISA) = {FEATKD_QUOTE(FEATKD_ISA), FEATKD_ISA::bytes,
                                                  FEATKD_ISA::solve_one, FEATKD_ISA::jacobi_one};

}  // namespace featkd
