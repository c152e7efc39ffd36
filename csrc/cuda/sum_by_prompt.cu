#include <sts/cuda/ops.h>

#include "cuda/launch.cuh"
#include "cuda/status.cuh"

namespace sts::cuda {
namespace {

constexpr unsigned kThreads = 128, kWarps = kThreads / 32, kWordBits = 32;

/// A warp per row, and one for the end of the last.
__global__ void __launch_bounds__(kThreads) check_sparse_kernel(SparseView rows, int64_t d_sae, int64_t* status) {
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, n_rows = rows.indptr.size - 1;
    if (row > n_rows) return;
    const int64_t n_entries = rows.indices.size, begin = rows.indptr.data[row];
    const int64_t end = row < n_rows ? rows.indptr.data[row + 1] : n_entries;
    if (begin < 0 || begin > end || end > n_entries || (row == 0 && begin != 0) || (row == n_rows && begin != end)) {
        report(&status[0], row);
        return;
    }
    for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) {
        const int64_t feature = rows.indices.data[i], last = i > begin ? rows.indices.data[i - 1] : -1;
        if (feature <= last || feature >= d_sae) report(&status[1], row);
    }
}

/// The features of a window that fire in a prompt, in the block's shared memory.
class Firing {
  public:
    /// Of the prompt blockIdx.x and the window blockIdx.y; all threads of the block call it.
    __device__ explicit Firing(const PromptTokens& tokens)
        : first_(blockIdx.y * static_cast<uint32_t>(tokens.window)),
          n_words_(static_cast<uint32_t>(tokens.window) / kWordBits),
          bits_(reinterpret_cast<uint32_t*>(dynamic_shared())),
          before_(reinterpret_cast<int*>(bits_ + n_words_)) {
        for (uint32_t word = threadIdx.x; word < n_words_; word += kThreads) bits_[word] = 0;
        __syncthreads();
        mark(tokens.base, tokens.base_starts);
        mark(tokens.other, tokens.other_starts);
        __syncthreads();
        count();
    }

    /// Their number.
    __device__ int size() const { return size_; }

    /// The feature's place among those that fire in ascending order; -1 outside of the window. Inside it must fire.
    __device__ int place_of(int32_t feature) const {
        const uint32_t bit = static_cast<uint32_t>(feature) - first_, word = bit / kWordBits;
        if (word >= n_words_) return -1;
        return before_[word] + __popc(bits_[word] & ((1u << bit % kWordBits) - 1));
    }

    /// features[place] of each.
    __device__ void list(int32_t* features) const {
        for (uint32_t word = threadIdx.x; word < n_words_; word += kThreads) {
            int place = before_[word];
            for (uint32_t left = bits_[word]; left; left &= left - 1)
                features[place++] = static_cast<int32_t>(first_ + word * kWordBits) + __ffs(left) - 1;
        }
    }

  private:
    /// The entries of a prompt's rows lie one behind the other.
    __device__ void mark(const SparseView& rows, const int64_t* starts) {
        const int64_t end = rows.indptr.data[starts[blockIdx.x + 1]];
        for (int64_t i = rows.indptr.data[starts[blockIdx.x]] + threadIdx.x; i < end; i += kThreads) {
            const uint32_t bit = static_cast<uint32_t>(rows.indices.data[i]) - first_, word = bit / kWordBits;
            if (word < n_words_) atomicOr(&bits_[word], 1u << bit % kWordBits);
        }
    }

    /// Of some neighbouring words each thread, and then of those of the threads before it.
    __device__ void count() {
        __shared__ int of_threads[kThreads];
        const uint32_t each = (n_words_ + kThreads - 1) / kThreads, begin = each * threadIdx.x;
        const uint32_t end = begin + each < n_words_ ? begin + each : n_words_;
        int n = 0;
        for (uint32_t word = begin; word < end; ++word) n += __popc(bits_[word]);
        of_threads[threadIdx.x] = n;
        __syncthreads();
        int before = 0;
        for (uint32_t thread = 0; thread < kThreads; ++thread) {
            if (thread == threadIdx.x) before = size_;
            size_ += of_threads[thread];
        }
        for (uint32_t word = begin; word < end; ++word) {
            before_[word] = before;
            before += __popc(bits_[word]);
        }
        __syncthreads();
    }

