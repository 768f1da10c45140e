// What the sweep over talking heads' scores is asked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace featkd {

// softmax over the keys of `pre` times the scores, then `post` times that, plus `bias`
struct HeadsProblem {
  int64_t heads, queries, keys;
  void* scores;  // (any images, heads, queries, keys), in place; bf16 or float32
  bool bf16;
  const float *pre, *post;  // (heads, heads)
  const float* bias;        // (heads)

  // numbers of scratch memory that one thread needs: rows end in whole vectors
  size_t scratch() const { return size_t(heads * ((keys + 15) / 16 * 16 + heads)); }
};

// The queries [first, last) of all images.
using MixHeads = void(const HeadsProblem&, int64_t first, int64_t last, float* scratch);

}  // namespace featkd
