// What both files of bindings need of torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "problem.h"

namespace featkd {

inline Type type_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

inline void run_parallel(int count, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { body(context); });
}

}  // namespace featkd
