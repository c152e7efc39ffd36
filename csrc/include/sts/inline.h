#pragma once
/// What both backends inline, into kernels too.
#if defined(__CUDACC__)
#define STS_INLINE __host__ __device__ __forceinline__
#else
#define STS_INLINE inline __attribute__((always_inline))
#endif