    const uint32_t first_;    ///< a feature below it wraps around, beyond all words
    const uint32_t n_words_;  ///< of a bit for each feature
    uint32_t* const bits_;    ///< [n_words]
    int* const before_;       ///< [n_words] features that fire below the word's
    int size_ = 0;
};

/// A block per prompt and window.
__global__ void __launch_bounds__(kThreads)
    count_by_prompt_kernel(PromptTokens tokens, int64_t* counts, const int64_t* status, int n_status) {
    if (!all_fine(status, n_status)) return;
    const Firing firing(tokens);
    if (threadIdx.x == 0) counts[int64_t{blockIdx.x} * gridDim.y + blockIdx.y] = firing.size();
}

/// The row's entry of a feature, or -1.
__device__ int64_t find(const SparseView& rows, int64_t row, int32_t feature) {
    int64_t begin = rows.indptr.data[row], end = rows.indptr.data[row + 1];
    const int64_t behind = end;
    while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (rows.indices.data[middle] < feature)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin < behind && rows.indices.data[begin] == feature ? begin : -1;
}

/// Rounded after each operation, as on the CPU: a fused multiply-add would round once.
__device__ void add(double value, double& sum, double& sum_sq) {
    sum = __dadd_rn(sum, value);
    sum_sq = __dadd_rn(sum_sq, __dmul_rn(value, value));
}

/// A block per prompt and window, which takes one token after the other. The features of a token differ, so that no two
/// threads add to one entry before all meet again.
__global__ void __launch_bounds__(kThreads)
    sum_by_prompt_kernel(PromptTokens tokens, const int64_t* first_entries, PromptSums sums) {
    const Firing firing(tokens);
    const int64_t prompt = blockIdx.x, first = first_entries[prompt * gridDim.y + blockIdx.y];
    for (int64_t at = first + threadIdx.x; at < first + firing.size(); at += kThreads) {
        sums.n_fired[at] = 0;
        sums.sum_h[at] = sums.sum_sq_h[at] = sums.sum_shift[at] = sums.sum_sq_shift[at] = 0;
        sums.strongest[at] = 0;
        sums.strongest_at[at] = -1;
    }
    firing.list(sums.indices + first);
    __syncthreads();

    // visit(entry, feature, place) of those of a row that lie in the window.
    const auto each_entry = [&](const SparseView& rows, int64_t row, const auto& visit) {
        const int64_t end = rows.indptr.data[row + 1];
        for (int64_t i = rows.indptr.data[row] + threadIdx.x; i < end; i += kThreads) {
            const int32_t feature = rows.indices.data[i];
            const int place = firing.place_of(feature);
            if (place >= 0) visit(i, feature, first + place);
        }
    };
    const SparseView &base = tokens.base, &other = tokens.other;
    const int64_t first_token = tokens.base_starts[prompt];
    for (int64_t token = first_token; token < tokens.base_starts[prompt + 1]; ++token) {
        each_entry(base, token, [&](int64_t i, int32_t, int64_t at) {
            const float h = base.values.data[i];
            if (sums.n_fired[at]++ == 0 || h > sums.strongest[at]) {
                sums.strongest[at] = h;
                sums.strongest_at[at] = static_cast<int32_t>(token - first_token);
            }
            add(double{h}, sums.sum_h[at], sums.sum_sq_h[at]);
        });
        __syncthreads();
    }
    for (int64_t pair = tokens.other_starts[prompt]; pair < tokens.other_starts[prompt + 1]; ++pair) {
        const int64_t token = tokens.pair_at[pair];
        each_entry(base, token, [&](int64_t i, int32_t feature, int64_t at) {
            const int64_t partner = find(other, pair, feature);
            const double changed = partner < 0 ? 0 : double{other.values.data[partner]};
            add(changed - double{base.values.data[i]}, sums.sum_shift[at], sums.sum_sq_shift[at]);
        });
        each_entry(other, pair, [&](int64_t i, int32_t feature, int64_t at) {
            if (find(base, token, feature) < 0)
                add(double{other.values.data[i]}, sums.sum_shift[at], sums.sum_sq_shift[at]);
        });
        __syncthreads();
    }
}

template <class... Params, class... Given>
cudaError_t launch_windows(void (*kernel)(PromptTokens, Params...), const Device& device, const PromptTokens& tokens,
                           Given... given) {
    const dim3 grid(static_cast<unsigned>(tokens.n_prompts), static_cast<unsigned>(tokens.n_windows()));
    const size_t shared_bytes = static_cast<unsigned>(tokens.window) / kWordBits * (sizeof(uint32_t) + sizeof(int));
    return launch(kernel, grid, kThreads, shared_bytes, device.stream, tokens, given...);
}

}  // namespace

cudaError_t check_sparse(const Device& device, const SparseView& rows, int64_t d_sae, int64_t* status) {
    const int64_t n_blocks = (rows.indptr.size + kWarps - 1) / kWarps;
    return launch(check_sparse_kernel, static_cast<unsigned>(n_blocks), kThreads, 0, device.stream, rows, d_sae,
                  status);
}

cudaError_t count_by_prompt(const Device& device, const PromptTokens& tokens, int64_t* counts, const int64_t* status,
                            int n_status) {
    return launch_windows(count_by_prompt_kernel, device, tokens, counts, status, n_status);
}

cudaError_t sum_by_prompt(const Device& device, const PromptTokens& tokens, const int64_t* first_entries,
                          const PromptSums& sums) {
    return launch_windows(sum_by_prompt_kernel, device, tokens, first_entries, sums);
}

}  // namespace sts::cuda
