#include "cuda/main_loop.cuh"

namespace sts::cuda {

SlabShape moments_slab(const Device& device, const Product& product) {
    return slab_shape<MomentsEpilogue<JumpRelu<float>>>(device, product);
}

cudaError_t accumulate_moments(const Device& device, const Product& product, const Vectors& vectors,
                               const float* targets, double* slab, const SumTargets& sums, const int64_t* status,
                               int n_status) {
    static_assert(MomentsEpilogue<JumpRelu<float>>::kTargets == kRowWeights);
    const auto run = [&](auto epilogue) {
        return sum_columns<typename decltype(epilogue)::type>(
            device, product, {encoder_vectors(vectors), {}, product.n_tokens(), targets}, slab, sums, status, n_status);
    };
    return vectors.gated ? run(Type<MomentsEpilogue<Gated<float>>>{}) : run(Type<MomentsEpilogue<JumpRelu<float>>>{});
}

}  // namespace sts::cuda
