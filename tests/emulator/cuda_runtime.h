#pragma once
/// As much of the CUDA runtime as the kernels use, over fibers; found before the real one by the include path.
#include <cmath>
#include <cstdlib>

#include "fibers.h"

#define STS_EMULATOR
#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One block runs at a time where a kernel has static shared memory.
#define __shared__ static

using dim3 = emulator::Dim3;
struct alignas(8) uint2 {
    unsigned x, y;
};
#define threadIdx (emulator::current().thread)
#define blockIdx (emulator::current().block->index)
#define blockDim (emulator::Machine::get().block_shape)
#define gridDim (emulator::Machine::get().grid)

using cudaStream_t = void*;
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) {
    return "no error";
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* n) {
    *n = 1;
    return cudaSuccess;
}
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
/// A small Hopper.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n_bytes, cudaStream_t) {
    std::memset(to, value, n_bytes);
    return cudaSuccess;
}

// For programs that have memory of their own.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMalloc(void** memory, size_t n_bytes) {
    *memory = std::aligned_alloc(256, (n_bytes + 255) / 256 * 256);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n_bytes, cudaMemcpyKind) {
    std::memcpy(to, from, n_bytes);
    return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return cudaSuccess;
}

inline void __syncthreads() {
    emulator::sync_block();
}
inline void __syncwarp(unsigned = 0xffffffffu) {
    emulator::exchange(0);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulator::exchange(value)[lane & 31];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulator::exchange(value)[emulator::current().lane ^ mask];
}
template <class T>
T __shfl_up_sync(unsigned, T value, int n_lanes) {
    const int lane = emulator::current().lane;
    return emulator::exchange(value)[lane < n_lanes ? lane : lane - n_lanes];
}
template <class T>
T __ldg(const T* address) {
    return *address;
}
inline int __any_sync(unsigned, int predicate) {
    const int* all = emulator::exchange(predicate != 0 ? 1 : 0);
    return std::any_of(all, all + 32, [](int one) { return one != 0; });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const int* all = emulator::exchange(predicate != 0 ? 1 : 0);
    unsigned lanes = 0;
    for (int lane = 0; lane < 32; ++lane) lanes |= static_cast<unsigned>(all[lane]) << lane;
    return lanes;
}
template <class T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}
template <class T>
T atomicMin(T* address, T value) {
    const T old = *address;
    *address = std::min(old, value);
    return old;
}
template <class T>
T atomicOr(T* address, T value) {
    const T old = *address;
    *address = old | value;
    return old;
}
inline int __popc(uint32_t bits) {
    return __builtin_popcount(bits);
}
inline int __ffs(uint32_t bits) {
    return __builtin_ffs(static_cast<int>(bits));
}
inline double __dmul_rn(double a, double b) {
    return a * b;
}
inline double __dadd_rn(double a, double b) {
    return a + b;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
