#pragma once
#include <cuda_runtime_api.h>
#include <sts/cuda/operands.h>
#include <sts/sae_ops.h>

/// What the CUDA ops of Python are made of. Every function starts kernels on the stream and returns at once: nothing is
/// allocated and nothing waits, so that CUDA graphs may capture it. Pointers are the device's; the caller has checked
/// all arguments. `status` words hold kFine until a kernel finds a fault; sums are added only while all of them do.
namespace sts::cuda {

inline constexpr int64_t kFine = INT64_MAX;

struct Device {
    int n_multiprocessors;
    bool sm90;  ///< products run on Hopper's main loop: where this build, the GPU and its driver have it
    cudaStream_t stream;
};

cudaError_t find_device(int index, cudaStream_t stream, Device* device);

enum class Element { float32, bfloat16, float16 };

/// Activations as the caller has them; any row stride.
struct Rows {
    const void* data;
    Element element;
    int64_t n_rows, d_in, row_stride;
};

/// Normalises rows as Encoder says, in float64, and splits them into bfloat16 parts or writes floats; with neither it
/// only looks for faults. A NaN, an infinity, or a row that cannot be scaled lowers *status to its row number.
///
/// hi, lo, floats  [n_rows, depth] or null, zero beyond d_in
cudaError_t prepare_rows(const Device& device, const Rows& rows, InputNorm norm, uint16_t* hi, uint16_t* lo,
                         float* floats, int64_t depth, int64_t first_row, int64_t* status);

struct Vectors {
    const float *scale, *bias, *gate;  ///< [n_features]
    bool gated;                        ///< gate is gate_bias; else the threshold, at least 0
};

/// Where fold_slab adds column sums: kMaxSums places, null where a sum is not wanted.
inline constexpr int kMaxSums = 23, kRowWeights = 16;
struct SumTargets {
    void* data[kMaxSums];
    int64_t stride[kMaxSums];  ///< of consecutive features
    bool is_count[kMaxSums];   ///< int64 instead of float64
};

struct SlabShape {
    int64_t n_slots, n_sums;
};

/// weights [n_tokens, kRowWeights] f32 or null; slab is [n_slots, n_sums, n_features] f64 workspace. The sums are those
/// of ShiftSums, in their order, and then the weighted ones.
SlabShape shift_slab(const Device& device, const Product& product, bool weighted);
cudaError_t accumulate_shift(const Device& device, const Product& product, const Vectors& vectors, const float* weights,
                             double* slab, const SumTargets& targets, const int64_t* status, int n_status);

/// The sums are those of MomentSums, in their order; targets as weights above.
SlabShape moments_slab(const Device& device, const Product& product);
cudaError_t accumulate_moments(const Device& device, const Product& product, const Vectors& vectors,
                               const float* targets, double* slab, const SumTargets& sums, const int64_t* status,
                               int n_status);

/// Appends (first_token + token) << 32 | feature and the value of every feature that fires; *count goes on counting
/// beyond the capacity.
cudaError_t encode_sparse(const Device& device, const Product& product, const Vectors& vectors, int64_t first_token,
                          int64_t* keys, float* values, int64_t capacity, unsigned long long* count);

/// A list of candidates for each row; complete where counts[row] <= capacity.
struct RowLists {
    int32_t* columns;  ///< [n_rows, capacity]
    float* values;     ///< [n_rows, capacity]
    int* counts;       ///< [n_rows]
    int64_t capacity;
};

/// pre [n_tokens, n_features] of a strip of features.
cudaError_t encode_dense(const Device& device, const Product& product, const Vectors& vectors, float* pre);

/// Appends the strip's pre-activations that exceed their row's bound.
cudaError_t append_candidates(const Device& device, const Product& product, const Vectors& vectors, bool absolute,
                              const float* bounds, const RowLists& lists, int64_t first_feature);

/// Of a row's list and of the dense strip, the k largest positive values (absolute values): exactly, and of equal ones
/// those of the lower columns. Writes them in no particular order and the k-th as the row's bound (0 where there are
/// fewer). A list that was not complete lowers *status to 0.
cudaError_t select_top_k(const Device& device, int64_t n_rows, int64_t k, bool absolute, const RowLists& lists,
                         const float* pre, int64_t n_features, int64_t first_feature, const RowLists& selected,
                         float* bounds, int64_t* status);

/// Sums of sparse rows. keys (sorted) are column << 32 | token << 1 | member; starts[j] is the first of column j.
/// rows [n_tokens, n_weights] f64 and weighted [n_columns, n_weights] f64, or null.
cudaError_t fold_entries(const Device& device, bool paired, const int64_t* keys, const float* values,
                         const int64_t* starts, int64_t n_columns, const double* rows, int64_t n_weights,
                         double* weighted, const SumTargets& targets, const int64_t* status, int n_status);

/// Lowers status[0] to the first row whose indptr does not ascend from 0 to the number of entries, and status[1] to the
/// first whose indices do not ascend below d_sae.
cudaError_t check_sparse(const Device& device, const SparseView& rows, int64_t d_sae, int64_t* status);

/// What sts::sum_by_prompt takes; each prompt's features are summed a window of them at a time.
struct PromptTokens {
    SparseView base, other;
    const int64_t *base_starts, *other_starts;  ///< [n_prompts + 1]
    const int64_t* pair_at;
    int64_t n_prompts, d_sae;
    int window;  ///< features, a multiple of 32; a block keeps two bits for each

    int64_t n_windows() const { return (d_sae + window - 1) / window; }
};

/// counts [n_prompts, n_windows] features that fire; untouched where status has a fault.
cudaError_t count_by_prompt(const Device& device, const PromptTokens& tokens, int64_t* counts, const int64_t* status,
                            int n_status);

/// Entries of sts::PromptRows, which need not be zeroed.
struct PromptSums {
    int32_t *indices, *n_fired;
    double *sum_h, *sum_sq_h, *sum_shift, *sum_sq_shift;
    float* strongest;
    int32_t* strongest_at;
};

/// The sums of the CPU op, bit for bit. first_entries [n_prompts, n_windows] are running totals of the counts.
cudaError_t sum_by_prompt(const Device& device, const PromptTokens& tokens, const int64_t* first_entries,
                          const PromptSums& sums);

}  // namespace sts::cuda
