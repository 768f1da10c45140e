// The sweep over talking heads' scores for torch, by its stable ABI. The schema is declared in
// featkd/ops/talking_heads_attention.py.
#include "../bindings.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>

#include "../deal.h"
#include "../isa.h"
#include "heads.h"

namespace featkd {

FEATKD_FOR_EACH_ISA(MixHeads, mix_heads)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MOST_BLOCKS = 32;  // of queries, dealt to threads
// Waking a thread takes as long as a sweep over this many numbers.
constexpr int64_t A_THREADS_NUMBERS = 1 << 14;

const float* numbers(const Tensor& x, int64_t count) {
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
                             numbers(pre, heads * heads),
                             numbers(post, heads * heads),
                             numbers(bias, heads)};
  const int64_t most = 1 + 2 * heads * scores.numel() / A_THREADS_NUMBERS;
  const int64_t there = torch::stable::get_num_threads();
  const int threads = int(most < there ? most : there);
  const int64_t blocks = rows < MOST_BLOCKS ? rows : MOST_BLOCKS;
  MixHeads* const mix = FEATKD_CHOSEN(mix_heads);
  try {
    deal(blocks, threads, run_parallel, problem.scratch() * sizeof(float),
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
