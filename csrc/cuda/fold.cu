#include "cuda/epilogue.cuh"
#include "cuda/fold.cuh"
#include "cuda/launch.cuh"
#include "cuda/status.cuh"

namespace sts::cuda {
namespace {

__device__ void add_to(const SumTargets& targets, int s, int64_t column, double sum) {
    if (!targets.data[s]) return;
    const int64_t at = column * targets.stride[s];
    if (targets.is_count[s])
        static_cast<int64_t*>(targets.data[s])[at] += static_cast<int64_t>(sum);
    else
        static_cast<double*>(targets.data[s])[at] += sum;
}

/// A thread per feature and sum.
__global__ void fold_slab_kernel(const double* slab, SlabShape shape, int64_t n_features, SumTargets targets,
                                 const int64_t* status, int n_status) {
    const int64_t feature = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const int s = static_cast<int>(blockIdx.y);
    if (feature >= n_features || !all_fine(status, n_status)) return;
    double sum = 0;
    for (int64_t slot = 0; slot < shape.n_slots; ++slot) sum += slab[(slot * shape.n_sums + s) * n_features + feature];
    add_to(targets, s, feature, sum);
}

/// The sum over a warp, in an order that is always the same; every lane gets it.
__device__ double warp_sum(double value) {
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
}

/// A warp per column. An entry of `base` meets that of `other` right behind it, where both fire.
__global__ void fold_entries_kernel(bool paired, const int64_t* keys, const float* values, const int64_t* starts,
                                    int64_t n_columns, const double* rows, int64_t n_weights, double* weighted,
                                    SumTargets targets, const int64_t* status, int n_status) {
    const int64_t column = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (column >= n_columns || !all_fine(status, n_status)) return;
    const int64_t begin = starts[column], end = starts[column + 1];
    // The features of the token whose entries begin at i, or false where i is the second of a pair.
    const auto token_at = [&](int64_t i, double& a, double& b) {
        const bool is_other = keys[i] & 1;
        if (paired && is_other && i > begin && keys[i - 1] == keys[i] - 1) return false;
        const bool both = paired && !is_other && i + 1 < end && keys[i + 1] == keys[i] + 1;
        a = is_other ? 0 : values[i];
        b = is_other ? values[i] : both ? values[i + 1] : 0;
        return true;
    };
    double sums[7] = {};
    for (int64_t i = begin + lane; i < end; i += 32) {
        double a, b;
        if (!token_at(i, a, b)) continue;
        const double all[7] = {(b - a) * (b - a), a, b, a * a, b * b, a != 0 ? 1.0 : 0.0, b != 0 ? 1.0 : 0.0};
        for (int s = 0; s < 7; ++s) sums[s] += all[s];
    }
    for (int s = 0; s < 7; ++s) sums[s] = warp_sum(sums[s]);
    if (lane == 0 && paired)
        for (int s = 0; s < 7; ++s) add_to(targets, s, column, sums[s]);
    if (lane == 0 && !paired) {
        add_to(targets, 0, column, sums[1]);
        add_to(targets, 1, column, sums[3]);
        add_to(targets, 2, column, sums[5]);
    }
    // A lane per weight: neighbouring lanes read neighbouring weights of a token.
    for (int64_t k = lane; k < n_weights; k += 32) {
        double sum = 0;
        for (int64_t i = begin; i < end; ++i) {
            double a, b;
            if (!token_at(i, a, b)) continue;
            const int64_t token = (keys[i] & 0xffffffff) >> 1;
            sum += rows[token * n_weights + k] * (paired ? (b - a) * (b - a) : a);
        }
        weighted[column * n_weights + k] += sum;
    }
}

}  // namespace

cudaError_t fold_slab(const Device& device, const double* slab, SlabShape shape, int64_t n_features,
                      const SumTargets& targets, const int64_t* status, int n_status) {
    constexpr unsigned kThreads = 128;
    const dim3 grid(static_cast<unsigned>((n_features + kThreads - 1) / kThreads), static_cast<unsigned>(shape.n_sums));
    return launch(fold_slab_kernel, grid, kThreads, 0, device.stream, slab, shape, n_features, targets, status,
                  n_status);
}

cudaError_t fold_entries(const Device& device, bool paired, const int64_t* keys, const float* values,
                         const int64_t* starts, int64_t n_columns, const double* rows, int64_t n_weights,
                         double* weighted, const SumTargets& targets, const int64_t* status, int n_status) {
    constexpr unsigned kThreads = 128, kWarps = kThreads / 32;
    return launch(fold_entries_kernel, static_cast<unsigned>((n_columns + kWarps - 1) / kWarps), kThreads, 0,
                  device.stream, paired, keys, values, starts, n_columns, rows, n_weights, weighted, targets, status,
                  n_status);
}

}  // namespace sts::cuda
