#include <sts/cuda/ops.h>

#include "cuda/bfloat16.cuh"
#include "cuda/launch.cuh"
#include "cuda/status.cuh"

namespace sts::cuda {
namespace {

constexpr int kThreads = 128, kGroup = 8;

/// Eight neighbouring elements of a row, 0 beyond its end.
__device__ void load_group(const Rows& rows, int64_t row, int64_t first, float (&x)[kGroup]) {
    const int64_t at = row * rows.row_stride + first;
    const int size = rows.element == Element::float32 ? 4 : 2;
    const char* const from = static_cast<const char*>(rows.data) + at * size;
    uint32_t words[kGroup] = {};
    if (first + kGroup <= rows.d_in && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        for (int i = 0; i < size / 2; ++i) {
            const uint4 quad = reinterpret_cast<const uint4*>(from)[i];
            words[4 * i] = quad.x;
            words[4 * i + 1] = quad.y;
            words[4 * i + 2] = quad.z;
            words[4 * i + 3] = quad.w;
        }
    } else {
        for (int i = 0; i < kGroup && first + i < rows.d_in; ++i)
            if (size == 4)
                words[i] = reinterpret_cast<const uint32_t*>(from)[i];
            else
                words[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(from)[i]} << 16 * (i % 2);
    }
    for (int i = 0; i < kGroup; ++i) {
        const auto half = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
        x[i] = rows.element == Element::float32    ? __uint_as_float(words[i])
               : rows.element == Element::bfloat16 ? from_bfloat16(half)
                                                   : from_float16(half);
    }
}

/// The block's sum of `value`, in an order that is always the same; every thread gets it.
__device__ double block_sum(double value) {
    __shared__ double partial[kThreads];
    __syncthreads();
    partial[threadIdx.x] = value;
    for (int half = kThreads / 2; half; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    __syncthreads();
    return partial[0];
}

/// A block per row.
__global__ void __launch_bounds__(kThreads)
    prepare_rows_kernel(Rows rows, InputNorm norm, uint16_t* hi, uint16_t* lo, float* floats, int64_t depth,
                        int64_t first_row, int64_t* status) {
    const int64_t row = blockIdx.x, begin = int64_t{threadIdx.x} * kGroup, step = int64_t{kThreads} * kGroup;
    double mean = 0, scale = 1;
    if (norm != InputNorm::none) {
        const auto sum_over_row = [&](const auto& term) {
            double sum = 0;
            for (int64_t first = begin; first < rows.d_in; first += step) {
                float x[kGroup];
                load_group(rows, row, first, x);
                for (int i = 0; i < kGroup && first + i < rows.d_in; ++i) sum += term(static_cast<double>(x[i]));
            }
            return block_sum(sum);
        };
        const double d_in = static_cast<double>(rows.d_in);
        if (norm == InputNorm::layer_norm) mean = sum_over_row([](double x) { return x; }) / d_in;
        const double sum_sq = sum_over_row([mean](double x) { return (x - mean) * (x - mean); });
        if (norm == InputNorm::layer_norm)
            scale = 1 / (sqrt(sum_sq / (d_in - 1)) + 1e-5);
        else if (sum_sq > 0)
            scale = sqrt(d_in) / sqrt(sum_sq);
    }
    bool faulty = false;
    for (int64_t first = begin; first < depth; first += step) {
        float x[kGroup];
        load_group(rows, row, first, x);
        for (int i = 0; i < kGroup; ++i) {
            faulty = faulty || (__float_as_uint(x[i]) & 0x7f800000u) == 0x7f800000u;
            if (norm != InputNorm::none && first + i < rows.d_in)
                x[i] = static_cast<float>((static_cast<double>(x[i]) - mean) * scale);
        }
        const int64_t at = row * depth + first;
        if (floats)
            for (int i = 0; i < kGroup; ++i) floats[at + i] = x[i];
        if (!hi) continue;
        uint32_t high[kGroup / 2], low[kGroup / 2];
        for (int i = 0; i < kGroup; i += 2) {
            const uint16_t first_half = to_bfloat16(x[i]), second_half = to_bfloat16(x[i + 1]);
            high[i / 2] = first_half | uint32_t{second_half} << 16;
            low[i / 2] = to_bfloat16(x[i] - from_bfloat16(first_half)) |
                         uint32_t{to_bfloat16(x[i + 1] - from_bfloat16(second_half))} << 16;
        }
        *reinterpret_cast<uint4*>(hi + at) = {high[0], high[1], high[2], high[3]};
        if (lo) *reinterpret_cast<uint4*>(lo + at) = {low[0], low[1], low[2], low[3]};
    }
    if (faulty) report(status, first_row + row);
}

}  // namespace

cudaError_t prepare_rows(const Device& device, const Rows& rows, InputNorm norm, uint16_t* hi, uint16_t* lo,
                         float* floats, int64_t depth, int64_t first_row, int64_t* status) {
    return launch(prepare_rows_kernel, static_cast<unsigned>(rows.n_rows), kThreads, 0, device.stream, rows, norm, hi,
                  lo, floats, depth, first_row, status);
}

}  // namespace sts::cuda
