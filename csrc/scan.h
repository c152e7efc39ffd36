#pragma once
#include <sts/tensor_view.h>

#include <cstdint>

/// Reading borrowed matrices of either dtype.
namespace sts {

inline constexpr uint32_t kFloatExponent = 0x7f800000;
inline constexpr uint16_t kBfloat16Exponent = 0x7f80;

/// NaN and infinity have all exponent bits set. No early exit, so that the compiler can vectorise the loop.
inline bool all_finite(const uint32_t* values, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint32_t>((values[i] & kFloatExponent) == kFloatExponent);
    return !bad;
}
inline bool all_finite(const uint16_t* values, int64_t n) {
    uint16_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint16_t>((values[i] & kBfloat16Exponent) == kBfloat16Exponent);
    return !bad;
}

/// The bits of a matrix; `Bits` is uint32_t for float32 and uint16_t for bfloat16.
template <class Bits>
const Bits* bits_at(const MatrixView& matrix, int64_t r, int64_t c) {
    return static_cast<const Bits*>(matrix.data) + r * matrix.row_stride + c * matrix.col_stride;
}

/// Whether `n` elements from (r, c) on, along the row (col_stride 1), are finite.
inline bool run_is_finite(const MatrixView& matrix, int64_t r, int64_t c, int64_t n) {
    return matrix.dtype == DType::float32 ? all_finite(bits_at<uint32_t>(matrix, r, c), n)
                                          : all_finite(bits_at<uint16_t>(matrix, r, c), n);
}
inline bool row_is_finite(const MatrixView& matrix, int64_t r) {
    return run_is_finite(matrix, r, 0, matrix.n_cols);
}

/// Steps from (r, c) along the row to the first NaN or infinity, of which there must be one.
inline int64_t first_not_finite(const MatrixView& matrix, int64_t r, int64_t c) {
    int64_t step = 0;
    while (run_is_finite(matrix, r, c + step, 1)) ++step;
    return step;
}

}  // namespace sts
