#pragma once
/// As much of the CUDA driver's interface as csrc/cuda/tensor_map.h uses; found before the real one by the include
/// path.
#include <cuda_runtime.h>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

/// What the driver is told of a matrix of 16-bit elements; the real one is opaque, and as large.
struct alignas(64) CUtensorMap {
    const unsigned char* data;
    uint64_t extent[2], stride_bytes;  // columns, rows
    uint32_t box[2];
    unsigned char rest[80];
};
static_assert(sizeof(CUtensorMap) == 128, "as large as the driver's");

/// Refuses what the driver's manual says that it refuses.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    constexpr uint64_t kMaxExtent = uint64_t{1} << 32, kMaxStride = uint64_t{1} << 40;
    bool valid = rank == 2 && reinterpret_cast<uintptr_t>(map) % 64 == 0 && data != nullptr &&
                 reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 && strides[0] < kMaxStride &&
                 box[0] * 2 <= 128;  // the span of the swizzle
    for (int i = 0; i < 2; ++i)
        valid = valid && extents[i] > 0 && extents[i] <= kMaxExtent && box[i] > 0 && box[i] <= 256 &&
                element_strides[i] == 1;
    if (!valid) return CUDA_ERROR_INVALID_VALUE;
    *map = {static_cast<const unsigned char*>(data), {extents[0], extents[1]}, strides[0], {box[0], box[1]}, {}};
    return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
enum { cudaEnableDefault = 0 };
enum { cudaErrorInvalidValue = 1, cudaErrorInsufficientDriver = 35 };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
    if (std::strcmp(symbol, "cuTensorMapEncodeTiled") != 0) emulator::Machine::fail("an unknown entry of the driver");
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
