// The sweeps over rows for torch, by its stable ABI. Their schemas are declared in featkd/cpu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <optional>

#include "bindings.h"
#include "rows_cpu.h"

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

// (B, K) of any strides: one token an image
featkd::Rows matrix_of(const Maybe& x) {
  if (!x) return {};
  const auto strides = x->strides();
  return {x->const_data_ptr(), type_of(*x), 1, strides[0], 0, strides[1]};
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

// Waking a thread takes as long as a row of this many numbers.
constexpr int64_t A_THREADS_NUMBERS = 1 << 14;

template <class Problem>
void run(const Problem& problem, int64_t numbers,
         void (*function)(const Problem&, int, featkd::Parallel)) {
  const int64_t most = 1 + numbers / A_THREADS_NUMBERS, there = torch::stable::get_num_threads();
  const int threads = int(most < there ? most : there);
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
  run(problem, batch * tokens * n, featkd::distance_on_cpu);
}

// (4, rows), part of a longer one or not
void* statistics_of(const Tensor& x, bool wide, int64_t rows) {
  STD_TORCH_CHECK(x.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                      x.dim() == 2 && x.sizes()[0] == 4 && x.sizes()[1] == rows &&
                      (rows < 2 || x.strides()[1] == 1),
                  "statistics: expected (4, rows) numbers of the accumulators' type");
  return x.mutable_data_ptr();
}

void norms_forward(Tensor h, Tensor parameters, double eps, Tensor residual, Tensor normed,
                   Tensor statistics) {
  STD_TORCH_CHECK(h.dim() == 2, "h: expected shape (rows, C)");
  const int64_t rows = h.sizes()[0], n = h.sizes()[1];
  const bool wide = parameters.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(residual.numel() == rows * n && normed.numel() == rows * n,
                  "residual, normed: expected as many elements as h");
  const featkd::NormsProblem problem{rows,
                                     n,
                                     wide,
                                     eps,
                                     matrix_of(h),
                                     numbers(parameters, wide, 4 * n),
                                     results_of(residual),
                                     results_of(normed),
                                     statistics_of(statistics, wide, rows),
                               statistics.strides()[0],
                                     {},
                                     {},
                                     {},
                                     {}};
  run(problem, rows * n, featkd::norms_on_cpu);
}

void norms_backward(Tensor h, Tensor parameters, Tensor statistics, Maybe d_residual,
                    Maybe d_normed, Tensor slope, Maybe sums) {
  STD_TORCH_CHECK(h.dim() == 2, "h: expected shape (rows, C)");
  const int64_t rows = h.sizes()[0], n = h.sizes()[1];
  const bool wide = parameters.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(slope.numel() == rows * n, "slope: expected as many elements as h");
  for (const Maybe& x : {d_residual, d_normed})
    STD_TORCH_CHECK(!x || (x->dim() == 3 && x->sizes()[0] * x->sizes()[1] == rows &&
                           x->sizes()[2] == n),
                    "d_residual, d_normed: expected shape (B, N, C)");
  featkd::NormsProblem problem{rows,
                               n,
                               wide,
                               0,
                               matrix_of(h),
                               numbers(parameters, wide, 4 * n),
                               {},
                               {},
                               statistics_of(statistics, wide, rows),
                               statistics.strides()[0],
                               rows_of(d_residual),
                               rows_of(d_normed),
                               results_of(slope),
                               {}};
  char* first = static_cast<char*>(numbers(sums, wide, 4 * n));
  for (int k = 0; first && k < 4; k++) problem.sums[k] = first + k * n * (wide ? 8 : 4);
  run(problem, rows * n, featkd::norms_on_cpu);
}

void soft_kd(Tensor student, Maybe teacher, Maybe target, double alpha, double tau, Tensor losses,
             Maybe slope) {
  STD_TORCH_CHECK(student.dim() == 2, "student: expected shape (B, K)");
  const int64_t batch = student.sizes()[0], classes = student.sizes()[1];
  const bool wide = student.scalar_type() == ScalarType::Double;
  const bool indices = target && target->dim() == 1;
  for (const Maybe& x : {teacher, indices ? Maybe() : target, slope})
    STD_TORCH_CHECK(!x || (x->dim() == 2 && x->sizes()[0] == batch && x->sizes()[1] == classes),
                    "teacher, target, slope: expected the student's shape");
  featkd::SoftProblem problem{batch,
                              classes,
                              wide,
                              alpha,
                              tau,
                              matrix_of(student),
                              matrix_of(teacher),
                              indices ? featkd::Rows{} : matrix_of(target),
                              nullptr,
                              0,
                              numbers(losses, wide, batch),
                              results_of(slope)};
  if (indices) {
    STD_TORCH_CHECK(target->scalar_type() == ScalarType::Long && target->sizes()[0] == batch,
                    "target: expected (B,) int64");
    problem.labels = static_cast<const int64_t*>(target->const_data_ptr());
    problem.label_stride = target->strides()[0];
    for (int64_t row = 0; row < batch; row++) {
      const int64_t label = problem.labels[row * problem.label_stride];
      STD_TORCH_CHECK(label >= 0 && label < classes, "target: index ", label,
                      " is out of bounds for dimension 1 with size ", classes);
    }
  }
  run(problem, 2 * batch * classes, featkd::soft_on_cpu);
}

void mix_heads(Tensor scores, Tensor pre, Tensor post, Tensor bias) {
  STD_TORCH_CHECK(scores.dim() == 4, "scores: expected shape (B, heads, queries, keys)");
  const auto sizes = scores.sizes();
  const int64_t heads = sizes[1];
  const bool wide = scores.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || scores.scalar_type() == ScalarType::Float ||
                      scores.scalar_type() == ScalarType::BFloat16,
                  "scores: expected float64, float32 or bfloat16");
  const featkd::HeadsProblem problem{sizes[0] * sizes[2],
                                     sizes[2],
                                     sizes[3],
                                     heads,
                                     wide,
                                     results_of(scores),
                                     numbers(pre, wide, heads * heads),
                                     numbers(post, wide, heads * heads),
                                     numbers(bias, wide, heads)};
  run(problem, 2 * heads * scores.numel(), featkd::heads_on_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(featkd, CPU, m) {
  m.impl("distance_rows", TORCH_BOX(&distance));
  m.impl("soft_kd_rows", TORCH_BOX(&soft_kd));
  m.impl("mix_heads", TORCH_BOX(&mix_heads));
  m.impl("two_norms_rows", TORCH_BOX(&norms_forward));
  m.impl("two_norms_rows_backward", TORCH_BOX(&norms_backward));
}
