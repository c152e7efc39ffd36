#pragma once
#include <cuda_runtime.h>

namespace sts::cuda {

inline unsigned char* dynamic_shared() {
    return emulator::current().block->shared;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Args&&... args) {
    emulator::Machine::get().run(grid, block, shared_bytes, 1, [&] { kernel(args...); });
    return cudaSuccess;
}

}  // namespace sts::cuda
