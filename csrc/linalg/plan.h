// How a kernel is launched: sizes alone, so that a machine without a GPU can test it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace featkd {

struct DeviceLimits {
  size_t shared_a_block;  // bytes that a kernel may opt in to
  size_t shared_a_multiprocessor;
  int multiprocessors;
};

constexpr int THREADS = 256;  // a block: 8 warps
constexpr int WARPS = THREADS / 32;
constexpr int MOST_BLOCKS_EACH = 2048 / THREADS;  // a multiprocessor
constexpr size_t RESERVED = 1024;                 // shared memory that CUDA keeps of each block

struct LaunchPlan {
  int blocks;
  size_t shared;     // dynamic bytes a block
  size_t workspace;  // bytes of global memory, where the scratch does not fit the shared memory
};

// `scratch` are the bytes that a block needs. As many blocks as the shared memory holds at once go
// over the batch (where the registers hold fewer, the rest wait); those whose scratch is in global
// memory are two a multiprocessor.
inline LaunchPlan plan_launch(size_t scratch, int64_t batch, const DeviceLimits& device) {
  LaunchPlan plan{0, 0, 0};
  int64_t each = 2;
  if (scratch <= device.shared_a_block) {
    plan.shared = scratch;
    each = int64_t(device.shared_a_multiprocessor / (scratch + RESERVED));
    each = each < 1 ? 1 : each > MOST_BLOCKS_EACH ? MOST_BLOCKS_EACH : each;
  }
  const int64_t resident = each * device.multiprocessors;
  plan.blocks = int(batch < resident ? batch : resident);
  if (plan.shared == 0) plan.workspace = (scratch + 255) / 256 * 256 * size_t(plan.blocks);
  return plan;
}

}  // namespace featkd
