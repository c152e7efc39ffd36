/// Vectors of one instruction set, in the namespace STS_ISA of the including file. Nothing here may have
/// external linkage or come from the standard library: the linker could then keep the copy with instructions
/// that the machine at hand does not have.
#pragma once
#include <cstdint>

#include "activation.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sts::cpu::STS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kPanelRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kPanelRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kPanelRows = 12;
#else
constexpr int kLanes = 4, kPanelRows = 6;
#endif
constexpr int kPanelVectors = 2, kPanelColumns = kPanelVectors * kLanes;

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef double Doubles __attribute__((vector_size(kLanes / 2 * sizeof(double))));

/// Addresses are multiples of the vector's size.
template <class V>
STS_INLINE V load_as(const void* from) {
    V v;
    __builtin_memcpy(&v, __builtin_assume_aligned(from, sizeof(V)), sizeof(V));
    return v;
}
STS_INLINE Floats load(const float* from) {
    return load_as<Floats>(from);
}
STS_INLINE Doubles load(const double* from) {
    return load_as<Doubles>(from);
}
template <class V, class T>
STS_INLINE void store(T* to, V v) {
    __builtin_memcpy(__builtin_assume_aligned(to, sizeof(V)), &v, sizeof(V));
}

/// a * b + c in one rounding where the machine has it.
STS_INLINE Floats multiply_add(float a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#elif defined(__aarch64__)
    return vfmaq_n_f32(c, b, a);
#else
    return a * b + c;
#endif
}

/// One bit per lane: v != 0, for a v without NaN.
STS_INLINE unsigned nonzero(Floats v) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
#else
    unsigned mask = 0;
    for (int l = 0; l < kLanes; ++l) mask |= static_cast<unsigned>(v[l] != 0) << l;
    return mask;
#endif
}

/// The lower and the upper half of the lanes, exact.
STS_INLINE void widen(Floats v, Doubles& low, Doubles& high) {
#if defined(__AVX512F__)
    low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
    low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
    for (int l = 0; l < kLanes / 2; ++l) {
        low[l] = v[l];
        high[l] = v[l + kLanes / 2];
    }
#endif
}

}  // namespace
}  // namespace sts::cpu::STS_ISA
