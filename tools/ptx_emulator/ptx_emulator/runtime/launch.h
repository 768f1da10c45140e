// What a translated kernel is compiled with: the instructions, and where its launches go.
#pragma once
#include "convert.h"
#include "integers.h"
#include "thread.h"

struct Allocation;
struct Outcome;  // reports and counters, which Python asks the engine for

// read from Python through ctypes: keep in step with RawLaunch there
struct LaunchRequest {
  u32 grid[3], size[3], cluster[3], dynamic_shared, workers, allocation_count;
  u64 seed;
  double time_limit;
  u8** parameters;
  Allocation* allocations;
};

HIDDEN Outcome* start_launch(const LaunchRequest& request, void (*kernel)(Thread&, u8**), const KernelFacts& facts);
