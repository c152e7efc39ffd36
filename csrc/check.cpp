#include <sts/check.h>
#include <sts/sae_ops.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "cpu/parallel.h"
#include "scan.h"

namespace sts {

void check_extent(const MatrixView& matrix, const char* name) {
    constexpr int64_t kMost = int64_t{1} << 48;
    check(matrix.n_cols == 0 || matrix.n_rows <= kMost / matrix.n_cols,
          std::string(name) + " must have at most 2^48 elements, got [" + std::to_string(matrix.n_rows) + ", " +
              std::to_string(matrix.n_cols) + "]");
}

void check_activations(const MatrixView& acts, int64_t d_in, const char* name) {
    check_extent(acts, name);
    check(acts.n_cols == d_in, std::string(name) + " must have d_in = " + std::to_string(d_in) +
                                   " columns as W_enc has rows, got " + std::to_string(acts.n_cols));
    check(acts.col_stride == 1, std::string(name) +
                                    " must be contiguous within a row (any stride between rows will "
                                    "do), got an element stride of " +
                                    std::to_string(acts.col_stride));
}

void check_rows(const MatrixView& acts, const char* name) {
    constexpr int64_t kRows = 64;
    const int64_t n_parts = (acts.n_rows + kRows - 1) / kRows;
    std::mutex mutex;
    int64_t bad_row = acts.n_rows;
    const auto scan = [&](int, int64_t part) {
        const int64_t end = std::min(acts.n_rows, (part + 1) * kRows);
        for (int64_t r = part * kRows; r < end; ++r)
            if (!row_is_finite(acts, r)) {
                const std::lock_guard<std::mutex> lock(mutex);
                bad_row = std::min(bad_row, r);
                return;
            }
    };
    // Below a few megabytes starting threads costs more than the reading.
    const bool large = acts.n_rows * acts.n_cols > (1 << 21);
    cpu::parallel_for(large ? get_num_threads() : 1, n_parts, scan);
    if (bad_row == acts.n_rows) return;
    check(false, std::string(name) + " contains a NaN or infinity at row " + std::to_string(bad_row) + ", column " +
                     std::to_string(first_not_finite(acts, bad_row, 0)) + "; drop such rows or repair them first");
}

void check_finite(Table<const double> values, const char* name) {
    for (int64_t i = 0; i < values.n_rows * values.n_cols; ++i) {
        if (i % (1 << 20) == 0) cpu::poll();
        uint64_t bits;
        std::memcpy(&bits, values.data + i, sizeof bits);
        if ((bits & 0x7ff0000000000000u) == 0x7ff0000000000000u)
            check(false, std::string(name) + " contains a NaN or infinity at row " + std::to_string(i / values.n_cols) +
                             ", column " + std::to_string(i % values.n_cols));
    }
}

void check_columns(Span<const int64_t> columns, int64_t d_sae) {
    for (int64_t i = 0; i < columns.size; ++i) {
        check(columns.data[i] >= 0 && columns.data[i] < d_sae,
              "columns must lie in [0, d_sae = " + std::to_string(d_sae) + "), got " + std::to_string(columns.data[i]) +
                  " at position " + std::to_string(i));
        check(i == 0 || columns.data[i - 1] < columns.data[i],
              "columns must be strictly increasing, but position " + std::to_string(i) + " holds " +
                  std::to_string(columns.data[i]) + " after " + std::to_string(i ? columns.data[i - 1] : 0));
    }
}

void check_size(int64_t size, int64_t expected, const char* name) {
    check(size == expected,
          std::string(name) + " must have " + std::to_string(expected) + " entries, got " + std::to_string(size));
}

void check_paired_tables(Table<const double> rows, const char* rows_name, int64_t n_rows, Table<double> sums,
                         const char* sums_name, int64_t n_columns) {
    check(!rows == !sums, std::string(rows_name) + " and " + sums_name + " must be given together or not at all");
    if (!rows) return;
    check(rows.n_rows == n_rows, std::string(rows_name) + " must have one row per token (" + std::to_string(n_rows) +
                                     "), got " + std::to_string(rows.n_rows));
    check(sums.n_rows == n_columns && sums.n_cols == rows.n_cols,
          std::string(sums_name) + " must be [" + std::to_string(n_columns) + ", " + std::to_string(rows.n_cols) +
              "], got [" + std::to_string(sums.n_rows) + ", " + std::to_string(sums.n_cols) + "]");
}

}  // namespace sts
