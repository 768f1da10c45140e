// Runs parallel.h on torch's thread pool, through the stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace featkd {

inline void run_in_torch_threads(int count, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { body(context); });
}

}  // namespace featkd
