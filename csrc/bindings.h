// torch's threads for deal.h, by the stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace featkd {

inline void run_parallel(int count, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { body(context); });
}

}  // namespace featkd
