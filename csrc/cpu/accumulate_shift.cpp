#include <sts/check.h>
#include <sts/sae_ops.h>

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/row_top_k.h"
#include "cpu/tile_stream.h"

namespace sts {
namespace cpu {
namespace {

/// One worker's accumulators while it owns a strip: padding included, which the caller's have no room for.
struct StripSums {
    alignas(64) double sums[5][kStripColumns];
    int64_t counts[2][kStripColumns];
};

/// The caller's sums in the order of StripSums; all but the first may be null.
struct Targets {
    double* sums[5];
    int64_t* counts[2];
    explicit Targets(const ShiftSums& s)
        : sums{s.sum_sq_shift.data, s.sum_base.data, s.sum_other.data, s.sum_sq_base.data, s.sum_sq_other.data},
          counts{s.n_fired_base.data, s.n_fired_other.data} {}
};

template <class T>
void copy(const T* from, T* to, int64_t n) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

void shift_by_tiles(const Encoder& encoder, const std::vector<MatrixView>& members, Span<const int64_t> columns,
                    Table<const double> row_weights, const ShiftSums& sums) {
    TileStream stream(encoder, columns, members, members[0].n_rows);
    std::vector<StripSums> workers(static_cast<size_t>(stream.n_workers()));
    const Targets targets(sums);
    const bool full = static_cast<bool>(sums.sum_base);
    stream.run([&](const TileStream::Strip& strip, const TileStream::Block& block) {
        StripSums& local = workers[static_cast<size_t>(strip.worker)];
        std::memset(&local, 0, sizeof local);
        for (int i = 0; i < (full ? 5 : 1); ++i)
            copy(targets.sums[i] + strip.first_column, local.sums[i], strip.n_columns);
        ShiftStrip fold{};
        fold.sum_sq_shift = local.sums[0];
        if (full) {
            fold.sum_base = local.sums[1];
            fold.sum_other = local.sums[2];
            fold.sum_sq_base = local.sums[3];
            fold.sum_sq_other = local.sums[4];
            fold.n_fired_base = local.counts[0];
            fold.n_fired_other = local.counts[1];
        }
        if (row_weights) {
            fold.n_weights = row_weights.n_cols;
            fold.weighted_sq_shift = sums.weighted_sq_shift.data + strip.first_column * fold.n_weights;
        }
        for (int64_t i = 0; i < strip.n_tiles(); ++i) {
            if (row_weights)
                fold.row_weights = row_weights.data + (block.first_token + strip.first_token(i)) * row_weights.n_cols;
            stream.kernels().fold_shift(strip.tile(i), fold);
        }
        for (int i = 0; i < (full ? 5 : 1); ++i)
            copy(local.sums[i], targets.sums[i] + strip.first_column, strip.n_columns);
        for (int i = 0; i < (full ? 2 : 0); ++i)
            for (int j = 0; j < strip.n_columns; ++j) targets.counts[i][strip.first_column + j] += local.counts[i][j];
    });
}

/// The columns [begin, end) of one pair of sparse rows, in the formulas of fold_shift.
void fold_pair(RowTopK::Row a, RowTopK::Row b, int64_t begin, int64_t end, const double* weights, int64_t n_weights,
               const ShiftSums& sums) {
    int64_t i = std::lower_bound(a.columns, a.columns + a.size, begin) - a.columns;
    int64_t j = std::lower_bound(b.columns, b.columns + b.size, begin) - b.columns;
    while (true) {
        const int64_t column_a = i < a.size ? a.columns[i] : end, column_b = j < b.size ? b.columns[j] : end;
        const int64_t column = std::min(column_a, column_b);
        if (column >= end) return;
        const double h_a = column_a == column ? a.values[i++] : 0, h_b = column_b == column ? b.values[j++] : 0;
        const double square = (h_b - h_a) * (h_b - h_a);
        sums.sum_sq_shift.data[column] += square;
        if (sums.sum_base) {
            sums.sum_base.data[column] += h_a;
            sums.sum_other.data[column] += h_b;
            sums.sum_sq_base.data[column] += h_a * h_a;
            sums.sum_sq_other.data[column] += h_b * h_b;
            sums.n_fired_base.data[column] += h_a != 0;
            sums.n_fired_other.data[column] += h_b != 0;
        }
        if (weights && square != 0)
            for (int64_t k = 0; k < n_weights; ++k)
                sums.weighted_sq_shift.data[column * n_weights + k] += weights[k] * square;
    }
}

void shift_by_rows(const Encoder& encoder, const std::vector<MatrixView>& members, Span<const int64_t> columns,
                   Table<const double> row_weights, const ShiftSums& sums) {
    TileStream stream(encoder, {}, members, RowTopK::max_block_tokens(encoder, 2));
    RowTopK top_k(stream, encoder, columns);
    const int64_t n_columns = sums.sum_sq_shift.size;
    const int64_t per_worker = (n_columns + stream.n_workers() - 1) / stream.n_workers();
    stream.run([&](const TileStream::Strip& strip, const TileStream::Block&) { top_k.add(strip); },
               [&](const TileStream::Block& block) {
                   top_k.finish(block.n_tokens);
                   parallel_for(stream.n_workers(), stream.n_workers(), [&](int, int64_t part) {
                       for (int64_t t = 0; t < block.n_tokens; ++t) {
                           poll();
                           fold_pair(
                               top_k.row(t, 0), top_k.row(t, 1), part * per_worker,
                               std::min((part + 1) * per_worker, n_columns),
                               row_weights ? row_weights.data + (block.first_token + t) * row_weights.n_cols : nullptr,
                               row_weights.n_cols, sums);
                       }
                   });
                   top_k.clear();
               });
}

}  // namespace
}  // namespace cpu

void accumulate_shift(const Encoder& encoder, const MatrixView& base, const MatrixView& other,
                      Span<const int64_t> columns, Table<const double> row_weights, const ShiftSums& sums) {
    check_activations(base, encoder.d_in(), "base");
    check_activations(other, encoder.d_in(), "other");
    check(base.n_rows == other.n_rows, "other must have as many rows as base (" + std::to_string(base.n_rows) +
                                           "), since row t of both is the same token, got " +
                                           std::to_string(other.n_rows));
    check_columns(columns, encoder.d_sae());
    const int64_t n_columns = columns ? columns.size : encoder.d_sae();
    check_size(sums.sum_sq_shift.size, n_columns, "sum_sq_shift");
    const int n_given = !!sums.sum_base + !!sums.sum_other + !!sums.sum_sq_base + !!sums.sum_sq_other +
                        !!sums.n_fired_base + !!sums.n_fired_other;
    check(n_given == 0 || n_given == 6,
          "sum_base, sum_other, sum_sq_base, sum_sq_other, n_fired_base and n_fired_other must be given all "
          "or none");
    if (n_given) {
        check_size(sums.sum_base.size, n_columns, "sum_base");
        check_size(sums.sum_other.size, n_columns, "sum_other");
        check_size(sums.sum_sq_base.size, n_columns, "sum_sq_base");
        check_size(sums.sum_sq_other.size, n_columns, "sum_sq_other");
        check_size(sums.n_fired_base.size, n_columns, "n_fired_base");
        check_size(sums.n_fired_other.size, n_columns, "n_fired_other");
    }
    check_paired_tables(row_weights, "row_weights", base.n_rows, sums.weighted_sq_shift, "weighted_sq_shift",
                        n_columns);
    check_rows(base, "base");
    check_rows(other, "other");
    check_finite(row_weights, "row_weights");
    if (base.n_rows == 0 || n_columns == 0) return;
    const bool topk = encoder.selects_top_k();
    encoder.check_weights(topk ? Span<const int64_t>{} : columns);
    (topk ? cpu::shift_by_rows : cpu::shift_by_tiles)(encoder, {base, other}, columns, row_weights, sums);
}

}  // namespace sts
