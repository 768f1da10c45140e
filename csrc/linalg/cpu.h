// The CPU's solvers, one set per instruction set.
#pragma once

#include "../deal.h"
#include "problem.h"

namespace featkd {

struct CpuKernels {
  const char* name;
  // scratch memory that one thread needs
  size_t (*bytes)(const Problem&);
  // solves matrix `index`; memory is aligned to 64 bytes
  void (*solve)(const Problem&, int64_t index, void* memory);
  // one-sided Jacobi of n rows in place, with its turns of a unit matrix; returns the sweeps.
  // Rows are `length` numbers apart, a multiple of 8, zero behind the n-th
  int (*jacobi)(int n, double* rows, double* turns, int length);
};

// Solves the whole batch with `threads` threads, which take the next matrix as they come free.
// Throws std::bad_alloc.
void solve_on_cpu(const Problem& problem, int threads, Parallel parallel);

// One-sided Jacobi of a batch of (n, length) matrices; sweeps has a number for each.
void jacobi_on_cpu(int64_t batch, int n, int length, double* rows, double* turns, int32_t* sweeps,
                   int threads, Parallel parallel);

}  // namespace featkd
