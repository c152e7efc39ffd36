#pragma once
#include <cuda_runtime.h>

#include <cstdint>

/// Half-width floats by their bits, the same on every architecture.
namespace sts::cuda {

__device__ __forceinline__ float from_bfloat16(uint16_t bits) {
    return __uint_as_float(uint32_t{bits} << 16);
}

/// The nearest bfloat16, of two equally near ones the even; finite values beyond its range become infinite.
__device__ __forceinline__ uint16_t to_bfloat16(float value) {
    const uint32_t bits = __float_as_uint(value);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ float from_float16(uint16_t bits) {
    const uint32_t sign = uint32_t{bits} >> 15 << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    // Subnormal ones count in steps of 2^-24.
    if (exponent == 0)
        return __uint_as_float(sign | __float_as_uint(static_cast<float>(fraction) * 5.9604644775390625e-8f));
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace sts::cuda
