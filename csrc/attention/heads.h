// Arguments of the kernel that mixes the attention scores of talking heads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace featkd {

// scores = post @ softmax(pre @ scores) + bias: the matrices mix heads, the softmax is over keys.
struct HeadsProblem {
  int64_t heads, queries, keys;
  void* scores;  // (images, heads, queries, keys), updated in place; bf16 or float32
  bool bf16;
  const float *pre, *post;  // (heads, heads)
  const float* bias;        // (heads)

  // Floats of scratch memory per thread; rows are padded to whole vectors.
  size_t scratch_elements() const { return size_t(heads * ((keys + 15) / 16 * 16 + heads)); }
};

// Processes queries [first, last), counted over all images.
using MixHeads = void(const HeadsProblem&, int64_t first, int64_t last, float* scratch);

}  // namespace featkd
