// The CPU's kernels, one set an instruction set, and the choice among them.
#pragma once

#include "problem.h"

namespace featkd {

struct CpuKernels {
  const char* name;
  // scratch memory that one thread needs
  size_t (*bytes)(const Problem&);
  // solves matrix `index`; memory is aligned to 64 bytes
  void (*solve)(const Problem&, int64_t index, void* memory);
};

// Those of this processor: the best that it has, or at most the one named by FEATKD_ISA (avx512,
// avx2, portable).
const CpuKernels& cpu_kernels();

// Runs `body(context)` in up to `count` threads at once, at least one.
using Parallel = void (*)(int count, void (*body)(void* context), void* context);

// Solves the whole batch with `threads` threads, which take the next matrix as they come free.
// Throws std::bad_alloc.
void solve_on_cpu(const Problem& problem, int threads, Parallel parallel);

}  // namespace featkd
