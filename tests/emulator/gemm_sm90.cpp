// The main loop for Hopper, on the CPU; tests/ops/test_gemm_sm90.py builds and calls this.
#include "cuda/gemm_sm90.cuh"

#include <cstdio>

#include "cuda/epilogue.cuh"

using namespace sts;
using namespace sts::cuda;

namespace {

struct Operands {
    const uint16_t *W[2], *base[2], *other[2];
    int64_t n_features, n_tokens, depth, W_stride, x_stride;

    Product product() const {
        Product product{};
        product.W = {{W[0], W[1]}, n_features, W_stride};
        product.base = {{base[0], base[1]}, n_tokens, x_stride};
        product.other = {{other[0], other[1]}, n_tokens, x_stride};
        product.terms = terms_of(W[1] != nullptr, base[1] != nullptr);
        product.depth = depth;
        return product;
    }
};

struct Vectors {
    const float *scale, *bias, *threshold;
};

/// What `run` returns, or -2 where the emulator refuses something, which it says on stderr.
template <class Run>
int refusals(const Run& run) {
    try {
        return run();
    } catch (const std::exception& refusal) {
        std::fprintf(stderr, "the emulator: %s\n", refusal.what());
        return -2;
    }
}

/// Runs the kernel and adds up the slab's rows.
template <class Epilogue>
int run(const Operands& operands, typename Epilogue::Params params, int n_multiprocessors, uint64_t seed,
        double* sums) {
    emulator::Machine::get().seed = seed;
    const Product product = operands.product();
    if (!sm90_serves(product)) return -1;
    const int64_t n_slots = sm90_slots<Epilogue>(product, n_multiprocessors);
    const int64_t n_sums = Epilogue::kSums * operands.n_features;
    std::vector<double> slab(static_cast<size_t>(n_slots * n_sums), 0.0);
    params.slab = {slab.data(), operands.n_features};
    const int status = refusals([&] { return sm90_launch<Epilogue>(product, params, n_multiprocessors, nullptr); });
    for (int64_t i = 0; i < n_slots * n_sums; ++i) sums[i % n_sums] += slab[static_cast<size_t>(i)];
    return status;
}

}  // namespace

extern "C" {

/// pre [n_tokens, n_features] = scale * p + bias
int emulate_dense(const Operands* operands, const Vectors* vectors, int n_multiprocessors, uint64_t seed, float* pre) {
    emulator::Machine::get().seed = seed;
    const DenseEpilogue::Params params{
        {{vectors->scale, vectors->bias, vectors->threshold}, operands->n_tokens, operands->n_features, false}, pre};
    const Product product = operands->product();
    if (!sm90_serves(product)) return -1;
    return refusals([&] { return sm90_launch<DenseEpilogue>(product, params, n_multiprocessors, nullptr); });
}

/// sums [7, n_features]
int emulate_shift(const Operands* operands, const Vectors* vectors, int n_multiprocessors, uint64_t seed,
                  double* sums) {
    return run<ShiftEpilogue<JumpRelu<float>, 0>>(
        *operands, {{vectors->scale, vectors->bias, vectors->threshold}, {}, operands->n_tokens, nullptr},
        n_multiprocessors, seed, sums);
}

/// targets [n_tokens, 16]; sums [3 + 16, n_features]
int emulate_moments(const Operands* operands, const Vectors* vectors, const float* targets, int n_multiprocessors,
                    uint64_t seed, double* sums) {
    return run<MomentsEpilogue<JumpRelu<float>>>(
        *operands, {{vectors->scale, vectors->bias, vectors->threshold}, {}, operands->n_tokens, targets},
        n_multiprocessors, seed, sums);
}

/// keys, values [capacity], in any order; returns how many there are, or -1.
int64_t emulate_append(const Operands* operands, const Vectors* vectors, int n_multiprocessors, uint64_t seed,
                       int64_t capacity, int64_t* keys, float* values) {
    emulator::Machine::get().seed = seed;
    using Append = AppendEpilogue<JumpRelu<float>>;
    unsigned long long count = 0;
    Append::Params params{{vectors->scale, vectors->bias, vectors->threshold},
                          operands->n_tokens,
                          operands->n_features,
                          keys,
                          values,
                          &count,
                          capacity,
                          0};
    const int status =
        refusals([&] { return sm90_launch<Append>(operands->product(), params, n_multiprocessors, nullptr); });
    return status == 0 ? static_cast<int64_t>(count) : -1;
}

/// columns, values [n_tokens, capacity], counts [n_tokens]
int emulate_candidates(const Operands* operands, const Vectors* vectors, const float* bounds, int absolute,
                       int n_multiprocessors, uint64_t seed, int64_t capacity, int32_t* columns, float* values,
                       int* counts) {
    emulator::Machine::get().seed = seed;
    const CandidateEpilogue::Params params{
        {{vectors->scale, vectors->bias, vectors->threshold}, operands->n_tokens, operands->n_features, absolute != 0},
        bounds,
        columns,
        values,
        counts,
        capacity,
        1000};
    return refusals(
        [&] { return sm90_launch<CandidateEpilogue>(operands->product(), params, n_multiprocessors, nullptr); });
}

/// What a schedule deals out: for each of its clusters' places, in order, the cluster, the strip, the tile of tokens
/// and the slot. Returns how many, and the lanes and the number of slots.
int64_t deal(int64_t n_strips, int64_t n_tiles, int max_clusters, int64_t strip_bytes, int64_t cache_bytes,
             int64_t* lanes_and_slots, int64_t* dealt) {
    const StripSchedule schedule = make_schedule(n_strips, n_tiles, max_clusters, strip_bytes, cache_bytes);
    lanes_and_slots[0] = schedule.lanes_n;
    lanes_and_slots[1] = schedule.lanes_m;
    lanes_and_slots[2] = schedule.n_slots();
    int64_t n = 0;
    for (int cluster = 0; cluster < schedule.n_clusters(); ++cluster) {
        const TileRange tiles = schedule.tiles_of(cluster);
        for (int64_t place = tiles.begin; place < tiles.end; place += tiles.step, ++n) {
            const int64_t strip = place / n_tiles;
            dealt[4 * n] = cluster;
            dealt[4 * n + 1] = strip;
            dealt[4 * n + 2] = schedule.token_tile(tiles, place);
            dealt[4 * n + 3] = schedule.slot_of(cluster, strip);
        }
    }
    return n;
}
}
