#pragma once
#include <cuda_runtime.h>
#include <sts/cuda/operands.h>

#include <algorithm>
#include <cstdint>
#include <new>

#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm80_ptx.cuh"

/// The product on any NVIDIA GPU from sm_80 on: mma.sync over bfloat16 parts, or float32 multiply-adds.
///
/// A block owns a strip of 128 features and walks over every n_lanes-th tile of 128 columns (64 pairs where the
/// epilogue is paired). Each of its four warps multiplies 32 features, two bands of 16, with all of the columns.
namespace sts::cuda {

/// How many sums an epilogue leaves in the slab; 0 for those that write something else.
template <class Epilogue>
constexpr auto n_sums(int = 0) -> decltype(Epilogue::kSums) {
    return Epilogue::kSums;
}
template <class Epilogue>
constexpr int n_sums(...) {
    return 0;
}

struct Sm80 {
    static constexpr int kFeatures = 128, kColumns = 128, kThreads = 128;
    static constexpr int kWarps = kThreads / 32, kBands = kFeatures / kWarps / 16, kBlocks = kColumns / 8;

    static int64_t n_strips(int64_t n_features) { return (n_features + kFeatures - 1) / kFeatures; }

    template <class Epilogue>
    __host__ __device__ static constexpr int tokens_per_tile() {
        return Epilogue::paired ? kColumns / 2 : kColumns;
    }

    /// Blocks per strip, and so rows of the slab. Sixteen strips of sixteen blocks that run at the same time find their
    /// operands in the second-level cache; few strips are cut further, to occupy every multiprocessor.
    template <class Epilogue>
    static int64_t n_lanes(int64_t n_features, int64_t n_tokens, int n_multiprocessors) {
        constexpr int64_t kSlabBytes = 64 << 20;
        const int64_t n_tiles = (n_tokens + tokens_per_tile<Epilogue>() - 1) / tokens_per_tile<Epilogue>();
        const int64_t strips = n_strips(n_features);
        int64_t lanes = std::max<int64_t>(16, (4 * n_multiprocessors + strips - 1) / strips);
        if constexpr (n_sums<Epilogue>(0) > 0)
            lanes = std::min<int64_t>(lanes, kSlabBytes / (n_sums<Epilogue>(0) * 8 * n_features));
        return std::max<int64_t>(1, std::min(lanes, n_tiles));
    }
};

/// The epilogues of a warp's two bands.
template <class Epilogue>
class BandEpilogues {
  public:
    // The epilogues themselves lie in shared memory too: the accumulators need the registers.
    static constexpr size_t kObjects = Sm80::kWarps * Sm80::kBands * Epilogue::warp_shared_bytes;
    static constexpr size_t kBytes = kObjects + Sm80::kThreads * Sm80::kBands * sizeof(Epilogue);

    __device__ BandEpilogues(const typename Epilogue::Params& params, unsigned char* shared, int64_t first_feature)
        : bands_(reinterpret_cast<Epilogue*>(shared + kObjects) + threadIdx.x * Sm80::kBands) {
        for (int band = 0; band < Sm80::kBands; ++band)
            new (bands_ + band) Epilogue(make(params, shared, first_feature, band));
    }

    __device__ void tile(const float (&acc)[Sm80::kBands][4 * Sm80::kBlocks], const typename Epilogue::Params& params,
                         int64_t token0) {
#pragma unroll
        for (int band = 0; band < Sm80::kBands; ++band)
            bands_[band].template tile<Sm80::kBlocks>(acc[band], params, token0);
    }

    __device__ void finish(const typename Epilogue::Params& params, int64_t slot) {
#pragma unroll
        for (int band = 0; band < Sm80::kBands; ++band) bands_[band].finish(params, slot);
    }

  private:
    __device__ static Epilogue make(const typename Epilogue::Params& params, unsigned char* shared,
                                    int64_t first_feature, int band) {
        const int thread = static_cast<int>(threadIdx.x), of_block = thread / 32 * Sm80::kBands + band;
        return Epilogue(params, shared + of_block * Epilogue::warp_shared_bytes,
                        first_feature + of_block * 16 + thread % 32 / 4);
    }

