// Chooses the sweeps of this processor, and deals their rows to threads.
#include "rows_cpu.h"

#include <memory>

#include "deal.h"

namespace featkd {

extern const RowKernels rows_portable;
#if defined(__x86_64__)
extern const RowKernels rows_avx2, rows_avx512;
#endif

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return rows_avx512;
  if (isa() == Isa::avx2) return rows_avx2;
#endif
  return rows_portable;
}

namespace {

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

void distance_on_cpu(const DistanceProblem& p, int threads, Parallel parallel) {
  const RowKernels& kernels = row_kernels();
  const int64_t group = p.width ? p.width : 1;
  deal_rows_as(p.wide, p.rows / group, group, threads, parallel, kernels.distance_bytes(p),
               p.channels, p.sums, p.total,
               [&](int64_t first, int64_t last, void* scratch, void* partial) {
                 return kernels.distance(p, first, last, scratch, partial);
               });
}

void soft_on_cpu(const SoftProblem& p, int threads, Parallel parallel) {
  const RowKernels& kernels = row_kernels();
  void* const none[1] = {};
  deal_rows_as(p.wide, p.rows, 1, threads, parallel, kernels.soft_bytes(p), p.classes, none,
               static_cast<double*>(nullptr),
               [&](int64_t first, int64_t last, void* scratch, void* partial) {
                 return kernels.soft(p, first, last, scratch, partial);
               });
}

void norms_on_cpu(const NormsProblem& p, int threads, Parallel parallel) {
  const RowKernels& kernels = row_kernels();
  deal_rows_as(p.wide, p.rows, 1, threads, parallel, kernels.norms_bytes(p), p.channels, p.sums,
               static_cast<double*>(nullptr),
               [&](int64_t first, int64_t last, void* scratch, void* partial) {
                 return kernels.norms(p, first, last, scratch, partial);
               });
}

void heads_on_cpu(const HeadsProblem& p, int threads, Parallel parallel) {
  const RowKernels& kernels = row_kernels();
  void* const none[1] = {};
  deal_rows_as(p.wide, p.rows, 1, threads, parallel, kernels.heads_bytes(p), p.keys, none,
               static_cast<double*>(nullptr),
               [&](int64_t first, int64_t last, void* scratch, void* partial) {
                 return kernels.heads(p, first, last, scratch, partial);
               });
}

}  // namespace featkd
