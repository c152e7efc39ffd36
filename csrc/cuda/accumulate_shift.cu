#include "cuda/main_loop.cuh"

namespace sts::cuda {
namespace {

template <class Activation>
cudaError_t accumulate(const Device& device, const Product& product, const Vectors& vectors, const float* weights,
                       double* slab, const SumTargets& targets, const int64_t* status, int n_status) {
    const auto run = [&](auto epilogue) {
        return sum_columns<typename decltype(epilogue)::type>(
            device, product, {encoder_vectors(vectors), {}, product.n_tokens(), weights}, slab, targets, status,
            n_status);
    };
    return weights ? run(Type<ShiftEpilogue<Activation, kRowWeights>>{}) : run(Type<ShiftEpilogue<Activation, 0>>{});
}

}  // namespace

SlabShape shift_slab(const Device& device, const Product& product, bool weighted) {
    return weighted ? slab_shape<ShiftEpilogue<JumpRelu<float>, kRowWeights>>(device, product)
                    : slab_shape<ShiftEpilogue<JumpRelu<float>, 0>>(device, product);
}

cudaError_t accumulate_shift(const Device& device, const Product& product, const Vectors& vectors, const float* weights,
                             double* slab, const SumTargets& targets, const int64_t* status, int n_status) {
    return (vectors.gated ? accumulate<Gated<float>> : accumulate<JumpRelu<float>>)(device, product, vectors, weights,
                                                                                    slab, targets, status, n_status);
}

}  // namespace sts::cuda
