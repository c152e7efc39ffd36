#include "cpu/tile_stream.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace sts::cpu {
namespace {

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/// Threads for so many multiplications: starting one costs about as much as a few hundred thousand of them.
int workers_for(int64_t n_rows, int64_t d_in, int64_t n_columns) {
    const double products = static_cast<double>(n_rows + 16) * static_cast<double>(d_in * n_columns);
    return static_cast<int>(std::clamp(products / 1e6, 1.0, static_cast<double>(get_num_threads())));
}

/// Tokens per block: few enough for kBlockBytes, and all blocks about equally long.
int64_t tokens_per_block(int64_t n_tokens, int64_t n_columns, int n_members, int64_t d_in, int64_t most, int group) {
    // Packing W_enc again for every block must cost little beside the block's product. Where W_enc stays packed,
    // because there is but one strip, blocks that fit the cache cost less.
    const int64_t most_rows = n_columns > kStripColumns ? 4608 : 768;
    const int64_t tile_tokens = kTileRows / n_members;
    most = std::min({most, most_rows / n_members, kBlockBytes / PackedRows::token_bytes(n_members, d_in)});
    most = most >= tile_tokens ? most / tile_tokens * tile_tokens : std::max<int64_t>(most / group, 1) * group;
    const int64_t n_blocks = std::max<int64_t>(divide_up(n_tokens, most), 1);
    return std::max<int64_t>(divide_up(divide_up(n_tokens, n_blocks), group), 1) * group;
}

}  // namespace

TileStream::Workspace::Workspace(int64_t d_in) : strip(d_in * kStripColumns), values(kTileRows * kStripColumns) {}

TileStream::TileStream(const Encoder& encoder, Span<const int64_t> columns, const std::vector<MatrixView>& members,
                       int64_t max_block_tokens)
    : kernels_(tile_kernels()),
      encoder_(encoder),
      columns_(columns),
      members_(members),
      n_tokens_(members[0].n_rows),
      n_columns_(columns ? columns.size : encoder.d_sae()),
      n_workers_(workers_for(n_tokens_ * static_cast<int64_t>(members.size()), encoder.d_in(), n_columns_)),
      block_tokens_(tokens_per_block(n_tokens_, n_columns_, static_cast<int>(members.size()), encoder.d_in(),
                                     max_block_tokens, kernels_.panel_rows / static_cast<int>(members.size()))),
      rows_(kernels_, encoder.input_norm, static_cast<int>(members.size()), encoder.d_in(), block_tokens_) {
    const int64_t panels = divide_up(n_columns_, kernels_.panel_columns);
    strip_columns_ = static_cast<int>(std::clamp<int64_t>(divide_up(panels, n_workers_), 1,
                                                          kStripColumns / kernels_.panel_columns)) *
                     kernels_.panel_columns;
    for (int worker = 0; worker < n_workers_; ++worker)
        workspaces_.push_back(std::make_unique<Workspace>(encoder.d_in()));
}

int64_t TileStream::max_block_rows() const {
    return divide_up(block_tokens_, rows_.tile_tokens()) * kTileRows;
}

int64_t TileStream::packed_row(int64_t token, int member) const {
    const int64_t group = kernels_.panel_rows / static_cast<int64_t>(members_.size());
    return token / group * kernels_.panel_rows + member * group + token % group;
}

TileStream::Strip::Strip(const TileStream& stream, int worker_, int64_t strip)
    : worker(worker_),
      first_column(strip * stream.strip_columns_),
      n_columns(static_cast<int>(std::min<int64_t>(stream.strip_columns_, stream.n_columns_ - first_column))),
      stream_(stream),
      n_padded_(static_cast<int>(divide_up(n_columns, stream.kernels_.panel_columns / 2)) *
                stream.kernels_.panel_columns / 2) {
    Workspace& workspace = *stream.workspaces_[static_cast<size_t>(worker)];
    if (workspace.packed_strip == strip) return;
    workspace.packed_strip = strip;
    pack_strip(stream.kernels_, stream.encoder_, stream.columns_, first_column, n_columns, n_padded_,
               workspace.strip.data(), workspace.params);
}

Tile TileStream::Strip::tile(int64_t i) const {
    poll();
    const Workspace& workspace = *stream_.workspaces_[static_cast<size_t>(worker)];
    float* values = workspace.values.data();
    stream_.kernels_.product(stream_.rows_.tile(i), stream_.rows_.panels_in_tile(i), workspace.strip.data(),
                             stream_.encoder_.d_in(), n_padded_, values);
    return Tile{values,
                stream_.rows_.tokens_in_tile(i),
                stream_.rows_.panels_in_tile(i) * stream_.kernels_.panel_rows,
                static_cast<int>(stream_.members_.size()),
                n_padded_,
                stream_.encoder_.activation == Activation::gated,
                stream_.encoder_.activation == Activation::abstopk,
                &workspace.params};
}

void TileStream::run(const std::function<void(const Strip&, const Block&)>& on_strip,
                     const std::function<void(const Block&)>& after_block) {
    for (int64_t first = 0; first < n_tokens_; first += block_tokens_) {
        const Block block{first, std::min(block_tokens_, n_tokens_ - first)};
        rows_.pack(members_.data(), block.first_token, block.n_tokens, n_workers_);
        parallel_for(n_workers_, divide_up(n_columns_, strip_columns_),
                     [&](int worker, int64_t strip) { on_strip(Strip(*this, worker, strip), block); });
        if (after_block) after_block(block);
    }
}

}  // namespace sts::cpu
