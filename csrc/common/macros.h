#pragma once

// Functions of csrc/math run on the host (scalars and SIMD vectors) and on the device. They are always inlined: the CPU
// kernels are compiled once per instruction set, and an out-of-line copy built for one of them must never serve
// another.
#if defined(__CUDACC__)
#define APEX_HD __host__ __device__ __forceinline__
#else
#define APEX_HD inline __attribute__((always_inline))
#endif
