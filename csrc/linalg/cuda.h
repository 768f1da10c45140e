// The CUDA half's launchers, without a CUDA or torch header.
#pragma once

#include "plan.h"
#include "problem.h"

namespace featkd {

// Plan of the solve in float64 or float32 on the current device; null, or what CUDA said.
const char* plan_on_cuda(const Problem& problem, bool wide, LaunchPlan* plan);

// Queues a solve on a stream; with `only_resolved`, of the matrices alone that an earlier one
// marked. `workspace` has the plan's bytes. Null, or what CUDA said.
const char* solve_on_cuda(const Problem& problem, bool wide, bool only_resolved,
                          const LaunchPlan& plan, void* workspace, void* stream);

// The same of one-sided Jacobi of a batch of (n, length) matrices, the length a multiple of 32:
// rows are turned in place, `turns` are filled, and `sweeps` has a number for each matrix.
const char* plan_jacobi_on_cuda(int64_t batch, int length, LaunchPlan* plan);
const char* jacobi_on_cuda(int64_t batch, int n, int length, double* rows, double* turns,
                           int32_t* sweeps, const LaunchPlan& plan, void* workspace, void* stream);

}  // namespace featkd
