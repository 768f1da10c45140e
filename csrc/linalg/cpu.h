// CPU solvers, compiled for each instruction set.
#pragma once

#include "../parallel.h"
#include "problem.h"

namespace featkd {

struct CpuKernels {
  const char* name;
  // Bytes of scratch memory per thread.
  size_t (*bytes)(const Problem&);
  // Solves matrix `index`; memory is aligned to 64 bytes.
  void (*solve)(const Problem&, int64_t index, void* memory);
  // Orthogonalises n rows in place by one-sided Jacobi and writes the accumulated rotations;
  // returns the number of sweeps. A row has `length` numbers, a multiple of 8, of which the padding
  // is zero.
  int (*jacobi)(int n, double* rows, double* rotations, int length);
};

// Solves the batch with up to `threads` threads. Throws std::bad_alloc.
void solve_on_cpu(const Problem& problem, int threads, ThreadRunner run_threads);

// One-sided Jacobi for a batch of (n, length) matrices; `sweeps` has one entry per matrix.
void jacobi_on_cpu(int64_t batch, int n, int length, double* rows, double* rotations,
                   int32_t* sweeps, int threads, ThreadRunner run_threads);

}  // namespace featkd
