// The CUDA kernels: a block a matrix, from the same source as the CPU's.
#include "cuda.h"
#include "jacobi.h"
#include "spectrum.h"

namespace featkd {
namespace portable {

// A block's scratch memory: shared, or its part of a workspace where that is too small.
__device__ __forceinline__ void* scratch_memory(size_t bytes, char* workspace) {
  extern __shared__ uint64_t shared_memory[];
  if (workspace == nullptr) return shared_memory;
  return workspace + (bytes + 255) / 256 * 256 * size_t(blockIdx.x);
}

// Pointers as arguments of their own: what checks accesses must know each array.
template <class Real>
__device__ __forceinline__ void spectrum_of_batch(const Problem& p, bool only_resolved,
                                                  size_t bytes, char* workspace) {
  const Block team;
  const Scratch<Block, Real> scratch(scratch_memory(bytes, workspace), p.rows, team.size());
  for (int64_t index = blockIdx.x; index < p.batch; index += gridDim.x) {
    if (only_resolved && p.resolved[index] == 0) continue;  // for the whole block
    const auto found = solve(team, p, index, scratch);
    if (threadIdx.x == 0) {
      const bool doubtful = write_results(p, index, found);
      if (!only_resolved) p.resolved[index] = doubtful;
    }
  }
}

}  // namespace portable

#define FEATKD_SPECTRUM_KERNEL(NAME, REAL, BLOCKS)                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(                            \
      const void* data, int type, int64_t batch, int64_t columns, int64_t batch_stride,          \
      int64_t row_stride, int64_t column_stride, int rows, double relative, void* values,        \
      void* curve, const double* thresholds, int threshold_count, int64_t* ranks, int32_t* info, \
      double* residual, int32_t* resolved, int only_resolved, size_t bytes, char* workspace) {   \
    const Problem p{                                                                             \
        data,  Type(type), batch,    columns, batch_stride, row_stride, column_stride,           \
        rows,  false,      relative, values,  curve,        thresholds, threshold_count,         \
        ranks, info,       residual, resolved};                                                  \
    portable::spectrum_of_batch<REAL>(p, only_resolved, bytes, workspace);                       \
  }

// Blocks that a multiprocessor's registers must hold: at 196 rows its shared memory holds two of
// float32 from sm_90 on, before and of float64 one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FEATKD_FLOAT32_BLOCKS 2
#else
#define FEATKD_FLOAT32_BLOCKS 1
#endif
FEATKD_SPECTRUM_KERNEL(featkd_spectrum_float32, float, FEATKD_FLOAT32_BLOCKS)
FEATKD_SPECTRUM_KERNEL(featkd_spectrum_float64, double, 1)

// rows (batch, n, length), turned in place; turns of the same shape; sweeps (batch)
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    featkd_jacobi_float64(double* rows, double* turns, int32_t* sweeps, int64_t batch, int n,
                          int length, size_t bytes, char* workspace) {
  const portable::Block team;
  const portable::JacobiScratch<portable::Block, double> scratch(
      portable::scratch_memory(bytes, workspace), team.size());
  for (int64_t index = blockIdx.x; index < batch; index += gridDim.x) {
    const int64_t first = index * n * length;
    const int count =
        jacobi(team, portable::Band<double>{rows + first, turns + first, n, length}, scratch);
    if (threadIdx.x == 0) sweeps[index] = count;
  }
}

namespace {

size_t scratch_bytes(const Problem& p, bool wide) {
  return wide ? portable::Scratch<portable::Block, double>::bytes(p.rows, WARPS)
              : portable::Scratch<portable::Block, float>::bytes(p.rows, WARPS);
}

const char* said(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* plan_blocks(size_t scratch, int64_t batch, LaunchPlan* plan) {
  int device = 0, a_block = 0, each = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&a_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&each, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    *plan = plan_launch(scratch, batch, {size_t(a_block), size_t(each), count});
  return said(error);
}

// Arguments but the last, which is the workspace, as the kernel has them.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchPlan& plan, void* workspace,
                   void* stream, Arguments... arguments) {
  if (plan.blocks == 0) return nullptr;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared));
  if (error != cudaSuccess) return said(error);
  kernel<<<plan.blocks, THREADS, plan.shared, static_cast<cudaStream_t>(stream)>>>(
      arguments..., plan.shared == 0 ? static_cast<char*>(workspace) : nullptr);
  return said(cudaGetLastError());
}

size_t jacobi_bytes(int length) {
  return portable::JacobiScratch<portable::Block, double>::bytes(length, WARPS);
}

}  // namespace

const char* plan_on_cuda(const Problem& p, bool wide, LaunchPlan* plan) {
  return plan_blocks(scratch_bytes(p, wide), p.batch, plan);
}

const char* plan_jacobi_on_cuda(int64_t batch, int length, LaunchPlan* plan) {
  return plan_blocks(jacobi_bytes(length), batch, plan);
}

const char* solve_on_cuda(const Problem& p, bool wide, bool only_resolved, const LaunchPlan& plan,
                          void* workspace, void* stream) {
  return launch(wide ? featkd_spectrum_float64 : featkd_spectrum_float32, plan, workspace, stream,
                p.data, int(p.type), p.batch, p.columns, p.batch_stride, p.row_stride,
                p.column_stride, p.rows, p.relative, p.values, p.curve, p.thresholds,
                p.threshold_count, p.ranks, p.info, p.residual, p.resolved, int(only_resolved),
                scratch_bytes(p, wide));
}

const char* jacobi_on_cuda(int64_t batch, int n, int length, double* rows, double* turns,
                           int32_t* sweeps, const LaunchPlan& plan, void* workspace, void* stream) {
  return launch(featkd_jacobi_float64, plan, workspace, stream, rows, turns, sweeps, batch, n,
                length, jacobi_bytes(length));
}

}  // namespace featkd
