#include "cpu/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "scan.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sts::cpu {
namespace {

int64_t blocks_of(int64_t d_in) {
    return (d_in + kBlockK - 1) / kBlockK;
}

float to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
float to_float(uint16_t bits) {
    return to_float(static_cast<uint32_t>(bits) << 16);
}

template <class Bits>
void copy_floats(const Bits* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

/// sum_i (row[i] - offset)^power for a power of 1 or 2, in an order that does not depend on the machine.
template <int power, class Bits>
double sum_of_powers(const Bits* row, int64_t n, double offset) {
    constexpr int kSums = 8;
    double sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
        for (int l = 0; l < kSums; ++l) {
            const double value = to_float(row[i + l]) - offset;
            sums[l] += power == 1 ? value : value * value;
        }
    for (; i < n; ++i) {
        const double value = to_float(row[i]) - offset;
        sums[0] += power == 1 ? value : value * value;
    }
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
}

/// What the input norm makes of a row: (x - offset) * factor.
struct RowChange {
    double offset = 0, factor = 1;
    bool is_none = true;
};

template <class Bits>
RowChange change_of(const Bits* row, int64_t d_in, InputNorm norm) {
    const double n = static_cast<double>(d_in);
    if (norm == InputNorm::constant_norm_rescale) {
        const double sum_sq = sum_of_powers<2>(row, d_in, 0);
        return {0, sum_sq > 0 ? std::sqrt(n) / std::sqrt(sum_sq) : 0, false};
    }
    const double mean = sum_of_powers<1>(row, d_in, 0) / n;
    return {mean, 1 / (std::sqrt(sum_of_powers<2>(row, d_in, mean) / (n - 1)) + 1e-5), false};
}

RowChange change_of(const MatrixView& acts, int64_t row, InputNorm norm) {
    if (norm == InputNorm::none) return {};
    return acts.dtype == DType::float32 ? change_of(bits_at<uint32_t>(acts, row, 0), acts.n_cols, norm)
                                        : change_of(bits_at<uint16_t>(acts, row, 0), acts.n_cols, norm);
}

template <class Bits>
void copy_normalised(const Bits* from, int64_t n, const RowChange& change, float* to) {
    if (change.is_none) return copy_floats(from, n, to);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>((to_float(from[i]) - change.offset) * change.factor);
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

/// Four of the eight lanes of a and b.
template <int I, int J, int K, int L>
inline Four shuffle(Four a, Four b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, I, J, K, L);
#else
    typedef int32_t Lanes __attribute__((vector_size(16)));
    return __builtin_shuffle(a, b, Lanes{I, J, K, L});
#endif
}

/// to[k * to_stride + j] = from[j][k] for four columns j and n rows k.
template <class Bits>
void copy_four_columns(const Bits* const from[4], int64_t n, float* to, int64_t to_stride) {
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) {
        Four v[4];
        for (int j = 0; j < 4; ++j) copy_floats(from[j] + k, 4, reinterpret_cast<float*>(&v[j]));
        const Four a = shuffle<0, 4, 1, 5>(v[0], v[1]), b = shuffle<0, 4, 1, 5>(v[2], v[3]);
        const Four c = shuffle<2, 6, 3, 7>(v[0], v[1]), d = shuffle<2, 6, 3, 7>(v[2], v[3]);
        const auto row = [&](int64_t r) { return reinterpret_cast<Four*>(to + r * to_stride); };
        *row(k) = shuffle<0, 1, 4, 5>(a, b);
        *row(k + 1) = shuffle<2, 3, 6, 7>(a, b);
        *row(k + 2) = shuffle<0, 1, 4, 5>(c, d);
        *row(k + 3) = shuffle<2, 3, 6, 7>(c, d);
    }
    for (; k < n; ++k)
        for (int j = 0; j < 4; ++j) to[k * to_stride + j] = to_float(from[j][k]);
}

/// Columns that lie apart, of rows that are contiguous.
template <class Bits>
void pack_by_rows(const MatrixView& W, const int64_t* columns, int n, int width, int64_t start, int64_t depth,
                  float* to) {
    int64_t places[kStripColumns];
    for (int j = 0; j < n; ++j) places[j] = j / width * width * depth + j % width;
    for (int64_t k = 0; k < depth; ++k, to += width) {
        const Bits* row = bits_at<Bits>(W, start + k, 0);
        for (int j = 0; j < n; ++j) to[places[j]] = to_float(row[columns[j]]);
    }
}

template <class Bits>
void pack_by_columns(const MatrixView& W, const int64_t* columns, int n, int width, int64_t start, int64_t depth,
                     float* to) {
    for (int j = 0; j < n; j += 4) {
        // The last four may repeat a column into the padding, which never fires whatever it holds.
        const Bits* four[4];
        for (int i = 0; i < 4; ++i) four[i] = bits_at<Bits>(W, start, columns[std::min(j + i, n - 1)]);
        copy_four_columns(four, depth, to + j / width * width * depth + j % width, width);
    }
}

}  // namespace

