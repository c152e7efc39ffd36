#include <sts/check.h>
#include <sts/sae_ops.h>

#include <algorithm>
#include <atomic>
#include <mutex>

#include "cpu/parallel.h"
#include "scan.h"

namespace sts {
namespace {

/// A parameter of the encoder as it was given, or `fallback` everywhere where it was not.
std::vector<float> column_values(std::vector<float> given, int64_t d_sae, float fallback, const char* name) {
    if (given.empty()) given.assign(static_cast<size_t>(d_sae), fallback);
    check_size(static_cast<int64_t>(given.size()), d_sae, name);
    for (size_t j = 0; j < given.size(); ++j)
        check(given[j] == given[j], std::string(name) + " contains a NaN at column " + std::to_string(j));
    return given;
}

std::vector<float> gate_values(Activation activation, std::vector<float> threshold, std::vector<float> gate_bias,
                               int64_t d_sae) {
    if (activation == Activation::gated) return column_values(std::move(gate_bias), d_sae, 0, "gate_bias");
    std::vector<float> gate = column_values(std::move(threshold), d_sae, 0, "threshold");
    for (float& value : gate) value = std::max(value, 0.0f);
    return gate;
}

}  // namespace

struct Encoder::CheckedColumns {
    std::mutex mutex;
    std::vector<bool> is_checked;
    int64_t n_left;
};

Encoder::Encoder(MatrixView W, Activation act, std::vector<float> bias_, std::vector<float> scale_,
                 std::vector<float> threshold, std::vector<float> gate_bias, int64_t k_, InputNorm norm)
    : W_enc(W),
      activation(act),
      k(k_),
      input_norm(norm),
      bias(column_values(std::move(bias_), W.n_cols, 0, "bias")),
      scale(column_values(std::move(scale_), W.n_cols, 1, "scale")),
      gate(gate_values(act, std::move(threshold), std::move(gate_bias), W.n_cols)),
      checked_(new CheckedColumns{{}, std::vector<bool>(static_cast<size_t>(W.n_cols)), W.n_cols}) {
    check(W.n_rows >= 1 && W.n_cols >= 1, "W_enc must be [d_in, d_sae] with at least one row and one column, got [" +
                                              std::to_string(W.n_rows) + ", " + std::to_string(W.n_cols) + "]");
    check_extent(W, "W_enc");
    check(W.n_cols <= INT32_MAX, "W_enc must have fewer than 2^31 columns, got " + std::to_string(W.n_cols));
    check(W.row_stride == 1 || W.col_stride == 1,
          "W_enc must be contiguous along its rows or its columns, got element strides of " +
              std::to_string(W.row_stride) + " and " + std::to_string(W.col_stride));
    if (selects_top_k())
        check(k >= 1 && k <= W.n_cols, "k must lie in [1, d_sae = " + std::to_string(W.n_cols) + "] for " +
                                           (act == Activation::topk ? "topk" : "abstopk") + ", got " +
                                           std::to_string(k));
    check(norm != InputNorm::layer_norm || W.n_rows >= 2,
          "input_norm cannot be layer_norm where d_in is 1: a single value has no standard deviation");
}

Encoder::~Encoder() = default;

void Encoder::check_weights(Span<const int64_t> columns) const {
    const std::lock_guard<std::mutex> lock(checked_->mutex);
    if (checked_->n_left == 0) return;
    std::vector<int64_t> todo;
    const int64_t n = columns ? columns.size : d_sae();
    for (int64_t i = 0; i < n; ++i) {
        const int64_t j = columns ? columns.data[i] : i;
        if (!checked_->is_checked[static_cast<size_t>(j)]) todo.push_back(j);
    }
    constexpr int64_t kPart = 512;
    const int64_t n_todo = static_cast<int64_t>(todo.size());
    std::atomic<int64_t> bad{d_sae()};
    const auto found = [&](int64_t j) {
        for (int64_t seen = bad; j < seen && !bad.compare_exchange_weak(seen, j);) {
        }
    };
    MatrixView transposed = W_enc;
    std::swap(transposed.n_rows, transposed.n_cols);
    std::swap(transposed.row_stride, transposed.col_stride);
    const auto scan = [&](int, int64_t part) {
        const int64_t first = part * kPart, end = std::min(n_todo, first + kPart);
        if (W_enc.col_stride != 1) {
            for (int64_t i = first; i < end; ++i)
                if (!row_is_finite(transposed, todo[static_cast<size_t>(i)])) found(todo[static_cast<size_t>(i)]);
            return;
        }
        for (int64_t i = first; i < end;) {
            const int64_t j = todo[static_cast<size_t>(i)];
            int64_t run = 1;
            while (i + run < end && todo[static_cast<size_t>(i + run)] == j + run) ++run;
            for (int64_t r = 0; r < d_in(); ++r)
                if (!run_is_finite(W_enc, r, j, run)) found(j + first_not_finite(W_enc, r, j));
            i += run;
        }
    };
    cpu::parallel_for(n_todo * d_in() > (1 << 21) ? get_num_threads() : 1, (n_todo + kPart - 1) / kPart, scan);
    check(bad == d_sae(), "W_enc contains a NaN or infinity in column " + std::to_string(bad));
    for (const int64_t j : todo) checked_->is_checked[static_cast<size_t>(j)] = true;
    checked_->n_left -= n_todo;
}

}  // namespace sts
