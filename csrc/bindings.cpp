// The operators of featkd.linalg for torch, by its stable ABI: one library for every torch from
// 2.10 on. Their schemas are declared in featkd/ops/spectrum.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <tuple>

#include "cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

featkd::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return featkd::Type::f32;
    case ScalarType::Double: return featkd::Type::f64;
    case ScalarType::BFloat16: return featkd::Type::bf16;
    case ScalarType::Half: return featkd::Type::f16;
    default: STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

void run_parallel(int count, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { body(context); });
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Call {
  featkd::Problem problem;
  Results results;
};

// x (B, N, D) of any strides, thresholds (T) float64 on the CPU
Call prepare(const Tensor& x, const Tensor& thresholds, bool wide) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected shape (B, N, D), got ", x.dim(), " dimensions");
  const auto sizes = x.sizes(), strides = x.strides();
  const int turned = sizes[1] > sizes[2];
  const int64_t batch = sizes[0], rows = sizes[1 + turned], columns = sizes[2 - turned];
  STD_TORCH_CHECK(rows >= 1 && rows <= featkd::MOST_ROWS, "x: expected the smaller side from 1 to ",
                  featkd::MOST_ROWS, ", got ", rows);
  const featkd::Type type = type_of(x);
  const ScalarType out = type == featkd::Type::f64 ? ScalarType::Double : ScalarType::Float;
  const int64_t count = thresholds.numel();
  const auto make = [&](std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape), dtype);
  };
  Call call{{},
            {make({batch, rows}, out), make({batch, rows}, out),
             make({batch, count}, ScalarType::Long), make({batch}, ScalarType::Int),
             make({batch}, ScalarType::Double), make({batch}, ScalarType::Int)}};
  auto& [values, curve, ranks, info, residual, resolved] = call.results;
  call.problem = {x.const_data_ptr(),
                  type,
                  batch,
                  columns,
                  strides[0],
                  strides[1 + turned],
                  strides[2 - turned],
                  int32_t(rows),
                  wide,
                  wide && type != featkd::Type::f64 ? 0x1p-27 : 0,
                  values.mutable_data_ptr(),
                  curve.mutable_data_ptr(),
                  static_cast<const double*>(thresholds.const_data_ptr()),
                  int32_t(count),
                  static_cast<int64_t*>(ranks.mutable_data_ptr()),
                  static_cast<int32_t*>(info.mutable_data_ptr()),
                  static_cast<double*>(residual.mutable_data_ptr()),
                  static_cast<int32_t*>(resolved.mutable_data_ptr())};
  return call;
}

Results spectrum_cpu(Tensor x, Tensor thresholds, bool wide) {
  Call call = prepare(x, thresholds, wide);
  try {
    featkd::solve_on_cpu(call.problem, int(torch::stable::get_num_threads()), run_parallel);
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, "featkd.linalg: out of memory for the scratch space of ",
                    torch::stable::get_num_threads(), " threads");
  }
  return call.results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(featkd, CPU, m) { m.impl("spectrum", TORCH_BOX(&spectrum_cpu)); }