FloatBuffer::FloatBuffer(int64_t size) {
    constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
    const size_t wanted = static_cast<size_t>(size) * sizeof(float);
    const size_t align = wanted >= kHugePage ? kHugePage : kLine;
    const size_t bytes = std::max((wanted + align - 1) / align * align, align);
    const auto alignment = static_cast<std::align_val_t>(align);
    data_ = {static_cast<float*>(::operator new(bytes, alignment)), Free{alignment}};
#if defined(__linux__)
    // Strips and rows stream by again and again: in small pages the processor looks up their places instead.
    if (align == kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
}

void FloatBuffer::Free::operator()(float* data) const {
    ::operator delete(data, alignment);
}

PackedRows::PackedRows(const TileKernels& kernels, InputNorm norm, int n_members, int64_t d_in, int64_t max_tokens)
    : norm_(norm),
      panel_rows_(kernels.panel_rows),
      n_members_(n_members),
      group_(kernels.panel_rows / n_members),
      d_in_(d_in),
      tile_floats_(blocks_of(d_in) * kTileRows * kRowStride),
      buffer_((max_tokens + tile_tokens() - 1) / tile_tokens() * tile_floats_) {}

int64_t PackedRows::token_bytes(int n_members, int64_t d_in) {
    return n_members * blocks_of(d_in) * kRowStride * static_cast<int64_t>(sizeof(float));
}

int PackedRows::tokens_in_tile(int64_t tile) const {
    return static_cast<int>(std::min<int64_t>(tile_tokens(), n_tokens_ - tile * tile_tokens()));
}

int PackedRows::panels_in_tile(int64_t tile) const {
    return (tokens_in_tile(tile) + group_ - 1) / group_;
}

void PackedRows::pack(const MatrixView* members, int64_t first, int64_t n, int n_workers) {
    n_tokens_ = n;
    parallel_for(n_workers, n_tiles(), [&](int, int64_t tile) { pack_tile(members, first, tile); });
}

void PackedRows::pack_tile(const MatrixView* members, int64_t first, int64_t tile) const {
    const int n_tokens = tokens_in_tile(tile);
    const int n_rows = panels_in_tile(tile) * panel_rows_;
    for (int r = 0; r < n_rows; ++r) {
        const MatrixView& member = members[r % panel_rows_ / group_];
        const int token = r / panel_rows_ * group_ + r % group_;
        const int64_t source = first + tile * tile_tokens() + token;
        const RowChange change = token < n_tokens ? change_of(member, source, norm_) : RowChange{};
        float* to = buffer_.data() + tile * tile_floats_ + r * kRowStride;
        for (int64_t start = 0; start < d_in_; start += kBlockK, to += n_rows * kRowStride) {
            const int64_t depth = std::min<int64_t>(kBlockK, d_in_ - start);
            if (token >= n_tokens)
                std::memset(to, 0, static_cast<size_t>(depth) * sizeof(float));
            else if (member.dtype == DType::float32)
                copy_normalised(bits_at<uint32_t>(member, source, start), depth, change, to);
            else
                copy_normalised(bits_at<uint16_t>(member, source, start), depth, change, to);
        }
    }
}

void pack_strip(const TileKernels& kernels, const Encoder& encoder, Span<const int64_t> columns, int64_t first, int n,
                int n_padded, float* strip, StripParams& params) {
    int64_t sources[kStripColumns];
    for (int j = 0; j < n; ++j) {
        sources[j] = columns ? columns.data[first + j] : first + j;
        const size_t source = static_cast<size_t>(sources[j]);
        params.scale[j] = encoder.scale[source];
        params.bias[j] = encoder.bias[source];
        params.gate[j] = encoder.gate[source];
    }
    for (int j = n; j < n_padded; ++j) {
        params.scale[j] = params.bias[j] = 0;
        params.gate[j] = std::numeric_limits<float>::infinity();
    }
    const MatrixView& W = encoder.W_enc;
    const bool is_bfloat16 = W.dtype == DType::bfloat16;
    const bool is_run = W.col_stride == 1 && sources[n - 1] - sources[0] == n - 1;
    const auto pack = W.col_stride == 1 ? is_bfloat16 ? pack_by_rows<uint16_t> : pack_by_rows<uint32_t>
                      : is_bfloat16     ? pack_by_columns<uint16_t>
                                        : pack_by_columns<uint32_t>;
    const int n_full = n / kernels.panel_columns * kernels.panel_columns;
    for (int64_t start = 0; start < W.n_rows; start += kBlockK) {
        const int64_t depth = std::min<int64_t>(kBlockK, W.n_rows - start);
        if (is_run) {
            const void* first = is_bfloat16 ? static_cast<const void*>(bits_at<uint16_t>(W, start, sources[0]))
                                            : bits_at<uint32_t>(W, start, sources[0]);
            kernels.pack_run(first, is_bfloat16, W.row_stride, n, depth, strip);
        } else {
            const int rest = n - n_full, width = n_padded - n_full;
            float* last = strip + n_full * depth;
            if (n_full) pack(W, sources, n_full, kernels.panel_columns, start, depth, strip);
            if (rest < width) std::memset(last, 0, static_cast<size_t>(depth * width) * sizeof(float));
            if (rest) pack(W, sources + n_full, rest, width, start, depth, last);
        }
        strip += depth * n_padded;
    }
}

}  // namespace sts::cpu
