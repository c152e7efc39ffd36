/// The core for C, and for every language that calls C: Rust, Go, Julia, Python's ctypes. Equations, shapes and
/// refusals are those of sts/sae_ops.h; only what differs is said here.
///
/// A function that can fail returns a status other than STS_OK, and sts_last_error() then says in one sentence which
/// argument is at fault. It changes nothing that it was given where its arguments are refused. Handles may be used by
/// any number of threads at once; each is freed once, by the function named after it. Enums are 32 bits wide.
#ifndef STS_C_API_H
#define STS_C_API_H

#include <stdint.h>

/// The semantic version of this interface. A library serves the programs that were compiled against a header of its
/// major version and of no later minor version. The major version is part of the library's name (libsts_c.so.1).
#define STS_C_API_VERSION_MAJOR 1
#define STS_C_API_VERSION_MINOR 0
#define STS_C_API_VERSION (STS_C_API_VERSION_MAJOR * 1000 + STS_C_API_VERSION_MINOR)

#if defined(_WIN32) && defined(STS_C_API_BUILD)
#define STS_C_API __declspec(dllexport)
#elif defined(_WIN32)
#define STS_C_API __declspec(dllimport)
#else
#define STS_C_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sts_status {
    STS_OK = 0,
    STS_INVALID_ARGUMENT = 1,
    STS_OUT_OF_MEMORY = 2,
    STS_FAILED = 3  ///< anything else
} sts_status;

typedef enum sts_dtype { STS_FLOAT32 = 0, STS_BFLOAT16 = 1 } sts_dtype;

typedef enum sts_activation {
    STS_RELU = 0,
    STS_JUMPRELU = 1,
    STS_GATED = 2,
    STS_TOPK = 3,
    STS_ABSTOPK = 4
} sts_activation;

typedef enum sts_input_norm { STS_NO_NORM = 0, STS_LAYER_NORM = 1, STS_CONSTANT_NORM_RESCALE = 2 } sts_input_norm;

/// A borrowed matrix; element (r, c) is data[r * row_stride + c * col_stride], strides counted in elements.
typedef struct sts_matrix {
    const void* data;
    sts_dtype dtype;
    int64_t n_rows, n_cols;
    int64_t row_stride, col_stride;
} sts_matrix;

/// STS_C_API_VERSION of the library, where the macro is that of the header.
STS_C_API int32_t sts_c_api_version(void);

/// The sentence about the last failure on this thread, which owns the memory; "" before the first.
STS_C_API const char* sts_last_error(void);

typedef struct sts_encoder sts_encoder;

/// W_enc                             [d_in, d_sae]  borrowed: it must outlive the encoder
/// bias, scale, threshold, gate_bias  [d_sae]        copied; scale may be NULL, threshold is NULL but for STS_JUMPRELU,
///                                                  gate_bias but for STS_GATED
/// k                                                0 but for STS_TOPK and STS_ABSTOPK
/// encoder                                          the new one, or NULL after a failure
STS_C_API sts_status sts_encoder_create(const sts_matrix* W_enc, sts_activation activation, const float* bias,
                                        const float* scale, const float* threshold, const float* gate_bias, int64_t k,
                                        sts_input_norm input_norm, sts_encoder** encoder);
STS_C_API void sts_encoder_free(sts_encoder* encoder);

/// In all ops `columns` is NULL with n_columns 0 for all features of the SAE, or [n_columns] strictly increasing
/// numbers of them; accumulators then have n_columns entries instead of d_sae. acts, base and other are [n_tokens,
/// d_in]. Accumulators are added to in place, must not overlap and are zeroed by the caller once.

/// The active features of each row, as compressed sparse rows.
typedef struct sts_sparse_rows sts_sparse_rows;

/// rows  the new ones, or NULL after a failure
STS_C_API sts_status sts_encode_sparse(const sts_encoder* encoder, const sts_matrix* acts, const int64_t* columns,
                                       int64_t n_columns, sts_sparse_rows** rows);
STS_C_API const int64_t* sts_sparse_rows_indptr(const sts_sparse_rows* rows);   ///< [n_tokens + 1]
STS_C_API const int32_t* sts_sparse_rows_indices(const sts_sparse_rows* rows);  ///< [indptr[n_tokens]]
STS_C_API const float* sts_sparse_rows_values(const sts_sparse_rows* rows);     ///< [indptr[n_tokens]]
STS_C_API void sts_sparse_rows_free(sts_sparse_rows* rows);

typedef struct sts_shift_sums {
    double* sum_sq_shift;
    double *sum_base, *sum_other, *sum_sq_base, *sum_sq_other;  ///< these and the two below: all given or all NULL
    int64_t *n_fired_base, *n_fired_other;
    double* weighted_sq_shift;  ///< [n_columns, n_weights], or NULL
} sts_shift_sums;

/// row_weights  [n_tokens, n_weights], or NULL with n_weights 0
STS_C_API sts_status sts_accumulate_shift(const sts_encoder* encoder, const sts_matrix* base, const sts_matrix* other,
                                          const int64_t* columns, int64_t n_columns, const double* row_weights,
                                          int64_t n_weights, const sts_shift_sums* sums);

typedef struct sts_moment_sums {
    double *sum_h, *sum_sq_h;
    int64_t* n_fired;
    double* sum_hy;  ///< [n_columns, n_targets], or NULL
} sts_moment_sums;

/// targets  [n_tokens, n_targets], or NULL with n_targets 0
STS_C_API sts_status sts_accumulate_moments(const sts_encoder* encoder, const sts_matrix* acts, const int64_t* columns,
                                            int64_t n_columns, const double* targets, int64_t n_targets,
                                            const sts_moment_sums* sums);

/// Threads that an op may use; by default all cores available to the process.
STS_C_API sts_status sts_set_num_threads(int32_t n);

#ifdef __cplusplus
}
#endif

#endif
