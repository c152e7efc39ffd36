#pragma once
#include <cuda_runtime.h>
#include <sts/cuda/ops.h>

/// Words in which kernels report faults.
namespace sts::cuda {

/// Lowers a word to the number of a faulty row, so that the first one stays.
__device__ inline void report(int64_t* status, int64_t row) {
    atomicMin(reinterpret_cast<unsigned long long*>(status), static_cast<unsigned long long>(row));
}

__device__ inline bool all_fine(const int64_t* status, int n_status) {
    for (int i = 0; i < n_status; ++i)
        if (status[i] != kFine) return false;
    return true;
}

}  // namespace sts::cuda
