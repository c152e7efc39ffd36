#pragma once
#include <sts/sae_ops.h>

#include <new>
#include <vector>

#include "cpu/tile.h"

namespace sts::cpu {

/// Zero-initialised nowhere: packing writes all that is read. Aligned for any vector.
class FloatBuffer {
  public:
    explicit FloatBuffer(int64_t size);
    float* data() const { return data_.get(); }

  private:
    struct Free {
        std::align_val_t alignment;
        void operator()(float* data) const;
    };
    std::unique_ptr<float, Free> data_;
};

/// A block of tokens, normalised, as float32 tiles: [tile][block of kBlockK][row of the tile][kRowStride], the rows of
/// one panel and then the next; see Tile for the order of the rows.
class PackedRows {
  public:
    PackedRows(const TileKernels& kernels, InputNorm norm, int n_members, int64_t d_in, int64_t max_tokens);

    /// Bytes that one token takes.
    static int64_t token_bytes(int n_members, int64_t d_in);

    /// Packs the tokens [first, first + n) of every member.
    void pack(const MatrixView* members, int64_t first, int64_t n, int n_workers);

    int64_t n_tokens() const { return n_tokens_; }
    int64_t n_tiles() const { return (n_tokens_ + tile_tokens() - 1) / tile_tokens(); }
    int tile_tokens() const { return kTileRows / n_members_; }
    int tokens_in_tile(int64_t tile) const;
    int panels_in_tile(int64_t tile) const;
    const float* tile(int64_t i) const { return buffer_.data() + i * tile_floats_; }

  private:
    void pack_tile(const MatrixView* members, int64_t first, int64_t tile) const;

    const InputNorm norm_;
    const int panel_rows_, n_members_, group_;
    const int64_t d_in_, tile_floats_;
    int64_t n_tokens_ = 0;
    FloatBuffer buffer_;
};

/// Packs the columns [first, first + n) of the encoder (entries of `columns` where that is given), padded to
/// n_padded with columns that never fire: panels as [block of kBlockK][panel][row][panel_columns].
void pack_strip(const TileKernels& kernels, const Encoder& encoder, Span<const int64_t> columns, int64_t first, int n,
                int n_padded, float* strip, StripParams& params);

}  // namespace sts::cpu
