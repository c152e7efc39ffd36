#pragma once
#include <cstdint>

namespace sts {

enum class DType { float32, bfloat16 };

/// A borrowed matrix; element (r, c) is data[r * row_stride + c * col_stride], strides counted in elements.
struct MatrixView {
    const void* data = nullptr;
    DType dtype = DType::float32;
    int64_t n_rows = 0, n_cols = 0;
    int64_t row_stride = 0, col_stride = 1;
};

/// A borrowed contiguous vector; data is null where an optional argument was not given.
template <class T>
struct Span {
    T* data = nullptr;
    int64_t size = 0;
    explicit operator bool() const { return data != nullptr; }
};

/// A borrowed contiguous row-major matrix; data is null where an optional argument was not given.
template <class T>
struct Table {
    T* data = nullptr;
    int64_t n_rows = 0, n_cols = 0;
    explicit operator bool() const { return data != nullptr; }
};

}  // namespace sts
