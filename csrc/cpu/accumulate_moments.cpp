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
    alignas(64) double sum_h[kStripColumns];
    alignas(64) double sum_sq_h[kStripColumns];
    int64_t n_fired[kStripColumns];
};

void moments_by_tiles(const Encoder& encoder, const MatrixView& acts, Span<const int64_t> columns,
                      Table<const double> targets, const MomentSums& sums) {
    TileStream stream(encoder, columns, {acts}, acts.n_rows);
    std::vector<StripSums> workers(static_cast<size_t>(stream.n_workers()));
    stream.run([&](const TileStream::Strip& strip, const TileStream::Block& block) {
        StripSums& local = workers[static_cast<size_t>(strip.worker)];
        std::memset(&local, 0, sizeof local);
        double* const sum_h = sums.sum_h.data + strip.first_column;
        double* const sum_sq_h = sums.sum_sq_h.data + strip.first_column;
        std::copy_n(sum_h, strip.n_columns, local.sum_h);
        std::copy_n(sum_sq_h, strip.n_columns, local.sum_sq_h);
        MomentStrip fold{local.sum_h, local.sum_sq_h, local.n_fired, nullptr, nullptr, targets.n_cols};
        if (targets) fold.sum_hy = sums.sum_hy.data + strip.first_column * targets.n_cols;
        for (int64_t i = 0; i < strip.n_tiles(); ++i) {
            if (targets) fold.targets = targets.data + (block.first_token + strip.first_token(i)) * targets.n_cols;
            stream.kernels().fold_moments(strip.tile(i), fold);
        }
        std::copy_n(local.sum_h, strip.n_columns, sum_h);
        std::copy_n(local.sum_sq_h, strip.n_columns, sum_sq_h);
        for (int j = 0; j < strip.n_columns; ++j) sums.n_fired.data[strip.first_column + j] += local.n_fired[j];
    });
}

/// The columns [begin, end) of one sparse row, in the formulas of fold_moments.
void fold_row(RowTopK::Row row, int64_t begin, int64_t end, const double* targets, int64_t n_targets,
              const MomentSums& sums) {
    for (int64_t i = std::lower_bound(row.columns, row.columns + row.size, begin) - row.columns;
         i < row.size && row.columns[i] < end; ++i) {
        const int64_t column = row.columns[i];
        const double h = row.values[i];
        sums.sum_h.data[column] += h;
        sums.sum_sq_h.data[column] += h * h;
        sums.n_fired.data[column] += 1;
        if (targets)
            for (int64_t k = 0; k < n_targets; ++k) sums.sum_hy.data[column * n_targets + k] += targets[k] * h;
    }
}

void moments_by_rows(const Encoder& encoder, const MatrixView& acts, Span<const int64_t> columns,
                     Table<const double> targets, const MomentSums& sums) {
    TileStream stream(encoder, {}, {acts}, RowTopK::max_block_tokens(encoder, 1));
    RowTopK top_k(stream, encoder, columns);
    const int64_t n_columns = sums.sum_h.size;
    const int64_t per_worker = (n_columns + stream.n_workers() - 1) / stream.n_workers();
    stream.run([&](const TileStream::Strip& strip, const TileStream::Block&) { top_k.add(strip); },
               [&](const TileStream::Block& block) {
                   top_k.finish(block.n_tokens);
                   parallel_for(stream.n_workers(), stream.n_workers(), [&](int, int64_t part) {
                       for (int64_t t = 0; t < block.n_tokens; ++t) {
                           poll();
                           fold_row(top_k.row(t, 0), part * per_worker, std::min((part + 1) * per_worker, n_columns),
                                    targets ? targets.data + (block.first_token + t) * targets.n_cols : nullptr,
                                    targets.n_cols, sums);
                       }
                   });
                   top_k.clear();
               });
}

}  // namespace
}  // namespace cpu

void accumulate_moments(const Encoder& encoder, const MatrixView& acts, Span<const int64_t> columns,
                        Table<const double> targets, const MomentSums& sums) {
    check_activations(acts, encoder.d_in(), "acts");
    check_columns(columns, encoder.d_sae());
    const int64_t n_columns = columns ? columns.size : encoder.d_sae();
    check_size(sums.sum_h.size, n_columns, "sum_h");
    check_size(sums.sum_sq_h.size, n_columns, "sum_sq_h");
    check_size(sums.n_fired.size, n_columns, "n_fired");
    check_paired_tables(targets, "targets", acts.n_rows, sums.sum_hy, "sum_hy", n_columns);
    check_rows(acts, "acts");
    check_finite(targets, "targets");
    if (acts.n_rows == 0 || n_columns == 0) return;
    const bool topk = encoder.selects_top_k();
    encoder.check_weights(topk ? Span<const int64_t>{} : columns);
    (topk ? cpu::moments_by_rows : cpu::moments_by_tiles)(encoder, acts, columns, targets, sums);
}

}  // namespace sts
