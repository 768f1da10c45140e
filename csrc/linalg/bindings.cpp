// Registers the operators of featkd.linalg through torch's stable ABI, so that one library works
// with every torch from 2.10 on. Schemas: featkd/ops/spectrum.py and featkd/ops/jacobi.py.
#include "../bindings.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <tuple>

#include "cpu.h"
#if defined(FEATKD_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "cuda.h"
#endif

// Returns the address of a function in a library that is already loaded, or null. RTLD_DEFAULT does
// not find it, because torch loads its libraries with RTLD_LOCAL. Exported for the tests.
extern "C" __attribute__((visibility("default"))) void* featkd_loaded_symbol(const char* library,
                                                                             const char* name) {
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, name) : nullptr;
}

namespace {

using featkd::run_in_torch_threads;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

featkd::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return featkd::Type::f32;
    case ScalarType::Double:
      return featkd::Type::f64;
    case ScalarType::BFloat16:
      return featkd::Type::bf16;
    case ScalarType::Half:
      return featkd::Type::f16;
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

struct Call {
  featkd::Problem problem;
  Results results;
};

// Checks the arguments and allocates the results. x: (B, N, D), any strides; thresholds: (T,)
// float64 on the same device.
Call prepare(const Tensor& x, const Tensor& thresholds, bool in_float64) {
  STD_TORCH_CHECK(x.dim() == 3, "x: expected shape (B, N, D), got ", x.dim(), " dimensions");
  const auto sizes = x.sizes(), strides = x.strides();
  const int transposed = sizes[1] > sizes[2];
  const int64_t batch = sizes[0], rows = sizes[1 + transposed], columns = sizes[2 - transposed];
  STD_TORCH_CHECK(rows >= 1 && rows <= featkd::MAX_ROWS, "x: expected the smaller side from 1 to ",
                  featkd::MAX_ROWS, ", got ", rows);
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
  call.problem = {x.const_data_ptr(), type, batch, columns, strides[0], strides[1 + transposed],
                  strides[2 - transposed], int32_t(rows), in_float64,
                  // for values without ranks, an error below 1e-8 of the largest value suffices
                  in_float64 && type != featkd::Type::f64 && count == 0 ? 0x1p-25 : 0,
                  values.mutable_data_ptr(), curve.mutable_data_ptr(),
                  static_cast<const double*>(thresholds.const_data_ptr()), int32_t(count),
                  static_cast<int64_t*>(ranks.mutable_data_ptr()),
                  static_cast<int32_t*>(info.mutable_data_ptr()),
                  static_cast<double*>(residual.mutable_data_ptr()),
                  static_cast<int32_t*>(resolved.mutable_data_ptr())};
  return call;
}

Results spectrum_cpu(Tensor x, Tensor thresholds, bool in_float64) {
  Call call = prepare(x, thresholds, in_float64);
  try {
    featkd::solve_on_cpu(call.problem, int(torch::stable::get_num_threads()), run_in_torch_threads);
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, "featkd.linalg: out of memory for the scratch space of ",
                    torch::stable::get_num_threads(), " threads");
  }
  return call.results;
}

using JacobiResults = std::tuple<Tensor, Tensor, Tensor>;  // rows, rotations, sweeps

// rows: (B, n, length) float64; the length is a multiple of `vector`, the widest vector's size.
JacobiResults prepare_jacobi(const Tensor& given, int64_t vector) {
  STD_TORCH_CHECK(given.dim() == 3 && given.scalar_type() == ScalarType::Double &&
                      given.sizes()[2] % vector == 0 && 1 <= given.sizes()[1] &&
                      given.sizes()[1] <= given.sizes()[2] && given.sizes()[1] <= featkd::MAX_ROWS,
                  "rows: expected float64 of shape (B, n, length), n from 1 to ", featkd::MAX_ROWS,
                  ", length a multiple of ", vector);
  const int64_t batch = given.sizes()[0];
  return {torch::stable::clone(torch::stable::contiguous(given)),
          torch::stable::new_empty(given, given.sizes()),
          torch::stable::new_empty(given, torch::headeronly::IntHeaderOnlyArrayRef(&batch, 1),
                                   ScalarType::Int)};
}

