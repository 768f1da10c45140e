// Distributes the matrices of a batch over threads.
#include "cpu.h"

#include "../isa.h"

namespace featkd {

FEATKD_DECLARE_FOR_EACH_ISA(const CpuKernels, cpu)

// Exported for the tests, which check each instruction set.
extern "C" __attribute__((visibility("default"))) const char* featkd_cpu_kernels() {
  return FEATKD_FOR_THIS_CPU(cpu).name;
}

void jacobi_on_cpu(int64_t batch, int n, int length, double* rows, double* rotations,
                   int32_t* sweeps, int threads, ThreadRunner run_threads) {
  const CpuKernels& kernels = FEATKD_FOR_THIS_CPU(cpu);
  const int64_t size = int64_t(n) * length;
  parallel_for_each(batch, threads, run_threads, 0, [&](int64_t index, void*) {
    sweeps[index] = kernels.jacobi(n, rows + index * size, rotations + index * size, length);
  });
}

void solve_on_cpu(const Problem& problem, int threads, ThreadRunner run_threads) {
  const CpuKernels& kernels = FEATKD_FOR_THIS_CPU(cpu);
  parallel_for_each(problem.batch, threads, run_threads, kernels.bytes(problem),
                    [&](int64_t index, void* scratch) { kernels.solve(problem, index, scratch); });
}

}  // namespace featkd
