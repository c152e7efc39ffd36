#include "cuda/main_loop.cuh"

namespace sts::cuda {
namespace {

PreActivations pre_activations(const Product& product, const Vectors& vectors, bool absolute) {
    return {encoder_vectors(vectors), product.n_tokens(), product.n_features(), absolute};
}

constexpr unsigned kSelectThreads = 256;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

/// The highest digit that, with those above it, has n_wanted keys, or digit 0; `above` becomes the number of keys with
/// higher digits. The lanes of a warp call together, each for eight digits side by side, the first for the highest.
__device__ int digit_of(int n_wanted, const int* histogram, int& above) {
    constexpr int kEach = kDigits / 32;
    const int lane = static_cast<int>(threadIdx.x), highest = kDigits - 1 - kEach * lane;
    int n = 0;
    for (int i = 0; i < kEach; ++i) n += histogram[highest - i];
    int up_to = n;  // with those of lower lanes
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, up_to, step);
        if (lane >= step) up_to += before;
    }
    const unsigned enough = __ballot_sync(kAllLanes, up_to >= n_wanted);
    const int owner = enough ? __ffs(static_cast<int>(enough)) - 1 : 31;
    int digit = highest, higher = up_to - n;
    while (digit > highest - kEach + 1 && higher + histogram[digit] < n_wanted) higher += histogram[digit--];
    above = __shfl_sync(kAllLanes, higher, owner);
    return __shfl_sync(kAllLanes, digit, owner);
}

/// A block per row: radix selection, most significant digit first, over keys that put the larger value first and among
/// equal ones the lower column, so that no two are the same.
__global__ void __launch_bounds__(kSelectThreads, 4)
    select_top_k_kernel(int64_t k, bool absolute, RowLists lists, const float* pre, int64_t n_features,
                        int64_t first_feature, RowLists selected, float* bounds, int64_t* status) {
    __shared__ int histogram[kDigits];
    __shared__ int n_wanted, n_written;
    __shared__ unsigned long long chosen_digits;
    const int64_t row = blockIdx.x;
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t n_listed = lists.columns ? lists.counts[row] : 0;
    const int64_t n_read = n_listed < lists.capacity ? n_listed : lists.capacity;
    const int64_t n_dense = pre ? n_features : 0;

    // 0 for what is not positive and cannot be chosen.
    const auto each_key = [&](const auto& visit) {
        for (int64_t i = thread; i < n_read + n_dense; i += kSelectThreads) {
            const bool listed = i < n_read;
            const float value = listed ? lists.values[row * lists.capacity + i] : pre[row * n_features + i - n_read];
            const int64_t column = listed ? lists.columns[row * lists.capacity + i] : first_feature + i - n_read;
            const float size = absolute && value < 0 ? -value : value;
            if (!(size > 0)) continue;
            const unsigned long long key = static_cast<unsigned long long>(__float_as_uint(size)) << 32 |
                                           (0xffffffffu - static_cast<uint32_t>(column));
            visit(key, value, column);
        }
    };

    // After each digit: keys above chosen_digits are in, those below out, n_wanted of those that share it are in.
    if (thread == 0) {
        n_wanted = static_cast<int>(k);
        n_written = 0;
        chosen_digits = 0;
    }
    int shift = 64;
    unsigned long long prefix = 0;
    while (shift > 0) {
        shift -= kDigitBits;
        for (int digit = thread; digit < kDigits; digit += kSelectThreads) histogram[digit] = 0;
        __syncthreads();
        each_key([&](unsigned long long key, float, int64_t) {
            if (shift + kDigitBits == 64 || key >> (shift + kDigitBits) == prefix >> (shift + kDigitBits))
                atomicAdd(&histogram[key >> shift & (kDigits - 1)], 1);
        });
        __syncthreads();
        if (thread < 32) {
            int above = 0;
            const int digit = digit_of(n_wanted, histogram, above);
            __syncwarp();
            if (thread == 0) {
                chosen_digits = prefix | static_cast<unsigned long long>(digit) << shift;
                // All that share the digits are wanted: no need to tell them apart.
                n_wanted = histogram[digit] <= n_wanted - above ? 0 : n_wanted - above;
            }
        }
        __syncthreads();
        prefix = chosen_digits;
        if (n_wanted == 0) break;
    }
    // Every key from `prefix` on is in: k of them, or all where there are fewer (the last digit then came out as 0).
    each_key([&](unsigned long long key, float value, int64_t column) {
        if (key < prefix) return;
        const int at = atomicAdd(&n_written, 1);
        selected.columns[row * selected.capacity + at] = static_cast<int32_t>(column);
        selected.values[row * selected.capacity + at] = value;
    });
    __syncthreads();
    if (thread >= 32) return;
    if (thread == 0) {
        selected.counts[row] = n_written;
        if (n_listed > lists.capacity) *status = 0;
    }
    if (!bounds) return;
    // The smallest chosen value is the k-th largest.
    float bound = n_written < k ? 0 : __uint_as_float(0x7f800000);
    for (int i = thread; i < n_written && n_written == k; i += 32) {
        const float value = selected.values[row * selected.capacity + i], size = value < 0 ? -value : value;
        bound = size < bound ? size : bound;
    }
    for (int step = 16; step; step /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, bound, step);
        bound = other < bound ? other : bound;
    }
    if (thread == 0) bounds[row] = bound;
}

}  // namespace

cudaError_t encode_dense(const Device& device, const Product& product, const Vectors& vectors, float* pre) {
    return launch_product<DenseEpilogue>(device, product, {pre_activations(product, vectors, false), pre});
}

cudaError_t append_candidates(const Device& device, const Product& product, const Vectors& vectors, bool absolute,
                              const float* bounds, const RowLists& lists, int64_t first_feature) {
    return launch_product<CandidateEpilogue>(device, product,
                                             {pre_activations(product, vectors, absolute), bounds, lists.columns,
                                              lists.values, lists.counts, lists.capacity, first_feature});
}

cudaError_t select_top_k(const Device& device, int64_t n_rows, int64_t k, bool absolute, const RowLists& lists,
                         const float* pre, int64_t n_features, int64_t first_feature, const RowLists& selected,
                         float* bounds, int64_t* status) {
    return launch(select_top_k_kernel, static_cast<unsigned>(n_rows), kSelectThreads, 0, device.stream, k, absolute,
                  lists, pre, n_features, first_feature, selected, bounds, status);
}

}  // namespace sts::cuda
