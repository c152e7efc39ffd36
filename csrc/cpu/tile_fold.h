/// What follows the product of a tile: activation, function and column sums, compiled once per instruction
/// set. Each column folds its tokens in order into float64; vectors in which nothing fires are skipped, since
/// adding zero changes no sum.
#pragma once
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace sts::cpu::STS_ISA {
namespace {

template <class Act>
STS_INLINE Act activation_at(const StripParams& params, int column) {
    return Act{load(params.scale + column), load(params.bias + column), load(params.gate + column)};
}

/// accumulator[l] += weight * value
STS_INLINE void add_scaled(double* accumulator, const double* weights, int64_t n, double value) {
    for (int64_t k = 0; k < n; ++k) accumulator[k] += weights[k] * value;
}

/// A float64 sum per lane.
struct LaneSums {
    Doubles low, high;
    STS_INLINE void read(const double* from) {
        low = load(from);
        high = load(from + kLanes / 2);
    }
    STS_INLINE void write(double* to) const {
        store(to, low);
        store(to + kLanes / 2, high);
    }
};

STS_INLINE void add_counts(int64_t* counts, Ints fired) {
    for (int l = 0; l < kLanes; ++l) counts[l] += fired[l];
}

template <class Act, bool kFull, bool kWeighted>
void fold_shift_as(const Tile& tile, const ShiftStrip& strip) {
    constexpr int kGroup = kPanelRows / 2;
    for (int c = 0; c < tile.n_columns; c += kLanes) {
        const Act act = activation_at<Act>(*tile.params, c);
        LaneSums shift, base, other, sq_base, sq_other;
        Ints fired_base{}, fired_other{};
        shift.read(strip.sum_sq_shift + c);
        if (kFull) {
            base.read(strip.sum_base + c);
            other.read(strip.sum_other + c);
            sq_base.read(strip.sum_sq_base + c);
            sq_other.read(strip.sum_sq_other + c);
        }
        const float* panel = tile.values + c;
        for (int first = 0; first < tile.n_tokens; first += kGroup, panel += kPanelRows * kStripColumns) {
            const int n = tile.n_tokens - first < kGroup ? tile.n_tokens - first : kGroup;
            for (int i = 0; i < n; ++i) {
                const Floats h_a = act(load(panel + i * kStripColumns));
                const Floats h_b = act(load(panel + (i + kGroup) * kStripColumns));
                if (!nonzero(h_a + h_b)) continue;
                Doubles a_low, a_high, b_low, b_high;
                widen(h_a, a_low, a_high);
                widen(h_b, b_low, b_high);
                const Doubles d_low = b_low - a_low, d_high = b_high - a_high;
                const Doubles sq_low = d_low * d_low, sq_high = d_high * d_high;
                shift.low += sq_low;
                shift.high += sq_high;
                if (kFull) {
                    base.low += a_low;
                    base.high += a_high;
                    other.low += b_low;
                    other.high += b_high;
                    sq_base.low += a_low * a_low;
                    sq_base.high += a_high * a_high;
                    sq_other.low += b_low * b_low;
                    sq_other.high += b_high * b_high;
                    fired_base -= reinterpret_cast<Ints>(h_a > Floats{});
                    fired_other -= reinterpret_cast<Ints>(h_b > Floats{});
                }
                if (kWeighted) {
                    alignas(64) double sq[kLanes];
                    store(sq, sq_low);
                    store(sq + kLanes / 2, sq_high);
                    for (unsigned mask = nonzero(h_a + h_b); mask; mask &= mask - 1) {
                        const int l = __builtin_ctz(mask);
                        if (sq[l] != 0)
                            add_scaled(strip.weighted_sq_shift + (c + l) * strip.n_weights,
                                       strip.row_weights + (first + i) * strip.n_weights, strip.n_weights, sq[l]);
                    }
                }
            }
        }
        shift.write(strip.sum_sq_shift + c);
        if (kFull) {
            base.write(strip.sum_base + c);
            other.write(strip.sum_other + c);
            sq_base.write(strip.sum_sq_base + c);
            sq_other.write(strip.sum_sq_other + c);
            add_counts(strip.n_fired_base + c, fired_base);
            add_counts(strip.n_fired_other + c, fired_other);
        }
    }
}

template <class Act>
void fold_shift_act(const Tile& tile, const ShiftStrip& strip) {
    if (strip.sum_base && strip.weighted_sq_shift)
        fold_shift_as<Act, true, true>(tile, strip);
    else if (strip.sum_base)
        fold_shift_as<Act, true, false>(tile, strip);
    else if (strip.weighted_sq_shift)
        fold_shift_as<Act, false, true>(tile, strip);
    else
        fold_shift_as<Act, false, false>(tile, strip);
}

void fold_shift(const Tile& tile, const ShiftStrip& strip) {
    tile.gated ? fold_shift_act<Gated<Floats>>(tile, strip) : fold_shift_act<JumpRelu<Floats>>(tile, strip);
}

template <class Act, bool kTargets>
void fold_moments_as(const Tile& tile, const MomentStrip& strip) {
    for (int c = 0; c < tile.n_columns; c += kLanes) {
        const Act act = activation_at<Act>(*tile.params, c);
        LaneSums sum, sq;
        Ints fired{};
        sum.read(strip.sum_h + c);
        sq.read(strip.sum_sq_h + c);
        for (int t = 0; t < tile.n_tokens; ++t) {
            const Floats h = act(load(tile.values + t * kStripColumns + c));
            unsigned mask = nonzero(h);
            if (!mask) continue;
            Doubles low, high;
            widen(h, low, high);
            sum.low += low;
            sum.high += high;
            sq.low += low * low;
            sq.high += high * high;
            fired -= reinterpret_cast<Ints>(h > Floats{});
            if (kTargets) {
                alignas(64) float value[kLanes];
                store(value, h);
                for (; mask; mask &= mask - 1) {
                    const int l = __builtin_ctz(mask);
                    add_scaled(strip.sum_hy + (c + l) * strip.n_targets, strip.targets + t * strip.n_targets,
                               strip.n_targets, value[l]);
                }
            }
        }
        sum.write(strip.sum_h + c);
        sq.write(strip.sum_sq_h + c);
        add_counts(strip.n_fired + c, fired);
    }
}

template <class Act>
void fold_moments_act(const Tile& tile, const MomentStrip& strip) {
    strip.sum_hy ? fold_moments_as<Act, true>(tile, strip) : fold_moments_as<Act, false>(tile, strip);
}

void fold_moments(const Tile& tile, const MomentStrip& strip) {
    tile.gated ? fold_moments_act<Gated<Floats>>(tile, strip) : fold_moments_act<JumpRelu<Floats>>(tile, strip);
}

STS_INLINE int append_active(Floats h, int column, int32_t* columns, float* values, int n) {
    unsigned mask = nonzero(h);
    if (!mask) return n;
    alignas(64) float value[kLanes];
    store(value, h);
    for (; mask; mask &= mask - 1, ++n) {
        const int l = __builtin_ctz(mask);
        columns[n] = column + l;
        values[n] = value[l];
    }
    return n;
}

template <class Act>
void select_as(const Tile& tile, SelectedTile& selected) {
    int n = 0;
    for (int r = 0; r < tile.n_tokens; ++r) {
        const int before = n;
        for (int c = 0; c < tile.n_columns; c += kLanes)
            n = append_active(activation_at<Act>(*tile.params, c)(load(tile.values + r * kStripColumns + c)), c,
                              selected.columns, selected.values, n);
        selected.row_counts[r] = n - before;
    }
}

template <class Act>
void select_candidates(const Tile& tile, const float* row_thresholds, SelectedTile& selected) {
    const int group = kPanelRows / tile.n_members;
    int n = 0;
    for (int r = 0; r < tile.n_rows; ++r) {
        const int before = n;
        // A row of padding has the token number of a row past the end.
        if (r / kPanelRows * group + r % group < tile.n_tokens) {
            const Floats threshold = Floats{} + row_thresholds[r];
            for (int c = 0; c < tile.n_columns; c += kLanes) {
                const Act act{load(tile.params->scale + c), load(tile.params->bias + c), threshold};
                n = append_active(act(load(tile.values + r * kStripColumns + c)), c, selected.columns, selected.values,
                                  n);
            }
        }
        selected.row_counts[r] = n - before;
    }
}

void select(const Tile& tile, const float* row_thresholds, SelectedTile& selected) {
    if (row_thresholds)
        (tile.absolute ? select_candidates<AbsTopKCandidate<Floats>>
                       : select_candidates<TopKCandidate<Floats>>)(tile, row_thresholds, selected);
    else
        (tile.gated ? select_as<Gated<Floats>> : select_as<JumpRelu<Floats>>)(tile, selected);
}

}  // namespace
}  // namespace sts::cpu::STS_ISA
