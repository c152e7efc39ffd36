#pragma once
#include <sts/cuda/ops.h>

#include "cuda/fold.cuh"
#include "cuda/gemm_sm80.cuh"
#include "cuda/gemm_sm90.cuh"

/// The choice of a main loop, and what every op with sums does around it.
namespace sts::cuda {

/// A type handed over as a value.
template <class T>
struct Type {
    using type = T;
};

inline EncoderVectors encoder_vectors(const Vectors& vectors) {
    return {vectors.scale, vectors.bias, vectors.gate};
}

/// Hopper's own loop where it is to be had and can read the operands; the other one runs everywhere.
inline bool use_sm90(const Device& device, const Product& product) {
    return device.sm90 && sm90_serves(product);
}

template <class Epilogue>
cudaError_t launch_product(const Device& device, const Product& product, const typename Epilogue::Params& params) {
    return (use_sm90(device, product) ? sm90_launch<Epilogue> : launch_sm80<Epilogue>)(product, params,
                                                                                       device.n_multiprocessors,
                                                                                       device.stream);
}

template <class Epilogue>
SlabShape slab_shape(const Device& device, const Product& product) {
    const int n = device.n_multiprocessors;
    return {use_sm90(device, product) ? sm90_slots<Epilogue>(product, n)
                                      : Sm80::n_lanes<Epilogue>(product.n_features(), product.n_tokens(), n),
            Epilogue::kSums};
}

/// Sums by `Epilogue`, then into `targets`.
template <class Epilogue>
cudaError_t sum_columns(const Device& device, const Product& product, typename Epilogue::Params params, double* slab,
                        const SumTargets& targets, const int64_t* status, int n_status) {
    const SlabShape shape = slab_shape<Epilogue>(device, product);
    const size_t n_entries = static_cast<size_t>(shape.n_slots * shape.n_sums * product.n_features());
    params.slab = {slab, product.n_features()};
    if (const cudaError_t error = cudaMemsetAsync(slab, 0, n_entries * sizeof(double), device.stream)) return error;
    if (const cudaError_t error = launch_product<Epilogue>(device, product, params)) return error;
    return fold_slab(device, slab, shape, product.n_features(), targets, status, n_status);
}

}  // namespace sts::cuda
