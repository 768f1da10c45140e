// Chooses the instruction set, and deals the matrices of a batch to threads.
#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace featkd {

extern const CpuKernels cpu_portable;
#if defined(__x86_64__)
extern const CpuKernels cpu_avx2, cpu_avx512;
#endif

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = [&]() -> const CpuKernels& {
#if defined(__x86_64__)
    const char* most = std::getenv("FEATKD_ISA");
    const bool no_512 = most && std::strcmp(most, "avx512") != 0;
    const bool no_2 = no_512 && std::strcmp(most, "avx2") != 0;
    __builtin_cpu_init();
    const bool has_2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_512 = has_2 && __builtin_cpu_supports("avx512f") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_512 && !no_512) return cpu_avx512;
    if (has_2 && !no_2) return cpu_avx2;
#endif
    return cpu_portable;
  }();
  return chosen;
}

namespace {

constexpr std::align_val_t ALIGNMENT{64};

struct Release {
  void operator()(char* p) const { ::operator delete(p, ALIGNMENT); }
};

struct Queue {
  const Problem* problem;
  const CpuKernels* kernels;
  char* memory;
  size_t bytes;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
};

void work(void* context) {
  Queue& queue = *static_cast<Queue*>(context);
  char* memory = queue.memory + size_t(queue.workers.fetch_add(1)) * queue.bytes;
  int64_t index;
  while ((index = queue.next.fetch_add(1)) < queue.problem->batch)
    queue.kernels->solve(*queue.problem, index, memory);
}

struct JacobiQueue {
  int64_t batch;
  int n, length;
  double *rows, *turns;
  int32_t* sweeps;
  std::atomic<int64_t> next{0};
};

void work_on_jacobi(void* context) {
  JacobiQueue& queue = *static_cast<JacobiQueue*>(context);
  const int64_t size = int64_t(queue.n) * queue.length;
  int64_t index;
  while ((index = queue.next.fetch_add(1)) < queue.batch)
    queue.sweeps[index] = cpu_kernels().jacobi(queue.n, queue.rows + index * size,
                                               queue.turns + index * size, queue.length);
}

}  // namespace

void jacobi_on_cpu(int64_t batch, int n, int length, double* rows, double* turns, int32_t* sweeps,
                   int threads, Parallel parallel) {
  JacobiQueue queue{batch, n, length, rows, turns, sweeps};
  if (threads > batch) threads = int(batch);
  if (threads >= 1) parallel(threads, work_on_jacobi, &queue);
}

void solve_on_cpu(const Problem& problem, int threads, Parallel parallel) {
  if (threads > problem.batch) threads = int(problem.batch);
  if (threads < 1) return;
  const CpuKernels& kernels = cpu_kernels();
  const size_t bytes = kernels.bytes(problem);
  // all of it before any thread starts: where there is too little, nothing has run
  std::unique_ptr<char, Release> memory(
      static_cast<char*>(::operator new(bytes * size_t(threads), ALIGNMENT)));
  Queue queue{&problem, &kernels, memory.get(), bytes};
  parallel(threads, work, &queue);
}

}  // namespace featkd
