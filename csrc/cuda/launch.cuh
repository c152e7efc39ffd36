#pragma once
#include <cuda_runtime.h>

#include <cstdint>

/// Starting kernels; the tests' emulator has its own version of this file.
namespace sts::cuda {

/// The shared memory whose size the launch gives.
__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char sts_dynamic_shared[];
    return sts_dynamic_shared;
}

template <class T>
struct Parameter {
    using type = T;
};

template <class... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   typename Parameter<Params>::type... params) {
    constexpr size_t kAlwaysGranted = 48 * 1024;
    if (shared_bytes > kAlwaysGranted) {
        const cudaError_t granted =
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
        if (granted != cudaSuccess) return granted;
    }
    void* arguments[] = {&params...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream);
}

}  // namespace sts::cuda
