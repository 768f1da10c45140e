// Host functions that launch the CUDA kernels. They need neither CUDA nor torch headers.
#pragma once

#include "plan.h"
#include "problem.h"

namespace featkd {

// Plans a launch in float64 or float32 on the current device. Returns null or CUDA's error message.
const char* plan_on_cuda(const Problem& problem, bool in_float64, LaunchPlan* plan);

// Queues a solve on a stream. `only_resolved` restricts it to the matrices that an earlier solve
// marked in `resolved`. `workspace` has the plan's size. Returns null or CUDA's error message.
const char* solve_on_cuda(const Problem& problem, bool in_float64, bool only_resolved,
                          const LaunchPlan& plan, void* workspace, void* stream);

// The same for one-sided Jacobi on a batch of (n, length) matrices; the length is a multiple of 32.
// Updates rows in place, writes `rotations`, and writes one number of sweeps per matrix.
const char* plan_jacobi_on_cuda(int64_t batch, int length, LaunchPlan* plan);
const char* jacobi_on_cuda(int64_t batch, int n, int length, double* rows, double* rotations,
                           int32_t* sweeps, const LaunchPlan& plan, void* workspace, void* stream);

}  // namespace featkd
