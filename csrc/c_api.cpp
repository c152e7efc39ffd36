#include <sts/c_api.h>
#include <sts/check.h>
#include <sts/sae_ops.h>

#include <exception>
#include <new>

using sts::check;
using sts::MatrixView;
using sts::Span;
using sts::Table;

struct sts_encoder {
    sts::Encoder core;
};
struct sts_sparse_rows {
    sts::SparseRows core;
};

namespace {

thread_local std::string last_error;

sts_status failed(sts_status status, const char* sentence) noexcept {
    try {
        last_error = sentence;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

/// Runs an op, from which no exception may reach C.
template <class Op>
sts_status run(const Op& op) noexcept {
    try {
        op();
        return STS_OK;
    } catch (const std::invalid_argument& error) {
        return failed(STS_INVALID_ARGUMENT, error.what());
    } catch (const std::bad_alloc&) {
        return failed(STS_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception& error) {
        return failed(STS_FAILED, error.what());
    } catch (...) {
        return failed(STS_FAILED, "an error without a description");
    }
}

template <class T>
void check_given(const T* pointer, const char* name) {
    check(pointer != nullptr, std::string(name) + " must not be NULL");
}

MatrixView view(const sts_matrix* matrix, const char* name) {
    check_given(matrix, name);
    check(matrix->n_rows >= 0 && matrix->n_cols >= 0, std::string(name) + " must have no negative size, got [" +
                                                          std::to_string(matrix->n_rows) + ", " +
                                                          std::to_string(matrix->n_cols) + "]");
    check(matrix->dtype == STS_FLOAT32 || matrix->dtype == STS_BFLOAT16,
          std::string(name) + " must be STS_FLOAT32 or STS_BFLOAT16, got dtype " +
              std::to_string(static_cast<int>(matrix->dtype)));
    check(matrix->data || matrix->n_rows == 0 || matrix->n_cols == 0, std::string(name) + " must have data, got NULL");
    return {matrix->data,       matrix->dtype == STS_FLOAT32 ? sts::DType::float32 : sts::DType::bfloat16,
            matrix->n_rows,     matrix->n_cols,
            matrix->row_stride, matrix->col_stride};
}

Span<const int64_t> chosen(const int64_t* columns, int64_t n_columns) {
    check(columns ? n_columns >= 0 : n_columns == 0,
          "n_columns must be 0 where columns is NULL and not negative elsewhere, got " + std::to_string(n_columns));
    return {columns, n_columns};
}

/// [n_rows, n_cols], null where it is not given; `count` is the name of n_cols.
template <class T>
Table<T> table(T* values, int64_t n_rows, int64_t n_cols, const char* count) {
    check(n_cols >= 0, std::string(count) + " must not be negative, got " + std::to_string(n_cols));
    return values ? Table<T>{values, n_rows, n_cols} : Table<T>{};
}

std::vector<float> copied(const float* values, int64_t n, const char* name, bool belongs, bool required) {
    check(values || !required, std::string(name) + " must be given, got NULL");
    check(!values || belongs, std::string(name) + " does not belong to this activation, and must be NULL");
    return values ? std::vector<float>(values, values + n) : std::vector<float>();
}

sts::Activation named(sts_activation activation) {
    switch (activation) {
        case STS_RELU:
            return sts::Activation::relu;
        case STS_JUMPRELU:
            return sts::Activation::jumprelu;
        case STS_GATED:
            return sts::Activation::gated;
        case STS_TOPK:
            return sts::Activation::topk;
        case STS_ABSTOPK:
            return sts::Activation::abstopk;
    }
    throw std::invalid_argument("activation must be one of sts_activation, got " +
                                std::to_string(static_cast<int>(activation)));
}

sts::InputNorm named(sts_input_norm input_norm) {
    switch (input_norm) {
        case STS_NO_NORM:
            return sts::InputNorm::none;
        case STS_LAYER_NORM:
            return sts::InputNorm::layer_norm;
        case STS_CONSTANT_NORM_RESCALE:
            return sts::InputNorm::constant_norm_rescale;
    }
    throw std::invalid_argument("input_norm must be one of sts_input_norm, got " +
                                std::to_string(static_cast<int>(input_norm)));
}

}  // namespace

int32_t sts_c_api_version(void) {
    return STS_C_API_VERSION;
}

const char* sts_last_error(void) {
    return last_error.c_str();
}

sts_status sts_encoder_create(const sts_matrix* W_enc, sts_activation activation, const float* bias, const float* scale,
                              const float* threshold, const float* gate_bias, int64_t k, sts_input_norm input_norm,
                              sts_encoder** encoder) {
    return run([&] {
        check_given(encoder, "encoder");
        *encoder = nullptr;
        const MatrixView weights = view(W_enc, "W_enc");
        const sts::Activation act = named(activation);
        const sts::InputNorm norm = named(input_norm);
        const bool jumprelu = activation == STS_JUMPRELU, gated = activation == STS_GATED;
        check(activation == STS_TOPK || activation == STS_ABSTOPK || k == 0,
              "k must be 0 but for STS_TOPK and STS_ABSTOPK, got " + std::to_string(k));
        *encoder = new sts_encoder{{weights, act, copied(bias, weights.n_cols, "bias", true, true),
                                    copied(scale, weights.n_cols, "scale", true, false),
                                    copied(threshold, weights.n_cols, "threshold", jumprelu, jumprelu),
                                    copied(gate_bias, weights.n_cols, "gate_bias", gated, gated), k, norm}};
    });
}

void sts_encoder_free(sts_encoder* encoder) {
    delete encoder;
}

sts_status sts_encode_sparse(const sts_encoder* encoder, const sts_matrix* acts, const int64_t* columns,
                             int64_t n_columns, sts_sparse_rows** rows) {
    return run([&] {
        check_given(rows, "rows");
        *rows = nullptr;
        check_given(encoder, "encoder");
        *rows = new sts_sparse_rows{sts::encode_sparse(encoder->core, view(acts, "acts"), chosen(columns, n_columns))};
    });
}

const int64_t* sts_sparse_rows_indptr(const sts_sparse_rows* rows) {
    return rows->core.indptr.data();
}
const int32_t* sts_sparse_rows_indices(const sts_sparse_rows* rows) {
    return rows->core.indices.data();
}
const float* sts_sparse_rows_values(const sts_sparse_rows* rows) {
    return rows->core.values.data();
}

void sts_sparse_rows_free(sts_sparse_rows* rows) {
    delete rows;
}

sts_status sts_accumulate_shift(const sts_encoder* encoder, const sts_matrix* base, const sts_matrix* other,
                                const int64_t* columns, int64_t n_columns, const double* row_weights, int64_t n_weights,
                                const sts_shift_sums* sums) {
    return run([&] {
        check_given(encoder, "encoder");
        check_given(sums, "sums");
        check_given(sums->sum_sq_shift, "sum_sq_shift");
        const MatrixView base_acts = view(base, "base"), other_acts = view(other, "other");
        const Span<const int64_t> numbers = chosen(columns, n_columns);
        const int64_t n = numbers ? numbers.size : encoder->core.d_sae();
        const auto doubles = [&](double* data) { return Span<double>{data, data ? n : 0}; };
        const auto counts = [&](int64_t* data) { return Span<int64_t>{data, data ? n : 0}; };
        sts::accumulate_shift(encoder->core, base_acts, other_acts, numbers,
                              table(row_weights, base_acts.n_rows, n_weights, "n_weights"),
                              {doubles(sums->sum_sq_shift), doubles(sums->sum_base), doubles(sums->sum_other),
                               doubles(sums->sum_sq_base), doubles(sums->sum_sq_other), counts(sums->n_fired_base),
                               counts(sums->n_fired_other), table(sums->weighted_sq_shift, n, n_weights, "n_weights")});
    });
}

sts_status sts_accumulate_moments(const sts_encoder* encoder, const sts_matrix* acts, const int64_t* columns,
                                  int64_t n_columns, const double* targets, int64_t n_targets,
                                  const sts_moment_sums* sums) {
    return run([&] {
        check_given(encoder, "encoder");
        check_given(sums, "sums");
        check_given(sums->sum_h, "sum_h");
        check_given(sums->sum_sq_h, "sum_sq_h");
        check_given(sums->n_fired, "n_fired");
        const MatrixView rows = view(acts, "acts");
        const Span<const int64_t> numbers = chosen(columns, n_columns);
        const int64_t n = numbers ? numbers.size : encoder->core.d_sae();
        sts::accumulate_moments(encoder->core, rows, numbers, table(targets, rows.n_rows, n_targets, "n_targets"),
                                {{sums->sum_h, n},
                                 {sums->sum_sq_h, n},
                                 {sums->n_fired, n},
                                 table(sums->sum_hy, n, n_targets, "n_targets")});
    });
}

sts_status sts_set_num_threads(int32_t n) {
    return run([&] { sts::set_num_threads(n); });
}
