// The sweeps over rows for one instruction set: as cpu_isa.cpp, and no weak symbols here either.
#include "distance.h"
#include "heads.h"
#include "rows_cpu.h"
#include "soft_kd.h"
#include "two_norms.h"

#define FEATKD_JOIN_(a, b) a##b
#define FEATKD_JOIN(a, b) FEATKD_JOIN_(a, b)

namespace featkd {
namespace FEATKD_ISA {
namespace {

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

size_t heads_bytes(const HeadsProblem& p) {
  return p.wide ? HeadRows<double, double>::bytes(p) : HeadRows<float, float>::bytes(p);
}

double heads(const HeadsProblem& p, int64_t first, int64_t last, void* scratch, void* partial) {
  if (p.wide) return run_rows<HeadRows<double, double>>(p, first, last, scratch, partial);
  return p.scores.type == Type::bf16
             ? run_rows<HeadRows<float, BFloat16>>(p, first, last, scratch, partial)
             : run_rows<HeadRows<float, float>>(p, first, last, scratch, partial);
}

}  // namespace
}  // namespace FEATKD_ISA

extern const RowKernels FEATKD_JOIN(rows_, FEATKD_ISA);
const RowKernels FEATKD_JOIN(rows_, FEATKD_ISA) = {
    FEATKD_ISA::distance_bytes, FEATKD_ISA::distance,    FEATKD_ISA::soft_bytes,
    FEATKD_ISA::soft,           FEATKD_ISA::norms_bytes, FEATKD_ISA::norms,
    FEATKD_ISA::heads_bytes,    FEATKD_ISA::heads};

}  // namespace featkd
