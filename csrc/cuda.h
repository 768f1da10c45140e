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

}  // namespace featkd
