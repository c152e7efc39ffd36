#include "cpu/row_top_k.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "cpu/parallel.h"

namespace sts::cpu {
namespace {

/// The bits of |value|, which order as absolute values do.
uint32_t size_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffff;
}

}  // namespace

float RowTopK::keep_largest(Candidate* candidates, int64_t n, std::vector<uint32_t>& scratch) const {
    // One pass over 256 bins of the sizes finds the few among which the k-th largest must be sought: three times faster
    // than a selection among all.
    constexpr int kBins = 256;
    uint32_t low = UINT32_MAX, high = 0;
    for (int64_t i = 0; i < n; ++i) {
        low = std::min(low, size_of(candidates[i].value));
        high = std::max(high, size_of(candidates[i].value));
    }
    int shift = 0;
    while ((high - low) >> shift >= kBins) ++shift;
    int32_t counts[kBins] = {};
    for (int64_t i = 0; i < n; ++i) ++counts[(size_of(candidates[i].value) - low) >> shift];
    int64_t rank = k_;  // of the k-th within its bin
    uint32_t bin = kBins - 1;
    for (; rank > counts[bin]; --bin) rank -= counts[bin];
    scratch.clear();
    for (int64_t i = 0; i < n; ++i)
        if ((size_of(candidates[i].value) - low) >> shift == bin) scratch.push_back(size_of(candidates[i].value));
    std::nth_element(scratch.begin(), scratch.begin() + (rank - 1), scratch.end(), std::greater<>());
    const uint32_t kth = scratch[static_cast<size_t>(rank - 1)];
    int64_t n_equal = std::count(scratch.begin(), scratch.begin() + rank, kth);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
        const Candidate candidate = candidates[i];
        candidates[kept] = candidate;
        if (size_of(candidate.value) == kth)
            kept += n_equal-- > 0;
        else
            kept += size_of(candidate.value) > kth;
    }
    float threshold;
    std::memcpy(&threshold, &kth, sizeof threshold);
    return threshold;
}

int64_t RowTopK::capacity(int64_t k, int64_t d_sae) {
    return std::min(2 * k, d_sae) + kStripColumns;
}

int64_t RowTopK::max_block_tokens(const Encoder& encoder, int n_members) {
    constexpr int64_t kWorkerBytes = int64_t{6} << 20;
    const int64_t row_bytes = capacity(encoder.k, encoder.d_sae()) * static_cast<int64_t>(sizeof(Candidate));
    return std::max<int64_t>(kWorkerBytes / (row_bytes * n_members), 1);
}

RowTopK::RowTopK(const TileStream& stream, const Encoder& encoder, Span<const int64_t> columns)
    : stream_(stream),
      k_(encoder.k),
      capacity_(capacity(encoder.k, encoder.d_sae())),
      max_rows_(stream.max_block_rows()),
      output_columns_(columns ? static_cast<size_t>(encoder.d_sae()) : 0, -1) {
    for (int64_t i = 0; i < columns.size; ++i)
        output_columns_[static_cast<size_t>(columns.data[i])] = static_cast<int32_t>(i);
    const size_t n = static_cast<size_t>(max_rows_);
    for (int i = 0; i < stream.n_workers(); ++i) {
        workers_.push_back(std::make_unique<Worker>());
        workers_.back()->candidates.resize(n * static_cast<size_t>(capacity_));
        workers_.back()->counts.resize(n);
        workers_.back()->thresholds.resize(n);
    }
    columns_.resize(n * static_cast<size_t>(k_));
    values_.resize(n * static_cast<size_t>(k_));
    sizes_.resize(n);
}

void RowTopK::clear() {
    for (auto& worker : workers_) {
        std::fill(worker->counts.begin(), worker->counts.end(), 0);
        // Zero never counts, so a row's threshold starts there.
        std::fill(worker->thresholds.begin(), worker->thresholds.end(), 0.0f);
    }
}

void RowTopK::add(const TileStream::Strip& strip) {
    Worker& worker = *workers_[static_cast<size_t>(strip.worker)];
    for (int64_t i = 0; i < strip.n_tiles(); ++i) {
        const int64_t first_row = strip.first_row(i);
        const Tile tile = strip.tile(i);
        stream_.kernels().select(tile, worker.thresholds.data() + first_row, worker.selected);
        const int32_t* column = worker.selected.columns;
        const float* value = worker.selected.values;
        const int64_t end_row = first_row + tile.n_rows;
        for (int64_t r = first_row; r < end_row; ++r) {
            const int n = worker.selected.row_counts[r - first_row];
            if (n == 0) continue;
            Candidate* candidates = worker.candidates.data() + r * capacity_;
            int32_t& count = worker.counts[static_cast<size_t>(r)];
            for (int j = 0; j < n; ++j)
                candidates[count++] = {*value++, static_cast<int32_t>(strip.first_column) + *column++};
            if (count > capacity_ - kStripColumns) {
                // A worker's strips come in ascending order, so a later value equal to the k-th cannot
                // replace it.
                worker.thresholds[static_cast<size_t>(r)] = keep_largest(candidates, count, worker.scratch);
                count = static_cast<int32_t>(k_);
            }
        }
    }
}

void RowTopK::finish(int64_t n_tokens) {
    const int64_t n_rows = stream_.packed_row(n_tokens - 1, stream_.n_members() - 1) + 1;
    std::vector<std::vector<Candidate>> rows(workers_.size());
    constexpr int64_t kRows = 16;
    parallel_for(static_cast<int>(workers_.size()), (n_rows + kRows - 1) / kRows, [&](int worker, int64_t part) {
        std::vector<Candidate>& row = rows[static_cast<size_t>(worker)];
        std::vector<uint32_t>& scratch = workers_[static_cast<size_t>(worker)]->scratch;
        for (int64_t r = part * kRows; r < std::min(n_rows, (part + 1) * kRows); ++r) {
            row.clear();
            for (const auto& from : workers_) {
                const auto begin = from->candidates.begin() + r * capacity_;
                const auto middle = static_cast<std::ptrdiff_t>(row.size());
                row.insert(row.end(), begin, begin + from->counts[static_cast<size_t>(r)]);
                std::inplace_merge(row.begin(), row.begin() + middle, row.end(),
                                   [](const Candidate& a, const Candidate& b) { return a.column < b.column; });
            }
            const int64_t n = static_cast<int64_t>(row.size());
            if (n > k_) keep_largest(row.data(), n, scratch);
            store_row(r, row.data(), std::min(n, k_));
        }
    });
}

void RowTopK::store_row(int64_t r, const Candidate* candidates, int64_t n) {
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t column =
            output_columns_.empty() ? candidates[i].column : output_columns_[static_cast<size_t>(candidates[i].column)];
        if (column < 0) continue;
        columns_[static_cast<size_t>(r * k_ + size)] = column;
        values_[static_cast<size_t>(r * k_ + size)] = candidates[i].value;
        ++size;
    }
    sizes_[static_cast<size_t>(r)] = static_cast<int32_t>(size);
}

RowTopK::Row RowTopK::row(int64_t token, int member) const {
    const int64_t r = stream_.packed_row(token, member);
    return {columns_.data() + r * k_, values_.data() + r * k_, sizes_[static_cast<size_t>(r)]};
}

}  // namespace sts::cpu
