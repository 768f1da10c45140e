// Deals the matrices of a batch to threads.
#include "cpu.h"

#include "../isa.h"

namespace featkd {

FEATKD_FOR_EACH_ISA(const CpuKernels, cpu)

// For the tests, which ask for each instruction set in turn.
extern "C" __attribute__((visibility("default"))) const char* featkd_cpu_kernels() {
  return FEATKD_CHOSEN(cpu).name;
}

void jacobi_on_cpu(int64_t batch, int n, int length, double* rows, double* turns, int32_t* sweeps,
                   int threads, Parallel parallel) {
  const CpuKernels& kernels = FEATKD_CHOSEN(cpu);
  const int64_t size = int64_t(n) * length;
  deal(batch, threads, parallel, 0, [&](int64_t index, void*) {
    sweeps[index] = kernels.jacobi(n, rows + index * size, turns + index * size, length);
  });
}

void solve_on_cpu(const Problem& problem, int threads, Parallel parallel) {
  const CpuKernels& kernels = FEATKD_CHOSEN(cpu);
  deal(problem.batch, threads, parallel, kernels.bytes(problem),
       [&](int64_t index, void* scratch) { kernels.solve(problem, index, scratch); });
}

}  // namespace featkd
