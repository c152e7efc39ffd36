#pragma once
#include <sts/sae_ops.h>

#include <stdexcept>
#include <string>

namespace sts {

/// Throws std::invalid_argument with `message` where `ok` is false. The message is one sentence that starts
/// with the name of the argument at fault.
inline void check(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

/// Throws where `matrix` has so many elements that counts derived from them would overflow.
void check_extent(const MatrixView& matrix, const char* name);

/// Throws unless `acts` [n, d_in] has `d_in` columns, contiguous within a row.
void check_activations(const MatrixView& acts, int64_t d_in, const char* name);

/// Throws where `acts` holds a NaN or infinity, naming the first such row.
void check_rows(const MatrixView& acts, const char* name);

/// Throws where `values` holds a NaN or infinity, naming the first one.
void check_finite(Table<const double> values, const char* name);

/// Throws unless `columns` is strictly increasing within [0, d_sae).
void check_columns(Span<const int64_t> columns, int64_t d_sae);

/// Throws unless the accumulator or parameter `name` has the expected number of entries.
void check_size(int64_t size, int64_t expected, const char* name);

/// Throws unless `rows` [n_rows, K] and the accumulator `sums` [n_columns, K] are both given, with one K, or
/// both null.
void check_paired_tables(Table<const double> rows, const char* rows_name, int64_t n_rows, Table<double> sums,
                         const char* sums_name, int64_t n_columns);

}  // namespace sts
