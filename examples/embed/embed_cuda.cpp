// How far demonstrations shift the features of an SAE, on a GPU, by the kernels alone: memory is the program's.
#include <cuda_runtime_api.h>
#include <sts/cuda/ops.h>

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <vector>

namespace {

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

/// Numbers on the GPU.
template <class T>
struct Array {
    T* data = nullptr;
    size_t n;

    explicit Array(const std::vector<T>& values) : n(values.size()) {
        check(cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T)));
        check(cudaMemcpy(data, values.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    explicit Array(int64_t n_zeros) : Array(std::vector<T>(static_cast<size_t>(n_zeros))) {}
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { cudaFree(data); }

    std::vector<T> values() const {
        std::vector<T> copy(n);
        check(cudaMemcpy(copy.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost));
        return copy;
    }
};

constexpr int64_t kDIn = 2;

/// Rows of kDIn numbers as the products take them: each the sum of two in bfloat16, padded with zeros.
struct Prepared {
    Array<float> rows;
    int64_t n_rows;
    Array<uint16_t> hi, lo;

    Prepared(const sts::cuda::Device& device, const std::vector<float>& numbers, int64_t* status)
        : rows(numbers),
          n_rows(static_cast<int64_t>(numbers.size()) / kDIn),
          hi(n_rows * sts::cuda::kDepth),
          lo(n_rows * sts::cuda::kDepth) {
        const sts::cuda::Rows given{rows.data, sts::cuda::Element::float32, n_rows, kDIn, kDIn};
        check(sts::cuda::prepare_rows(device, given, sts::InputNorm::none, hi.data, lo.data, nullptr, sts::cuda::kDepth,
                                      0, status));
    }
    sts::cuda::Operand operand() const { return {{hi.data, lo.data}, n_rows, sts::cuda::kDepth}; }
};

}  // namespace

int main() try {
    sts::cuda::Device device{};
    check(sts::cuda::find_device(0, nullptr, &device));

    // Where a row holds a NaN or infinity its word gets the row's number, and nothing is added.
    const Array<int64_t> status(std::vector<int64_t>(3, sts::cuda::kFine));
    // W_enc is transposed, [d_sae 3, d_in 2]; activations are [n_tokens 2, d_in 2].
    const Prepared W_enc(device, {1, 0, 0, 1, 1, -1}, status.data);
    const Prepared base(device, {1, 2, 3, 0}, status.data + 1), other(device, {2, 2, 0, 1}, status.data + 2);
    const sts::cuda::Product product{
        W_enc.operand(), base.operand(), other.operand(), sts::cuda::terms_of(true, true), sts::cuda::kDepth, false};

    // ReLU: a threshold of 0.
    const Array<float> scale({1, 1, 1}), bias({0, -1, 0}), threshold({0, 0, 0});
    const sts::cuda::SlabShape shape = sts::cuda::shift_slab(device, product, false);
    const Array<double> slab(shape.n_slots * shape.n_sums * W_enc.n_rows), sum_sq_shift(W_enc.n_rows);
    sts::cuda::SumTargets targets{};
    targets.data[0] = sum_sq_shift.data;  // of ShiftSums the first; the others are not wanted
    targets.stride[0] = 1;
    check(sts::cuda::accumulate_shift(device, product, {scale.data, bias.data, threshold.data, false}, nullptr,
                                      slab.data, targets, status.data, 3));

    const std::vector<double> sums = sum_sq_shift.values();
    std::printf("shift: %g %g %g\n", sums[0], sums[1], sums[2]);
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
