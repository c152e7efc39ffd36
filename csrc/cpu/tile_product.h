/// The product of one tile, compiled once per instruction set; nothing else knows how it is computed.
#pragma once
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace sts::cpu::STS_ISA {
namespace {

/// One panel of rows times one panel of columns over one block of d_in, held in registers. Rows are read one
/// element at a time, so they need no transposing: a panel is kPanelRows rows, kRowStride apart.
template <bool kAdd, int kVectors>
void product_panel(int depth, const float* rows, const float* next_rows, const float* columns, float* values) {
    Floats sums[kPanelRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kPanelRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sums[i][j] = Floats{};
    for (int k = 0; k < depth; ++k, columns += kVectors * kLanes, next_rows += kPanelRows * kRowStride / kBlockK + 1) {
        __builtin_prefetch(next_rows);
        Floats w[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) w[j] = load(columns + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kPanelRows; ++i) {
            const float x = rows[i * kRowStride + k];
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sums[i][j] = multiply_add(x, w[j], sums[i][j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPanelRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
            float* to = values + i * kStripColumns + j * kLanes;
            store(to, kAdd ? load(to) + sums[i][j] : sums[i][j]);
        }
}

void product(const float* rows, int64_t n_panels, const float* strip, int64_t d_in, int n_columns, float* values) {
    for (int64_t start = 0; start < d_in; start += kBlockK) {
        const int depth = static_cast<int>(d_in - start < kBlockK ? d_in - start : kBlockK);
        for (int64_t m = 0; m < n_panels; ++m, rows += kPanelRows * kRowStride) {
            const float* columns = strip;
            for (int n = 0; n < n_columns; n += kPanelColumns, columns += depth * kPanelColumns) {
                float* to = values + m * kPanelRows * kStripColumns + n;
                const float* next = rows + kPanelRows * kRowStride;
                const bool half = n_columns - n < kPanelColumns;
                if (start == 0)
                    (half ? product_panel<false, 1> : product_panel<false, kPanelVectors>)(depth, rows, next, columns,
                                                                                           to);
                else
                    (half ? product_panel<true, 1> : product_panel<true, kPanelVectors>)(depth, rows, next, columns,
                                                                                         to);
            }
        }
        strip += depth * n_columns;
    }
}

}  // namespace
}  // namespace sts::cpu::STS_ISA
