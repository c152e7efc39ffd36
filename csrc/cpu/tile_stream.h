#pragma once
#include <sts/sae_ops.h>

#include <functional>
#include <vector>

#include "cpu/pack.h"
#include "cpu/tile.h"

namespace sts::cpu {

/// Walks over x · W_enc tile by tile: blocks of tokens in order; within a block strips of columns, each owned
/// by one worker; within a strip tiles of tokens in order. No product outlives its tile.
class TileStream {
  public:
    /// `columns` null: all of them. A block holds at most max_block_tokens.
    TileStream(const Encoder& encoder, Span<const int64_t> columns, const std::vector<MatrixView>& members,
               int64_t max_block_tokens);

    struct Block {
        int64_t first_token, n_tokens;
    };

    class Strip {
      public:
        const int worker;
        const int64_t first_column;  ///< counted among the columns asked for
        const int n_columns;

        int64_t n_tiles() const { return stream_.rows_.n_tiles(); }
        /// First token of the tile, counted within the block.
        int64_t first_token(int64_t tile) const { return tile * stream_.rows_.tile_tokens(); }
        /// First packed row of the tile, counted within the block.
        int64_t first_row(int64_t tile) const { return tile * kTileRows; }
        /// Computes a tile; it holds until the next one is computed.
        Tile tile(int64_t i) const;

      private:
        friend class TileStream;
        Strip(const TileStream& stream, int worker, int64_t strip);
        const TileStream& stream_;
        const int n_padded_;
    };

    const TileKernels& kernels() const { return kernels_; }
    int n_members() const { return static_cast<int>(members_.size()); }
    int n_workers() const { return n_workers_; }
    /// Upper bound on the packed rows of a block.
    int64_t max_block_rows() const;
    /// Where token t of a member of the block lies among the packed rows.
    int64_t packed_row(int64_t token, int member) const;

    /// Calls on_strip for every strip of a block, from the workers, and then after_block.
    void run(const std::function<void(const Strip&, const Block&)>& on_strip,
             const std::function<void(const Block&)>& after_block = {});

  private:
    struct Workspace {
        explicit Workspace(int64_t d_in);
        FloatBuffer strip, values;
        StripParams params;
        int64_t packed_strip = -1;  ///< what `strip` and `params` hold
    };

    const TileKernels& kernels_;
    const Encoder& encoder_;
    const Span<const int64_t> columns_;
    const std::vector<MatrixView> members_;
    const int64_t n_tokens_, n_columns_;
    const int n_workers_;
    int strip_columns_;
    int64_t block_tokens_;
    PackedRows rows_;
    std::vector<std::unique_ptr<Workspace>> workspaces_;
};

/// Bytes of packed rows that a block may take.
constexpr int64_t kBlockBytes = int64_t{20} << 20;

}  // namespace sts::cpu
