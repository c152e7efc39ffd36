#pragma once
#include <sts/sae_ops.h>

#include <functional>
#include <vector>

#include "cpu/tile_stream.h"

namespace sts::cpu {

/// The exact k largest positive values of each row of a block, or the k largest absolute values for abstopk, found
/// while its products stream by: each worker keeps at most 2k + one strip of candidates per row, and the k-th largest
/// that it has seen filters what follows.
class RowTopK {
  public:
    /// The stream runs over all columns; `columns`, where given, says which of them the rows keep in the end.
    RowTopK(const TileStream& stream, const Encoder& encoder, Span<const int64_t> columns);

    /// The most tokens a block may hold so that a worker's candidates stay within a few megabytes.
    static int64_t max_block_tokens(const Encoder& encoder, int n_members);

    void clear();
    void add(const TileStream::Strip& strip);
    /// After all strips: fixes every row's list.
    void finish(int64_t n_tokens);

    struct Row {
        const int32_t* columns;  ///< ascending, counted among `columns` where that was given
        const float* values;     ///< != 0
        int64_t size;
    };
    Row row(int64_t token, int member) const;

  private:
    struct Candidate {
        float value;
        int32_t column;
    };
    struct Worker {
        std::vector<Candidate> candidates;  ///< [max_rows, capacity], a row's in ascending order of columns
        std::vector<int32_t> counts;
        std::vector<float> thresholds;
        std::vector<uint32_t> scratch;
        SelectedTile selected;
    };
    /// Keeps the k largest (by absolute value) of n > k candidates in ascending order of columns, of equal ones the
    /// first. Returns the k-th largest absolute value.
    float keep_largest(Candidate* candidates, int64_t n, std::vector<uint32_t>& scratch) const;
    void store_row(int64_t packed_row, const Candidate* candidates, int64_t n);
    static int64_t capacity(int64_t k, int64_t d_sae);

    const TileStream& stream_;
    const int64_t k_, capacity_, max_rows_;
    std::vector<int32_t> output_columns_;  ///< [d_sae] place in `columns`, -1 where unwanted; empty: all wanted
    std::vector<std::unique_ptr<Worker>> workers_;
    std::vector<int32_t> columns_;  ///< [max_rows, k]
    std::vector<float> values_;
    std::vector<int32_t> sizes_;
};

}  // namespace sts::cpu
