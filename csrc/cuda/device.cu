#include <sts/cuda/ops.h>

#include "cuda/tensor_map.h"

namespace sts::cuda {

cudaError_t find_device(int index, cudaStream_t stream, Device* device) {
    int major = 0, minor = 0;
    *device = {0, false, stream};
    if (const cudaError_t error =
            cudaDeviceGetAttribute(&device->n_multiprocessors, cudaDevAttrMultiProcessorCount, index))
        return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index))
        return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index))
        return error;
#ifdef STS_SM90A
    device->sm90 = major == 9 && minor == 0 && tensor_map_encoder() != nullptr;
#endif
    return cudaSuccess;
}

}  // namespace sts::cuda