JacobiResults jacobi_cpu(Tensor given) {
  const JacobiResults result = prepare_jacobi(given, 8);
  const auto& [rows, rotations, sweeps] = result;
  featkd::jacobi_on_cpu(rows.sizes()[0], int(rows.sizes()[1]), int(rows.sizes()[2]),
                        static_cast<double*>(rows.mutable_data_ptr()),
                        static_cast<double*>(rotations.mutable_data_ptr()),
                        static_cast<int32_t*>(sweeps.mutable_data_ptr()),
                        int(torch::stable::get_num_threads()), run_in_torch_threads);
  return result;
}

#if defined(FEATKD_WITH_CUDA)
// Returns the current CUDA stream. The function is looked up at run time instead of linked, because
// a torch without CUDA loads this library too.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto ask = reinterpret_cast<Function>(
      featkd_loaded_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(ask != nullptr,
                  "featkd.linalg: libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(ask(device, &stream) == 0,
                  "featkd.linalg: torch has no current stream for CUDA device ", device);
  return stream;
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "featkd.linalg: ", error); }

Tensor workspace_of(const Tensor& x, const featkd::LaunchPlan& plan) {
  const int64_t bytes = int64_t(plan.workspace);
  return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(&bytes, 1),
                                  ScalarType::Byte);
}

void launch(const Tensor& x, const featkd::Problem& problem, bool in_float64, bool only_resolved) {
  featkd::LaunchPlan plan;
  check(featkd::plan_on_cuda(problem, in_float64, &plan));
  const Tensor workspace = workspace_of(x, plan);
  check(featkd::solve_on_cuda(problem, in_float64, only_resolved, plan,
                              workspace.mutable_data_ptr(), current_stream(x.get_device_index())));
}

// The second launch reads on the GPU which matrices need float64, so the host never waits for it.
Results spectrum_cuda(Tensor x, Tensor thresholds, bool in_float64) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call call = prepare(x, thresholds, in_float64);
  const bool in_float32 = !in_float64 && call.problem.type != featkd::Type::f64;
  launch(x, call.problem, !in_float32, false);
  if (in_float32) launch(x, call.problem, true, true);
  return call.results;
}

JacobiResults jacobi_cuda(Tensor given) {
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  const JacobiResults result = prepare_jacobi(given, 32);
  const auto& [rows, rotations, sweeps] = result;
  const int64_t batch = rows.sizes()[0];
  const int n = int(rows.sizes()[1]), length = int(rows.sizes()[2]);
  featkd::LaunchPlan plan;
  check(featkd::plan_jacobi_on_cuda(batch, length, &plan));
  const Tensor workspace = workspace_of(rows, plan);
  check(featkd::jacobi_on_cuda(batch, n, length, static_cast<double*>(rows.mutable_data_ptr()),
                               static_cast<double*>(rotations.mutable_data_ptr()),
                               static_cast<int32_t*>(sweeps.mutable_data_ptr()), plan,
                               workspace.mutable_data_ptr(),
                               current_stream(given.get_device_index())));
  return result;
}
#endif

}  // namespace

#if defined(FEATKD_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(featkd, CUDA, m) {
  m.impl("spectrum", TORCH_BOX(&spectrum_cuda));
  m.impl("jacobi", TORCH_BOX(&jacobi_cuda));
}
#endif
STABLE_TORCH_LIBRARY_IMPL(featkd, CPU, m) {
  m.impl("spectrum", TORCH_BOX(&spectrum_cpu));
  m.impl("jacobi", TORCH_BOX(&jacobi_cpu));
}
