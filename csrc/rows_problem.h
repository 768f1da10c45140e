// What the sweeps over rows are asked, in plain pointers and sizes. Numbers ("Real") are float32,
// or float64 where `wide`; pointers to them may be null where that operand or result is not there.
#pragma once

#include "problem.h"

namespace featkd {

inline int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// A map to read, (images, tokens, channels), or, with one token an image, a matrix; any strides,
// in elements.
struct Rows {
  const void* data;
  Type type;
  int64_t tokens, image_stride, token_stride, stride;
};

// A contiguous map to write.
struct Results {
  void* data;
  Type type;
};

// Rows are dealt to threads in blocks, whose sums over rows are added up in the blocks' order: a
// result does not depend on the number of threads.
constexpr int64_t MOST_BLOCKS = 32;

// E = LN(x) - T, L = sum(E H), and the gradient of scale * L / 2 + sum(LN(x) added): see
// featkd/cpu/rows.py. H is E where width is 0, else E with its row sums over `width` tokens.
struct DistanceProblem {
  int64_t rows, channels, width;
  bool wide;
  double eps;
  Rows source, teacher;
  const void *bias, *gamma, *beta;  // (channels)
  const void* scale;  // 1 if null
  const void* added;  // (images, channels)
  Results slope;  // in place of `source` or not
  void* rstd;  // (rows)
  double* total;  // += L
  void* sums[3];  // (channels) += the gradients of bias, gamma and beta
};

// The loss of a row of logits and its gradient: see featkd/cpu/soft_kd.py.
struct SoftProblem {
  int64_t rows, classes;
  bool wide;
  double alpha, tau;
  Rows student, teacher, soft;
  const int64_t* labels;
  int64_t label_stride;
  void* losses;  // (rows)
  Results slope;
};

// r = LN_p(h), u = LN_1(r), and their backward pass: see featkd/cpu/widelast_projection.py.
struct NormsProblem {
  int64_t rows, channels;
  bool wide;
  double eps;
  Rows h;  // a matrix
  const void* parameters;  // (4, channels): gamma_p, beta_p, gamma_1, beta_1
  Results residual, normed;  // of the forward pass; what follows the statistics, of the backward
  void* statistics;  // (4, rows): mean and 1/std of h, of r
  int64_t statistics_stride;  // from one of the four to the next
  Rows d_residual, d_normed;
  Results slope;  // in place of h or not
  void* sums[4];  // (channels) += the gradients of the parameters
};

// Talking heads: softmax over the keys of `pre` times the scores, then `post` times that, plus
// `bias`, of every query: see featkd/cpu/talking_heads_attention.py.
struct HeadsProblem {
  int64_t rows, queries, keys, heads;  // rows: images times queries
  bool wide;
  Results scores;  // (images, heads, queries, keys), in place; numbers or bf16
  const void *pre, *post;  // (heads, heads)
  const void* bias;  // (heads)
};

}  // namespace featkd
