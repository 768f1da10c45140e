// Chooses the instruction set, and deals the matrices of a batch to threads.
#include "cpu.h"

#include <cstdlib>
#include <cstring>

#include "deal.h"

namespace featkd {

extern const CpuKernels cpu_portable;
#if defined(__x86_64__)
extern const CpuKernels cpu_avx2, cpu_avx512;
#endif

Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const char* most = std::getenv("FEATKD_ISA");
    const bool no_512 = most && std::strcmp(most, "avx512") != 0;
    const bool no_2 = no_512 && std::strcmp(most, "avx2") != 0;
    __builtin_cpu_init();
    const bool has_2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_512 = has_2 && __builtin_cpu_supports("avx512f") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_512 && !no_512) return Isa::avx512;
    if (has_2 && !no_2) return Isa::avx2;
#endif
    return Isa::portable;
  }();
  return chosen;
}

const CpuKernels& cpu_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return cpu_avx512;
  if (isa() == Isa::avx2) return cpu_avx2;
#endif
  return cpu_portable;
}

// For the tests, which ask for each instruction set in turn.
extern "C" __attribute__((visibility("default"))) const char* featkd_cpu_kernels() {
  return cpu_kernels().name;
}

void jacobi_on_cpu(int64_t batch, int n, int length, double* rows, double* turns, int32_t* sweeps,
                   int threads, Parallel parallel) {
  const int64_t size = int64_t(n) * length;
  deal(batch, threads, parallel, 0, [&](int64_t index, void*) {
    sweeps[index] =
        cpu_kernels().jacobi(n, rows + index * size, turns + index * size, length);
  });
}

void solve_on_cpu(const Problem& problem, int threads, Parallel parallel) {
  const CpuKernels& kernels = cpu_kernels();
  deal(problem.batch, threads, parallel, kernels.bytes(problem),
       [&](int64_t index, void* scratch) { kernels.solve(problem, index, scratch); });
}

}  // namespace featkd
