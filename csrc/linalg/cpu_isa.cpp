// CPU kernels. This file is compiled once per instruction set, with the set's compiler flags and
// its name in FEATKD_ISA. It must define no weak symbols: the linker would keep a single copy.
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
__attribute__((noinline)) bool solve_in(const Problem& p, int64_t index, void* memory) {
  const Scratch<One, Real> scratch(memory, p.rows, 1);
  return write_results(p, index, solve(One(), p, index, scratch));
}

size_t bytes(const Problem& p) {
  const size_t in_float64 = Scratch<One, double>::bytes(p.rows, 1);
  const size_t in_float32 = Scratch<One, float>::bytes(p.rows, 1);
  return ((in_float64 > in_float32 ? in_float64 : in_float32) + 63) / 64 * 64;
}

void solve_one(const Problem& p, int64_t index, void* memory) {
  const bool in_float32 = !p.in_float64 && p.type != Type::f64;
  p.resolved[index] = in_float32 && solve_in<float>(p, index, memory);
  if (!in_float32 || p.resolved[index]) solve_in<double>(p, index, memory);
}

int jacobi_one(int n, double* rows, double* rotations, int length) {
  int32_t memory[16];  // JacobiScratch::bytes
  return jacobi(One(), Band<double>{rows, rotations, n, length}, {memory, 1});
}

}  // namespace
}  // namespace FEATKD_ISA

extern const CpuKernels FEATKD_JOIN(cpu_, FEATKD_ISA);
const CpuKernels FEATKD_JOIN(cpu_, FEATKD_ISA) = {FEATKD_QUOTE(FEATKD_ISA), FEATKD_ISA::bytes,
                                                  FEATKD_ISA::solve_one, FEATKD_ISA::jacobi_one};

}  // namespace featkd
