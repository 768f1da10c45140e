// The sweeps over rows on a CPU, one set an instruction set.
#pragma once

#include "cpu.h"
#include "rows_problem.h"

namespace featkd {

// Sweeps over rows [first, last): scratch memory that one thread needs, and the work. `partial` has
// this block's share of the sums over rows, or is null.
struct RowKernels {
  size_t (*distance_bytes)(const DistanceProblem&);
  double (*distance)(const DistanceProblem&, int64_t first, int64_t last, void* scratch,
                     void* partial);
  size_t (*soft_bytes)(const SoftProblem&);
  double (*soft)(const SoftProblem&, int64_t first, int64_t last, void* scratch, void* partial);
  size_t (*norms_bytes)(const NormsProblem&);
  double (*norms)(const NormsProblem&, int64_t first, int64_t last, void* scratch, void* partial);
  size_t (*heads_bytes)(const HeadsProblem&);
  double (*heads)(const HeadsProblem&, int64_t first, int64_t last, void* scratch, void* partial);
};

const RowKernels& row_kernels();

// All rows, dealt to threads in blocks. Throw std::bad_alloc.
void distance_on_cpu(const DistanceProblem& problem, int threads, Parallel parallel);
void soft_on_cpu(const SoftProblem& problem, int threads, Parallel parallel);
void norms_on_cpu(const NormsProblem& problem, int threads, Parallel parallel);
void heads_on_cpu(const HeadsProblem& problem, int threads, Parallel parallel);

}  // namespace featkd
