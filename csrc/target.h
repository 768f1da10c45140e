// Macros for code that is compiled both for CUDA and for each CPU instruction set.
#pragma once

#if defined(__CUDACC__)
#define FEATKD_INLINE __device__ __forceinline__
#define FEATKD_HOST_DEVICE __host__ __device__ __forceinline__
#define FEATKD_UNROLLED _Pragma("unroll")
#else
#define FEATKD_INLINE inline __attribute__((always_inline))
#define FEATKD_HOST_DEVICE FEATKD_INLINE
#define FEATKD_UNROLLED _Pragma("GCC unroll 8")
#endif

// The code of each instruction set has its own namespace. Otherwise the linker could replace a
// function by the copy that was compiled for another instruction set.
#ifndef FEATKD_ISA
#define FEATKD_ISA portable
#endif

#define FEATKD_JOIN_(a, b) a##b
#define FEATKD_JOIN(a, b) FEATKD_JOIN_(a, b)
