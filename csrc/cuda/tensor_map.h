#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <sts/cuda/operands.h>

#include <cstdint>

/// Descriptors by which the tensor memory accelerator copies boxes of a matrix to shared memory.
namespace sts::cuda {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's encoder, asked for at run time so that nothing links the driver; null where there is none.
inline EncodeTiled tensor_map_encoder() {
    static const EncodeTiled encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function)
                                                                             : nullptr;
    }();
    return encoder;
}

/// Whether the accelerator can read all parts: rows aligned to 16 bytes, coordinates of 32 bits.
inline bool fits_tensor_map(const Operand& operand, int64_t depth) {
    constexpr int64_t kMaxRows = int64_t{1} << 31, kMaxStrideBytes = int64_t{1} << 40;
    for (const uint16_t* part : operand.parts)
        if (reinterpret_cast<uintptr_t>(part) % 16 != 0) return false;
    return operand.row_stride % 8 == 0 && operand.row_stride >= depth && operand.row_stride * 2 < kMaxStrideBytes &&
           operand.n_rows > 0 && operand.n_rows < kMaxRows;
}

/// Boxes of box_rows rows by 64 elements: 128 bytes a row, whose eight 16-byte chunks are permuted by the row's number
/// (chunk c of row r lies at c ^ r % 8), so that eight rows of one column lie in different banks. What lies outside of
/// the matrix arrives as zeros.
inline bool encode_tensor_map(EncodeTiled encode, const Operand& operand, int part, int64_t depth, uint32_t box_rows,
                              CUtensorMap* map) {
    const cuuint64_t extents[2] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(operand.n_rows)};
    const cuuint64_t stride_bytes[1] = {static_cast<cuuint64_t>(operand.row_stride) * 2};
    const cuuint32_t box[2] = {64, box_rows}, element_strides[2] = {1, 1};
    return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<uint16_t*>(operand.parts[part]), extents,
                  stride_bytes, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace sts::cuda
