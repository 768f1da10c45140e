// Registers featkd::mix_heads through torch's stable ABI. Its schema is declared in
// featkd/ops/talking_heads_attention.py.
#include "../bindings.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>

#include "../isa.h"
#include "../parallel.h"
#include "heads.h"

namespace featkd {

FEATKD_DECLARE_FOR_EACH_ISA(MixHeads, mix_heads)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MAX_QUERY_BLOCKS = 32;  // blocks of queries that are distributed over the threads
// Starting a thread takes about as long as processing this many elements.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 14;

const float* float_data(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count,
                  "expected ", count, " contiguous float32 numbers");
  return static_cast<const float*>(x.const_data_ptr());
}

void mix_heads(Tensor scores, Tensor pre, Tensor post, Tensor bias) {
  const ScalarType type = scores.scalar_type();
  STD_TORCH_CHECK(scores.dim() == 4 && scores.is_contiguous() &&
                      (type == ScalarType::Float || type == ScalarType::BFloat16),
                  "scores: expected contiguous float32 or bfloat16 of shape (B, heads, queries, "
                  "keys)");
  const auto sizes = scores.sizes();
  const int64_t heads = sizes[1], rows = sizes[0] * sizes[2];
  const HeadsProblem problem{heads,
                             sizes[2],
                             sizes[3],
                             scores.mutable_data_ptr(),
                             type == ScalarType::BFloat16,
                             float_data(pre, heads * heads),
                             float_data(post, heads * heads),
                             float_data(bias, heads)};
  const int64_t max_threads = 1 + 2 * heads * scores.numel() / ELEMENTS_PER_THREAD;
  const int64_t available = torch::stable::get_num_threads();
  const int threads = int(max_threads < available ? max_threads : available);
  const int64_t blocks = rows < MAX_QUERY_BLOCKS ? rows : MAX_QUERY_BLOCKS;
  MixHeads* const mix = FEATKD_FOR_THIS_CPU(mix_heads);
  try {
    parallel_for_each(blocks, threads, run_in_torch_threads,
                      problem.scratch_elements() * sizeof(float),
                      [&](int64_t index, void* scratch) {
                        mix(problem, rows * index / blocks, rows * (index + 1) / blocks,
                            static_cast<float*>(scratch));
                      });
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, "featkd: out of memory for the scratch space of ", threads, " threads");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(featkd, CPU, m) { m.impl("mix_heads", TORCH_BOX(&mix_heads)); }

}  // namespace featkd
