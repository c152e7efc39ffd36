#include <sts/check.h>
#include <sts/sae_ops.h>

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/row_top_k.h"
#include "cpu/tile_stream.h"

namespace sts {
namespace cpu {
namespace {

struct Feature {
    int32_t column;
    float value;
};

/// One worker's features of a block: strip by strip in ascending order, within a strip row by row.
struct WorkerFeatures {
    std::vector<Feature> features;
    std::vector<int32_t> rows;
    std::vector<int64_t> row_counts;
    SelectedTile selected;
};

void append_strip(const TileStream& stream, const TileStream::Strip& strip, WorkerFeatures& worker) {
    for (int64_t i = 0; i < strip.n_tiles(); ++i) {
        const Tile tile = strip.tile(i);
        stream.kernels().select(tile, nullptr, worker.selected);
        int64_t n = 0;
        for (int r = 0; r < tile.n_tokens; ++r) {
            const int64_t row = strip.first_token(i) + r;
            for (int64_t end = n + worker.selected.row_counts[r]; n < end; ++n) {
                worker.features.push_back(
                    {static_cast<int32_t>(strip.first_column) + worker.selected.columns[n], worker.selected.values[n]});
                worker.rows.push_back(static_cast<int32_t>(row));
            }
            worker.row_counts[static_cast<size_t>(row)] += worker.selected.row_counts[r];
        }
    }
}

SparseRows encode_by_tiles(const Encoder& encoder, const MatrixView& acts, Span<const int64_t> columns) {
    TileStream stream(encoder, columns, {acts}, acts.n_rows);
    std::vector<std::unique_ptr<WorkerFeatures>> workers;
    for (int i = 0; i < stream.n_workers(); ++i) {
        workers.push_back(std::make_unique<WorkerFeatures>());
        workers.back()->row_counts.resize(static_cast<size_t>(stream.max_block_rows()));
    }
    SparseRows sparse;
    sparse.indptr.push_back(0);
    std::vector<Feature> block_features;
    stream.run(
        [&](const TileStream::Strip& strip, const TileStream::Block&) {
            append_strip(stream, strip, *workers[static_cast<size_t>(strip.worker)]);
        },
        [&](const TileStream::Block& block) {
            const int64_t offset = sparse.indptr.back();
            std::vector<int64_t> next(static_cast<size_t>(block.n_tokens));
            for (int64_t t = 0; t < block.n_tokens; ++t) {
                next[static_cast<size_t>(t)] = sparse.indptr.back() - offset;
                int64_t end = sparse.indptr.back();
                for (const auto& worker : workers) end += worker->row_counts[static_cast<size_t>(t)];
                sparse.indptr.push_back(end);
            }
            block_features.resize(static_cast<size_t>(sparse.indptr.back() - offset));
            for (const auto& worker : workers) {
                poll();
                for (size_t i = 0; i < worker->features.size(); ++i)
                    block_features[static_cast<size_t>(next[static_cast<size_t>(worker->rows[i])]++)] =
                        worker->features[i];
                worker->features.clear();
                worker->rows.clear();
                std::fill(worker->row_counts.begin(), worker->row_counts.end(), 0);
            }
            if (stream.n_workers() > 1)
                parallel_for(stream.n_workers(), block.n_tokens, [&](int, int64_t t) {
                    const int64_t* row = sparse.indptr.data() + block.first_token + t;
                    std::sort(block_features.begin() + (row[0] - offset), block_features.begin() + (row[1] - offset),
                              [](const Feature& a, const Feature& b) { return a.column < b.column; });
                });
            for (const Feature& feature : block_features) {
                sparse.indices.push_back(columns ? static_cast<int32_t>(columns.data[feature.column]) : feature.column);
                sparse.values.push_back(feature.value);
            }
        });
    return sparse;
}

SparseRows encode_by_rows(const Encoder& encoder, const MatrixView& acts, Span<const int64_t> columns) {
    TileStream stream(encoder, {}, {acts}, RowTopK::max_block_tokens(encoder, 1));
    RowTopK top_k(stream, encoder, columns);
    SparseRows sparse;
    sparse.indptr.push_back(0);
    stream.run([&](const TileStream::Strip& strip, const TileStream::Block&) { top_k.add(strip); },
               [&](const TileStream::Block& block) {
                   top_k.finish(block.n_tokens);
                   for (int64_t t = 0; t < block.n_tokens; ++t) {
                       poll();
                       const RowTopK::Row row = top_k.row(t, 0);
                       for (int64_t i = 0; i < row.size; ++i)
                           sparse.indices.push_back(columns ? static_cast<int32_t>(columns.data[row.columns[i]])
                                                            : row.columns[i]);
                       sparse.values.insert(sparse.values.end(), row.values, row.values + row.size);
                       sparse.indptr.push_back(static_cast<int64_t>(sparse.values.size()));
                   }
                   top_k.clear();
               });
    return sparse;
}

}  // namespace
}  // namespace cpu

SparseRows encode_sparse(const Encoder& encoder, const MatrixView& acts, Span<const int64_t> columns) {
    check_activations(acts, encoder.d_in(), "acts");
    check_columns(columns, encoder.d_sae());
    check_rows(acts, "acts");
    if (acts.n_rows == 0 || (columns && columns.size == 0))
        return {std::vector<int64_t>(static_cast<size_t>(acts.n_rows) + 1), {}, {}};
    const bool topk = encoder.selects_top_k();
    encoder.check_weights(topk ? Span<const int64_t>{} : columns);
    return (topk ? cpu::encode_by_rows : cpu::encode_by_tiles)(encoder, acts, columns);
}

}  // namespace sts
