// What the solvers are asked, in plain pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace featkd {

enum class Type : int32_t { f32, f64, bf16, f16 };

// Info codes of a matrix.
constexpr int32_t SOLVED = 0, NOT_FINITE = 1, NOT_ACCURATE = 2;

// A batch of matrices, turned so that none has more rows than columns; strides are in elements.
// Each of the results is a contiguous array with a first dimension of `batch`.
struct Problem {
  const void* data;
  Type type;
  int64_t batch, columns, batch_stride, row_stride, column_stride;
  int32_t rows;
  bool wide;        // solve in float64 whatever the type
  double relative;  // share of a singular value at which its search may end
  void* values;  // (batch, rows) singular values, descending; float64 for Type::f64, else float32
  void* curve;   // (batch, rows) shares of the energy in the leading values, of the same type
  const double* thresholds;
  int32_t threshold_count;
  int64_t* ranks;     // (batch, threshold_count)
  int32_t* info;      // (batch)
  double* residual;   // (batch) |sum of eigenvalues / trace - 1|
  int32_t* resolved;  // (batch) 1 where a float32 solve came too near to a threshold
};

constexpr int32_t MOST_ROWS = 512;
constexpr double NEAR_TIE = 1e-6;  // float32 curves lie within a third of this
constexpr double TIE = 1e-10;  // below a threshold, that still reach it: float64 rounding is below
constexpr double WORST_RESIDUAL = 2e-6;

}  // namespace featkd
