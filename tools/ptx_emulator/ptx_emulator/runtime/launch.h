// The header of a translated kernel: the instructions, and the entry point of its launches.
#pragma once
#include "convert.h"
#include "integers.h"
#include "thread.h"

struct Allocation;
struct Outcome;

// Written by Python as _RawLaunch of emulator.py.
struct LaunchRequest {
  u32 grid[3], size[3], cluster[3], dynamic_shared, workers, allocation_count;
  u64 seed;
  double time_limit;
  u8** parameters;
  Allocation* allocations;
};

HIDDEN Outcome* start_launch(const LaunchRequest& request, void (*kernel)(Thread&, u8**),
                             const KernelInfo& facts);
