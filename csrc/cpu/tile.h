#pragma once
#include <cstdint>

namespace sts::cpu {

/// Products are summed over blocks of this many elements of d_in, whatever the instruction set and the
/// shapes, so that a feature's value depends on nothing but its row and its column.
constexpr int kBlockK = 256;
/// Packed rows lie this far apart: the pad keeps the rows of one panel out of each other's cache sets.
constexpr int kRowStride = kBlockK + 16;
/// Rows of one tile: a multiple of every kernel's panel_rows, even halved.
constexpr int kTileRows = 192;
/// Columns of one strip of W_enc, at most: a multiple of every kernel's panel_columns.
constexpr int kStripColumns = 128;

/// The encoder's vectors for one strip, padded with columns that never fire.
struct StripParams {
    alignas(64) float scale[kStripColumns];
    alignas(64) float bias[kStripColumns];
    alignas(64) float gate[kStripColumns];  ///< gate_bias if gated, else max(threshold, 0)
};

/// The products of one tile: row r, column c is values[r * kStripColumns + c].
///
/// Packed rows come in panels of panel_rows. With two members (base and other) a panel holds first panel_rows
/// / 2 rows of base, then the same tokens' rows of other.
struct Tile {
    const float* values;
    int n_tokens;          ///< tokens in this tile
    int n_rows;            ///< packed rows, those of padding included
    int n_members;         ///< 1, or 2 for paired rows
    int n_columns;         ///< padded to half of panel_columns
    bool gated, absolute;  ///< the activation is gated, abstopk
    const StripParams* params;
};

/// Accumulators of one strip, kStripColumns entries each; all but sum_sq_shift may be null together.
struct ShiftStrip {
    double *sum_sq_shift, *sum_base, *sum_other, *sum_sq_base, *sum_sq_other;
    int64_t *n_fired_base, *n_fired_other;
    double* weighted_sq_shift;  ///< [strip columns, n_weights], or null
    const double* row_weights;  ///< [tile tokens, n_weights]
    int64_t n_weights;
};

struct MomentStrip {
    double *sum_h, *sum_sq_h;
    int64_t* n_fired;
    double* sum_hy;         ///< [strip columns, n_targets], or null
    const double* targets;  ///< [tile tokens, n_targets]
    int64_t n_targets;
};

/// Non-zero features of one tile, packed row by packed row (members interleaved as in Tile), columns
/// ascending.
struct SelectedTile {
    int32_t columns[kTileRows * kStripColumns];  ///< within the strip
    float values[kTileRows * kStripColumns];
    int32_t row_counts[kTileRows];
};

/// What is compiled once per instruction set.
struct TileKernels {
    const char* name;
    int panel_rows, panel_columns;

    /// Packs `depth` rows of n_columns consecutive columns, from `first` (f32 or bf16) on, as panels of panel_columns,
    /// the last one filled up with zeros to half as many or to all.
    void (*pack_run)(const void* first, bool is_bfloat16, int64_t row_stride, int n_columns, int64_t depth,
                     float* panels);
    /// values[r, c] = sum_k rows[r, k] * strip[k, c] for n_panels panels of rows; see pack.h for both
    /// layouts.
    void (*product)(const float* rows, int64_t n_panels, const float* strip, int64_t d_in, int n_columns,
                    float* values);
    void (*fold_shift)(const Tile& tile, const ShiftStrip& sums);
    void (*fold_moments)(const Tile& tile, const MomentStrip& sums);
    /// With row_thresholds (one per packed row, for topk and abstopk) a feature must exceed its row's threshold
    /// instead.
    void (*select)(const Tile& tile, const float* row_thresholds, SelectedTile& selected);
};

extern const TileKernels kTilePortable, kTileAvx2, kTileAvx512;

/// The kernels in use; an op asks once, so that all of its tiles agree.
const TileKernels& tile_kernels();

}  // namespace sts::cpu