    Epilogue* bands_;
};

/// Shared memory of a stage: kFeatures rows of weights, then kColumns rows of activations, of 64 bytes each. The four
/// 16-byte chunks of a row are permuted so that eight rows' equal chunks lie in different banks.
struct Sm80Stages {
    static constexpr int kDepth = 32, kChunks = kDepth / 8, kStages = 3;
    static constexpr int kRows = Sm80::kFeatures + Sm80::kColumns, kBytes = kRows * kDepth * 2;

    __host__ __device__ static constexpr int offset(int row, int chunk) {
        return row * kDepth * 2 + ((chunk ^ (row >> 1 & 3)) << 4);
    }
};

template <class Epilogue>
__global__ void __launch_bounds__(Sm80::kThreads)
    gemm_sm80(Product product, typename Epilogue::Params params, int n_lanes) {
    using Stages = Sm80Stages;
    constexpr int kTokens = Sm80::tokens_per_tile<Epilogue>(), kBands = Sm80::kBands;
    unsigned char* const stages = dynamic_shared();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int slot = static_cast<int>(blockIdx.x) % n_lanes;
    const int first_feature = static_cast<int>(blockIdx.x) / n_lanes * Sm80::kFeatures;
    const int steps_per_term = static_cast<int>(product.depth / Stages::kDepth);
    const int n_steps = product.terms.n * steps_per_term;
    const int n_tiles = static_cast<int>((product.n_tokens() + kTokens - 1) / kTokens);

    // A thread copies one chunk of every 32nd row.
    constexpr int kRowStep = Sm80::kThreads / Stages::kChunks;
    const int row = thread / Stages::kChunks, chunk = thread % Stages::kChunks;
    const auto start_stage = [&](int tile, int step) {
        unsigned char* const stage = stages + step % Stages::kStages * Stages::kBytes;
        const auto term = product.terms.term[step / steps_per_term];
        const int k = step % steps_per_term * Stages::kDepth + chunk * 8;
        const auto start_row = [&](const Operand& operand, int part, int64_t at, int to) {
            const bool inside = at < operand.n_rows;
            copy_16_bytes(stage + Stages::offset(to, chunk),
                          operand.parts[part] + (inside ? at * operand.row_stride + k : 0), inside);
        };
#pragma unroll
        for (int r = 0; r < Sm80::kFeatures; r += kRowStep)
            start_row(product.W, term.w, first_feature + row + r, row + r);
#pragma unroll
        for (int c = 0; c < Sm80::kColumns; c += kRowStep) {
            const bool is_other = c >= kTokens;
            start_row(is_other ? product.other : product.base, term.x,
                      int64_t{tile} * kTokens + row + c - (is_other ? kTokens : 0), Sm80::kFeatures + row + c);
        }
    };

    BandEpilogues<Epilogue> epilogues(params, stages + Stages::kStages * Stages::kBytes, first_feature);

    for (int tile = slot; tile < n_tiles; tile += n_lanes) {
        float acc[kBands][4 * Sm80::kBlocks] = {};
#pragma unroll
        for (int step = 0; step < Stages::kStages - 1; ++step) {
            if (step < n_steps) start_stage(tile, step);
            commit_copies();
        }
        for (int step = 0; step < n_steps; ++step) {
            wait_for_copies<Stages::kStages - 2>();
            // The stage has arrived for all, and all are done with the one that is filled next.
            __syncthreads();
            if (step + Stages::kStages - 1 < n_steps) start_stage(tile, step + Stages::kStages - 1);
            commit_copies();
            const unsigned char* const stage = stages + step % Stages::kStages * Stages::kBytes;
#pragma unroll
            for (int half = 0; half < Stages::kDepth / 16; ++half) {
                uint32_t a[kBands][4];
#pragma unroll
                for (int band = 0; band < kBands; ++band)
                    load_matrices(
                        a[band], stage + Stages::offset((warp * kBands + band) * 16 + lane % 16, 2 * half + lane / 16));
#pragma unroll
                for (int i = 0; i < Sm80::kBlocks; i += 2) {
                    uint32_t b[4];
                    load_matrices(b, stage + Stages::offset(Sm80::kFeatures + 8 * i + lane / 16 * 8 + lane % 8,
                                                            2 * half + lane / 8 % 2));
#pragma unroll
                    for (int band = 0; band < kBands; ++band) {
                        multiply_add(acc[band] + 4 * i, a[band], b[0], b[1]);
                        multiply_add(acc[band] + 4 * i + 4, a[band], b[2], b[3]);
                    }
                }
            }
        }
        wait_for_copies<0>();
        __syncthreads();
        epilogues.tile(acc, params, int64_t{tile} * kTokens);
    }
    epilogues.finish(params, slot);
}

/// Floats of a stage: kDepth rows, each with a place for every feature and column of the tile.
struct Fp32Stage {
    static constexpr int kDepth = 16, kRow = Sm80::kFeatures + Sm80::kColumns + 4, kBytes = kDepth * kRow * 4;
};

template <class Epilogue>
__global__ void __launch_bounds__(Sm80::kThreads)
    gemm_fp32(Product product, typename Epilogue::Params params, int n_lanes) {
    using Stage = Fp32Stage;
    constexpr int kTokens = Sm80::tokens_per_tile<Epilogue>(), kBands = Sm80::kBands;
    float* const stage = reinterpret_cast<float*>(dynamic_shared());
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int slot = static_cast<int>(blockIdx.x) % n_lanes;
    const int first_feature = static_cast<int>(blockIdx.x) / n_lanes * Sm80::kFeatures;
    const int n_tiles = static_cast<int>((product.n_tokens() + kTokens - 1) / kTokens);
    BandEpilogues<Epilogue> epilogues(params, dynamic_shared() + Stage::kBytes, first_feature);

    // A thread copies four floats of every 32nd row.
    constexpr int kRowStep = Sm80::kThreads / (Stage::kDepth / 4);
    const int row = thread / (Stage::kDepth / 4), chunk = thread % (Stage::kDepth / 4) * 4;
    for (int tile = slot; tile < n_tiles; tile += n_lanes) {
        float acc[kBands][4 * Sm80::kBlocks] = {};
        for (int64_t k = 0; k < product.depth; k += Stage::kDepth) {
            __syncthreads();
            const auto copy_row = [&](const Operand& operand, int64_t at, int to) {
                const float* const from =
                    reinterpret_cast<const float*>(operand.parts[0]) + at * operand.row_stride + k + chunk;
#pragma unroll
                for (int i = 0; i < 4; ++i) stage[(chunk + i) * Stage::kRow + to] = at < operand.n_rows ? from[i] : 0;
            };
#pragma unroll
            for (int r = 0; r < Sm80::kFeatures; r += kRowStep) copy_row(product.W, first_feature + row + r, row + r);
#pragma unroll
            for (int c = 0; c < Sm80::kColumns; c += kRowStep) {
                const bool is_other = c >= kTokens;
                copy_row(is_other ? product.other : product.base,
                         int64_t{tile} * kTokens + row + c - (is_other ? kTokens : 0), Sm80::kFeatures + row + c);
            }
            __syncthreads();
#pragma unroll 4
            for (int depth = 0; depth < Stage::kDepth; ++depth) {
                const float* const line = stage + depth * Stage::kRow;
                float w[kBands][2];
#pragma unroll
                for (int n = 0; n < 2 * kBands; ++n) w[n / 2][n % 2] = line[warp * kBands * 16 + lane / 4 + 8 * n];
#pragma unroll
                for (int i = 0; i < Sm80::kBlocks; ++i)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float x = line[Sm80::kFeatures + 8 * i + 2 * (lane % 4) + e];
#pragma unroll
                        for (int n = 0; n < 2 * kBands; ++n) acc[n / 2][4 * i + 2 * (n % 2) + e] += w[n / 2][n % 2] * x;
                    }
            }
        }
        epilogues.tile(acc, params, int64_t{tile} * kTokens);
    }
    epilogues.finish(params, slot);
}

template <class Epilogue>
cudaError_t launch_sm80(const Product& product, const typename Epilogue::Params& params, int n_multiprocessors,
                        cudaStream_t stream) {
    const int64_t lanes = Sm80::n_lanes<Epilogue>(product.n_features(), product.n_tokens(), n_multiprocessors);
    const int64_t n_blocks = Sm80::n_strips(product.n_features()) * lanes;
    const size_t stages = product.floats ? Fp32Stage::kBytes : Sm80Stages::kStages * Sm80Stages::kBytes;
    return launch(product.floats ? gemm_fp32<Epilogue> : gemm_sm80<Epilogue>, static_cast<unsigned>(n_blocks),
                  Sm80::kThreads, stages + BandEpilogues<Epilogue>::kBytes, stream, product, params,
                  static_cast<int>(lanes));
}

}  // namespace sts::cuda
