// How functions are compiled for a CPU's instruction set or for CUDA.
#pragma once

#if defined(__CUDACC__)
#define FEATKD_INLINE __device__ __forceinline__
#define FEATKD_SIZE __host__ __device__ __forceinline__
#define FEATKD_UNROLLED _Pragma("unroll")
#else
#define FEATKD_INLINE inline __attribute__((always_inline))
#define FEATKD_SIZE FEATKD_INLINE
#define FEATKD_UNROLLED _Pragma("GCC unroll 8")
#endif

// each instruction set's code has a namespace of its own, so that the linker never takes one's
// copy of a function for another's
#ifndef FEATKD_ISA
#define FEATKD_ISA portable
#endif

#define FEATKD_JOIN_(a, b) a##b
#define FEATKD_JOIN(a, b) FEATKD_JOIN_(a, b)
