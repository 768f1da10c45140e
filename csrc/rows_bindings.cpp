// The sweeps over rows for torch, by its stable ABI. Their schemas are declared in featkd/cpu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <optional>

#include "bindings.h"
#include "cpu.h"

namespace {

using featkd::type_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// (B, N, C) of any strides
featkd::Rows rows_of(const Maybe& x) {
  if (!x) return {};
  const auto sizes = x->sizes(), strides = x->strides();
  return {x->const_data_ptr(), type_of(*x), sizes[1], strides[0], strides[1], strides[2]};
}

// contiguous
featkd::Results results_of(const Maybe& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_contiguous(), "expected a contiguous result");
  return {x->mutable_data_ptr(), type_of(*x)};
}

// numbers of the accumulators' type, contiguous
void* numbers(const Maybe& x, bool wide, int64_t count) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                      x->is_contiguous() && x->numel() == count,
                  "expected ", count, " contiguous numbers of the accumulators' type");
  return x->mutable_data_ptr();
}

template <class Problem>
void run(const Problem& problem, void (*function)(const Problem&, int, featkd::Parallel)) {
  const int threads = int(torch::stable::get_num_threads());
  try {
    function(problem, threads, featkd::run_parallel);
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, "featkd: out of memory for the scratch space of ", threads, " threads");
  }
}

void distance(Tensor source, Maybe teacher, Maybe bias, Maybe gamma, Maybe beta, double eps,
              int64_t width, Maybe scale, Maybe added, Maybe slope, Maybe rstd, Maybe total,
              Maybe d_bias, Maybe d_gamma, Maybe d_beta) {
  STD_TORCH_CHECK(source.dim() == 3, "source: expected shape (B, N, C)");
  const int64_t batch = source.sizes()[0], tokens = source.sizes()[1], n = source.sizes()[2];
  for (const Maybe& x : {teacher, slope})
    STD_TORCH_CHECK(!x || (x->dim() == 3 && x->sizes()[0] == batch && x->sizes()[1] == tokens &&
                           x->sizes()[2] == n),
                    "teacher, slope: expected the source's shape");
  STD_TORCH_CHECK(width >= 0 && (width == 0 || tokens % width == 0), "width: expected a divisor");
  const bool wide = source.scalar_type() == ScalarType::Double;
  const featkd::DistanceProblem problem{batch * tokens,
                                        n,
                                        width,
                                        wide,
                                        eps,
                                        rows_of(source),
                                        rows_of(teacher),
                                        numbers(bias, wide, n),
                                        numbers(gamma, wide, n),
                                        numbers(beta, wide, n),
                                        numbers(scale, wide, 1),
                                        numbers(added, wide, batch * n),
                                        results_of(slope),
                                        numbers(rstd, wide, batch * tokens),
                                        static_cast<double*>(numbers(total, true, 1)),
                                        {numbers(d_bias, wide, n), numbers(d_gamma, wide, n),
                                         numbers(d_beta, wide, n)}};
  run(problem, featkd::distance_on_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(featkd, CPU, m) { m.impl("distance_rows", TORCH_BOX(&distance)); }
