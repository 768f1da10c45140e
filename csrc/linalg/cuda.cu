// CUDA kernels: one block per matrix, from the same source as the CPU kernels.
#include "cuda.h"
#include "jacobi.h"
#include "spectrum.h"

namespace featkd {
namespace portable {

// Scratch memory of a block: shared memory, or a part of `workspace` if shared memory is too small.
__device__ __forceinline__ void* scratch_memory(size_t bytes, char* workspace) {
  extern __shared__ uint64_t shared_memory[];
  if (workspace == nullptr) return shared_memory;
  return workspace + (bytes + 255) / 256 * 256 * size_t(blockIdx.x);
}

// Solves every matrix of the batch, or those marked in `p.resolved` if `only_resolved` is set.
template <class Real>
__device__ __forceinline__ void spectrum_of_batch(const Problem& p, bool only_resolved,
                                                  size_t bytes, char* workspace) {
  const Block team;
  const Scratch<Block, Real> scratch(scratch_memory(bytes, workspace), p.rows, team.size());
  for (int64_t index = blockIdx.x; index < p.batch; index += gridDim.x) {
    if (only_resolved && p.resolved[index] == 0) continue;  // the same for all threads of the block
    const auto found = solve(team, p, index, scratch);
    if (threadIdx.x == 0) {
      const bool uncertain = write_results(p, index, found);
      if (!only_resolved) p.resolved[index] = uncertain;
    }
  }
}

}  // namespace portable

// Each array is an argument of its own, so that tools that check accesses can tell them apart.
#define FEATKD_SPECTRUM_KERNEL(NAME, REAL, BLOCKS)                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                   \
      NAME(const void* data, int type, int64_t batch, int64_t columns, int64_t batch_stride,      \
           int64_t row_stride, int64_t column_stride, int rows, double relative_tolerance,        \
           void* values, void* curve, const double* thresholds, int threshold_count,              \
           int64_t* ranks, int32_t* info, double* residual, int32_t* resolved, int only_resolved, \
           size_t bytes, char* workspace) {                                                       \
    const Problem p{data,       Type(type),    batch,      columns,         batch_stride,         \
                    row_stride, column_stride, rows,       false,           relative_tolerance,   \
                    values,     curve,         thresholds, threshold_count, ranks,                \
                    info,       residual,      resolved};                                         \
    portable::spectrum_of_batch<REAL>(p, only_resolved, bytes, workspace);                        \
  }

// Blocks per multiprocessor that the register allocation must allow. At 196 rows, shared memory
// holds two float32 blocks from sm_90 on, otherwise one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FEATKD_FLOAT32_BLOCKS 2
#else
#define FEATKD_FLOAT32_BLOCKS 1
#endif
FEATKD_SPECTRUM_KERNEL(featkd_spectrum_float32, float, FEATKD_FLOAT32_BLOCKS)
FEATKD_SPECTRUM_KERNEL(featkd_spectrum_float64, double, 1)

// rows: (batch, n, length), updated in place; rotations: the same shape; sweeps: (batch,).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    featkd_jacobi_float64(double* rows, double* rotations, int32_t* sweeps, int64_t batch, int n,
                          int length, size_t bytes, char* workspace) {
  const portable::Block team;
  const portable::JacobiScratch<portable::Block, double> scratch(
      portable::scratch_memory(bytes, workspace), team.size());
  for (int64_t index = blockIdx.x; index < batch; index += gridDim.x) {
    const int64_t first = index * n * length;
    const int count =
        jacobi(team, portable::Band<double>{rows + first, rotations + first, n, length}, scratch);
    if (threadIdx.x == 0) sweeps[index] = count;
  }
}

namespace {

size_t scratch_bytes(const Problem& p, bool in_float64) {
  return in_float64 ? portable::Scratch<portable::Block, double>::bytes(p.rows, WARPS)
                    : portable::Scratch<portable::Block, float>::bytes(p.rows, WARPS);
}

const char* error_message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* plan_blocks(size_t scratch, int64_t batch, LaunchPlan* plan) {
  int device = 0, per_block = 0, per_multiprocessor = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                   device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    *plan = plan_launch(scratch, batch, {size_t(per_block), size_t(per_multiprocessor), count});
  return error_message(error);
}

// Launches a kernel whose last argument is the workspace; `arguments` are the others.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchPlan& plan, void* workspace,
                   void* stream, Arguments... arguments) {
  if (plan.blocks == 0) return nullptr;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared));
  if (error != cudaSuccess) return error_message(error);
  kernel<<<plan.blocks, THREADS, plan.shared, static_cast<cudaStream_t>(stream)>>>(
      arguments..., plan.shared == 0 ? static_cast<char*>(workspace) : nullptr);
  return error_message(cudaGetLastError());
}

size_t jacobi_bytes(int length) {
  return portable::JacobiScratch<portable::Block, double>::bytes(length, WARPS);
}

}  // namespace

const char* plan_on_cuda(const Problem& p, bool in_float64, LaunchPlan* plan) {
  return plan_blocks(scratch_bytes(p, in_float64), p.batch, plan);
}

const char* plan_jacobi_on_cuda(int64_t batch, int length, LaunchPlan* plan) {
  return plan_blocks(jacobi_bytes(length), batch, plan);
}

const char* solve_on_cuda(const Problem& p, bool in_float64, bool only_resolved,
                          const LaunchPlan& plan, void* workspace, void* stream) {
  return launch(in_float64 ? featkd_spectrum_float64 : featkd_spectrum_float32, plan, workspace,
                stream, p.data, int(p.type), p.batch, p.columns, p.batch_stride, p.row_stride,
                p.column_stride, p.rows, p.relative_tolerance, p.values, p.curve, p.thresholds,
                p.threshold_count, p.ranks, p.info, p.residual, p.resolved, int(only_resolved),
                scratch_bytes(p, in_float64));
}

const char* jacobi_on_cuda(int64_t batch, int n, int length, double* rows, double* rotations,
                           int32_t* sweeps, const LaunchPlan& plan, void* workspace, void* stream) {
  return launch(featkd_jacobi_float64, plan, workspace, stream, rows, rotations, sweeps, batch, n,
                length, jacobi_bytes(length));
}

}  // namespace featkd
