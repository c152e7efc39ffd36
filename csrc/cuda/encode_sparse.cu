#include "cuda/main_loop.cuh"

namespace sts::cuda {

cudaError_t encode_sparse(const Device& device, const Product& product, const Vectors& vectors, int64_t first_token,
                          int64_t* keys, float* values, int64_t capacity, unsigned long long* count) {
    const auto run = [&](auto epilogue) {
        return launch_product<typename decltype(epilogue)::type>(
            device, product,
            {encoder_vectors(vectors), product.n_tokens(), product.n_features(), keys, values, count, capacity,
             first_token});
    };
    return vectors.gated ? run(Type<AppendEpilogue<Gated<float>>>{}) : run(Type<AppendEpilogue<JumpRelu<float>>>{});
}

}  // namespace sts::cuda
