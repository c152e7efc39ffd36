/// Packs a strip of a row-major W_enc, compiled once per instruction set: with wider moves fewer stores wait for the
/// cache, which is what limits it.
#pragma once
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace sts::cpu::STS_ISA {
namespace {

STS_INLINE Floats read_floats(const float* from) {
    Floats v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}
STS_INLINE Floats read_floats(const uint16_t* from) {
    typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
    typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Bits) << 16);
}

template <class T>
void pack_run_of(const T* first, int64_t row_stride, int n_columns, int64_t depth, float* panels) {
    // Each row lies in another page, too far apart for the machine to guess.
    constexpr int64_t kAhead = 4;
    const int n_full = n_columns / kPanelColumns * kPanelColumns;
    const int last_width = n_columns - n_full > kLanes ? kPanelColumns : kLanes;
    float* last = panels + n_full * depth;
    for (int64_t k = 0; k < depth; ++k, panels += kPanelColumns) {
        const T* row = first + k * row_stride;
        for (int j = 0; j < n_columns; j += 64 / static_cast<int>(sizeof(T)))
            __builtin_prefetch(row + kAhead * row_stride + j);
        for (int j = 0; j < n_full; j += kPanelColumns)
#pragma GCC unroll 4
            for (int v = 0; v < kPanelColumns; v += kLanes) store(panels + j * depth + v, read_floats(row + j + v));
        if (n_full == n_columns) continue;
        alignas(64) T rest[kPanelColumns] = {};
        __builtin_memcpy(rest, row + n_full, static_cast<unsigned>(n_columns - n_full) * sizeof(T));
        for (int v = 0; v < last_width; v += kLanes) store(last + k * last_width + v, read_floats(rest + v));
    }
}

void pack_run(const void* first, bool is_bfloat16, int64_t row_stride, int n_columns, int64_t depth, float* panels) {
    if (is_bfloat16)
        pack_run_of(static_cast<const uint16_t*>(first), row_stride, n_columns, depth, panels);
    else
        pack_run_of(static_cast<const float*>(first), row_stride, n_columns, depth, panels);
}

}  // namespace
}  // namespace sts::cpu::STS_ISA
