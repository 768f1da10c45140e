// Launch configuration of the CUDA kernels. It is plain host code, so that it is tested without a
// GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace featkd {

struct DeviceLimits {
  size_t shared_per_block;  // bytes, after the opt-in
  size_t shared_per_multiprocessor;
  int multiprocessors;
};

constexpr int THREADS = 256;  // per block
constexpr int WARPS = THREADS / 32;
constexpr int MAX_BLOCKS_PER_MULTIPROCESSOR = 2048 / THREADS;
constexpr size_t RESERVED = 1024;  // bytes of shared memory that CUDA reserves per block

struct LaunchPlan {
  int blocks;
  size_t shared;     // bytes of dynamic shared memory per block
  size_t workspace;  // bytes of global memory, if the scratch memory does not fit shared memory
};

// Plans a launch of blocks that loop over the batch; each needs `scratch` bytes. Launches as many
// blocks as shared memory holds at the same time, and two per multiprocessor if the scratch memory
// is in global memory. Blocks that the registers cannot hold wait.
inline LaunchPlan plan_launch(size_t scratch, int64_t batch, const DeviceLimits& device) {
  LaunchPlan plan{0, 0, 0};
  int64_t per_multiprocessor = 2;
  if (scratch <= device.shared_per_block) {
    plan.shared = scratch;
    const int64_t fitting = int64_t(device.shared_per_multiprocessor / (scratch + RESERVED));
    per_multiprocessor = std::clamp<int64_t>(fitting, 1, MAX_BLOCKS_PER_MULTIPROCESSOR);
  }
  const int64_t resident = per_multiprocessor * device.multiprocessors;
  plan.blocks = int(batch < resident ? batch : resident);
  if (plan.shared == 0) plan.workspace = (scratch + 255) / 256 * 256 * size_t(plan.blocks);
  return plan;
}

}  // namespace featkd
