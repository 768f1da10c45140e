// What a translated kernel is compiled with: the instructions, and where its launches go.
#pragma once
#include "convert.h"
#include "counters.h"
#include "integers.h"
#include "mbarrier.h"
#include "warp.h"

struct Outcome {
  std::vector<Report> reports;
  std::vector<u64> totals, executed;
  double seconds = 0;
};

// read from Python through ctypes: keep in step with RawLaunch there
struct LaunchRequest {
  u32 grid[3], size[3], cluster[3], dynamic_shared, workers, allocation_count;
  u64 seed;
  double time_limit;
  u8** parameters;
  Allocation* allocations;
};

// In engine.cpp, which is compiled once for all kernels.
HIDDEN Outcome* start_launch(const LaunchRequest& request, void (*kernel)(Thread&, u8**), u32 static_shared,
                             u32 stack_bytes, u32 local_bytes, u32 sites, u32 classes);
