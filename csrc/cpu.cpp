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

// Calls body(index, scratch) for every index below `count`, in threads that take the next one as
// they come free, each with its own scratch memory of `bytes`.
template <class Body>
void deal(int64_t count, int threads, Parallel parallel, size_t bytes, const Body& body) {
  struct Queue {
    const Body& body;
    int64_t count;
    size_t bytes;
    std::unique_ptr<char, Release> memory;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
  };
  if (threads > count) threads = int(count);
  if (threads < 1) return;
  bytes = (bytes + 63) / 64 * 64;
  // all of it before any thread starts: where there is too little, nothing has run
  char* memory = static_cast<char*>(::operator new(bytes * size_t(threads), ALIGNMENT));
  Queue queue{body, count, bytes, std::unique_ptr<char, Release>(memory)};
  const auto work = [](void* context) {
    Queue& own = *static_cast<Queue*>(context);
    char* scratch = own.memory.get() + size_t(own.workers.fetch_add(1)) * own.bytes;
    int64_t index;
    while ((index = own.next.fetch_add(1)) < own.count) own.body(index, scratch);
  };
  if (threads == 1)
    work(&queue);
  else
    parallel(threads, work, &queue);
}

// Deals blocks of rows and adds up their partial sums to those `sums` of `channels` numbers that
// are not null, in the blocks' order.
template <class Real, size_t COUNT, class Block>
void deal_rows(int64_t groups, int64_t group, int threads, Parallel parallel, size_t bytes,
               int64_t channels, void* const (&sums)[COUNT], double* total, const Block& block) {
  const int64_t blocks = groups < MOST_BLOCKS ? groups : MOST_BLOCKS;
  bool any = false;
  for (void* sum : sums) any = any || sum;
  const int64_t size = any ? int64_t(COUNT) * channels : 0;
  const auto partial = std::make_unique<Real[]>(size_t(blocks * size));
  double totals[MOST_BLOCKS];
  deal(blocks, threads, parallel, bytes, [&](int64_t index, void* scratch) {
    const int64_t first = groups * index / blocks, last = groups * (index + 1) / blocks;
    Real* own = any ? partial.get() + index * size : nullptr;
    totals[index] = block(first * group, last * group, scratch, own);
  });
  for (int64_t index = 0; index < blocks; index++) {
    if (total) *total += totals[index];
    for (size_t k = 0; k < (any ? COUNT : 0); k++) {
      const Real* from = partial.get() + index * size + int64_t(k) * channels;
      for (int64_t c = 0; sums[k] && c < channels; c++) static_cast<Real*>(sums[k])[c] += from[c];
    }
  }
}

template <class... Arguments>
void deal_rows_as(bool wide, Arguments&&... arguments) {
  if (wide)
    deal_rows<double>(arguments...);
  else
    deal_rows<float>(arguments...);
}

}  // namespace

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

void distance_on_cpu(const DistanceProblem& p, int threads, Parallel parallel) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t group = p.width ? p.width : 1;
  deal_rows_as(p.wide, p.rows / group, group, threads, parallel, kernels.distance_bytes(p),
               p.channels, p.sums, p.total,
               [&](int64_t first, int64_t last, void* scratch, void* partial) {
                 return kernels.distance(p, first, last, scratch, partial);
               });
}

void soft_on_cpu(const SoftProblem& p, int threads, Parallel parallel) {
  const CpuKernels& kernels = cpu_kernels();
  void* const none[1] = {};
  deal_rows_as(p.wide, p.rows, 1, threads, parallel, kernels.soft_bytes(p), p.classes, none,
               static_cast<double*>(nullptr),
               [&](int64_t first, int64_t last, void* scratch, void* partial) {
                 return kernels.soft(p, first, last, scratch, partial);
               });
}

void norms_on_cpu(const NormsProblem& p, int threads, Parallel parallel) {
  const CpuKernels& kernels = cpu_kernels();
  deal_rows_as(p.wide, p.rows, 1, threads, parallel, kernels.norms_bytes(p), p.channels, p.sums,
               static_cast<double*>(nullptr),
               [&](int64_t first, int64_t last, void* scratch, void* partial) {
                 return kernels.norms(p, first, last, scratch, partial);
               });
}

}  // namespace featkd
