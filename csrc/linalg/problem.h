// Arguments of the solvers, as plain pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace featkd {

enum class Type : int32_t { f32, f64, bf16, f16 };

// Info codes per matrix.
constexpr int32_t SOLVED = 0, NOT_FINITE = 1, NOT_ACCURATE = 2;

// A batch of matrices, transposed if necessary so that rows <= columns. Strides are in elements.
// Results are contiguous arrays with the first dimension `batch`.
struct Problem {
  const void* data;
  Type type;
  int64_t batch, columns, batch_stride, row_stride, column_stride;
  int32_t rows;
  bool in_float64;            // solve in float64 for every type
  double relative_tolerance;  // relative error of a singular value at which its search may end
  void* values;  // (batch, rows) singular values, descending; float64 for Type::f64, else float32
  void* curve;   // (batch, rows) share of the energy in the leading values; same type as values
  const double* thresholds;
  int32_t threshold_count;
  int64_t* ranks;     // (batch, threshold_count)
  int32_t* info;      // (batch)
  double* residual;   // (batch) |sum of eigenvalues / trace - 1|
  int32_t* resolved;  // (batch) 1 if the float32 solve was not accurate enough for the ranks
};

constexpr int32_t MAX_ROWS = 512;
// The error of a float32 curve is below a third of this.
constexpr double NEAR_TIE = 1e-6;
// Shares up to this much below a threshold reach it; the rounding of float64 is smaller.
constexpr double TIE = 1e-10;
constexpr double WORST_RESIDUAL = 2e-6;

}  // namespace featkd
