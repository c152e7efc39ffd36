#pragma once
#include <cuda_runtime.h>
#include <sts/cuda/operands.h>

#include "cuda/sm90_ptx.cuh"
#include "cuda/strip_schedule.h"
#include "cuda/tensor_map.h"

/// The main loop for Hopper: p[feature, token] = sum_k W[feature, k] * x[token, k], handed to an epilogue (see
/// epilogue.cuh) in registers, tile by tile.
///
/// A cluster of two thread blocks computes a strip of 2 * 128 features for 256 columns of tokens at a time. In each
/// block one thread of the first warpgroup has the tensor memory accelerator fill a ring of four stages, each 64 deep:
/// 128 features of W for its own block, and half of the tokens for both blocks. In a paired epilogue block 0 loads
/// those of `base` and block 1 those of `other`. The two other warpgroups multiply, 64 features by 256 columns each.
///
/// What an epilogue may cost. The products of a tile take 16 * depth cycles, 57,344 at depth 3584; 5% of it are 2,867.
/// Each of an SM's four schedulers issues one instruction per cycle and serves one warp of each multiplying warpgroup.
/// For two features of one pair of tokens ShiftEpilogue's usual path has 4 multiply-adds, 4 compares at half rate and 4
/// instructions around a branch; a thread holds 32 such groups, so a warp's epilogue takes 32 * 16 = 512 cycles where
/// nothing fires, and about 30 more for each group in which one of the warp's 128 elements does. Meanwhile the next
/// tile's stages fill. And since the first warpgroup starts two steps ahead of the second, it enters its epilogue while
/// the second still has two steps, 2 * 512 cycles at the full rate, to multiply, and is back when the second enters its
/// own: an epilogue of up to about 1,000 cycles is covered, of a longer one the excess shows. Three steps ahead would
/// leave the loads of a stage one step, which is what they take.
namespace sts::cuda {
namespace sm90 {

constexpr int kTileFeatures = 128, kTileColumns = 256, kStages = 4;
constexpr int kBlocks = 2, kMultipliers = 2, kWarpgroup = 128, kWarpsOfWarpgroup = 4;
constexpr int kMultiplyingWarps = kMultipliers * kWarpsOfWarpgroup;
constexpr int kStripFeatures = kBlocks * kTileFeatures;
constexpr int kHalfTokens = kTileColumns / kBlocks;  // columns that one block loads for both
constexpr int kWBytes = kTileFeatures * kDepth * 2, kHalfBytes = kHalfTokens * kDepth * 2;
constexpr int kStageBytes = kWBytes + kBlocks * kHalfBytes;
constexpr int kBarriersOffset = kStages * kStageBytes;
constexpr int kScratchOffset = kBarriersOffset + (2 * kStages + 2) * 8;  // a multiple of 16
constexpr int kStepsAhead = 2;

// Registers of a thread that loads and of one that multiplies; together no more than a multiprocessor has, or the
// multiplying warps would wait for them for ever.
constexpr int kLoadingRegisters = 40, kMultiplyingRegisters = 232;
static_assert(kWarpgroup * (kLoadingRegisters + kMultipliers * kMultiplyingRegisters) <= 65536);

/// A block's dynamic shared memory: the stages, their barriers, the epilogue's.
template <class Epilogue>
constexpr int shared_bytes() {
    constexpr int kMostBytesOfBlock = 232448, bytes = kScratchOffset + kMultiplyingWarps * Epilogue::warp_shared_bytes;
    static_assert(bytes <= kMostBytesOfBlock, "no Hopper GPU can start a block with as much shared memory");
    return bytes;
}

template <class Params>
struct Arguments {
    CUtensorMap W[2], x[2][kBlocks];  // [part][block]
    Terms terms;
    int depth;
    StripSchedule schedule;
    Params epilogue;
};

/// The stages, and two barriers for each: `full` waits for its bytes, `empty` for the warps of both blocks. `ahead`
/// waits for the first warpgroup's first steps.
struct Ring {
    uint8_t* stages;
    uint64_t *full, *empty, *ahead;

    __device__ uint8_t* W(int stage) const { return stages + stage * kStageBytes; }
    __device__ uint8_t* x(int stage) const { return stages + stage * kStageBytes + kWBytes; }
};

/// Names an operand in shared memory to the product: rows of 128 bytes with permuted chunks, groups of eight rows 1024
/// bytes apart. Adding kStep moves it 16 elements along the rows.
__device__ __forceinline__ uint64_t descriptor(const uint8_t* operand) {
    constexpr uint64_t kChunk = 16, kGroup = 1024, kSwizzle128B = 1;
    return (shared_address(operand) & 0x3FFFF) / kChunk | uint64_t{1} << 16 | kGroup / kChunk << 32 |
           kSwizzle128B << 62;
}
constexpr int kStep = 16 * 2 / 16;

/// Fills the ring: for each tile and term the whole depth of the block's features and of its half of the columns.
template <class Epilogue>
__device__ __forceinline__ void load_tiles(const Arguments<typename Epilogue::Params>& arguments, const Ring& ring,
                                           int block, int cluster) {
    const TileRange tiles = arguments.schedule.tiles_of(cluster);
    PipelineStage stage(kStages);
    for (int64_t place = tiles.begin; place < tiles.end; place += tiles.step) {
        const int64_t strip = place / arguments.schedule.n_tiles;
        const int64_t column_tile = arguments.schedule.token_tile(tiles, place);
        const int feature = static_cast<int>(strip * kStripFeatures) + block * kTileFeatures;
        const int token = static_cast<int>(Epilogue::paired ? column_tile * kHalfTokens
                                                            : column_tile * kTileColumns + block * kHalfTokens);
        for (int t = 0; t < arguments.terms.n; ++t) {
            const CUtensorMap* W = &arguments.W[arguments.terms.term[t].w];
            const CUtensorMap* x = &arguments.x[arguments.terms.term[t].x][block];
            for (int k = 0; k < arguments.depth; k += kDepth, stage.advance()) {
                uint64_t* full = ring.full + stage.index;
                barrier_wait(ring.empty + stage.index, stage.parity ^ 1);
                barrier_arrive_expecting(full, kStageBytes);
                load_box_multicast(x, ring.x(stage.index) + block * kHalfBytes, full, k, token, (1 << kBlocks) - 1);
                load_box(W, ring.W(stage.index), full, k, feature);
            }
        }
    }
}

/// Empties the ring: a warpgroup's 64 features by all columns of a tile, then the epilogue.
template <class Epilogue>
__device__ __forceinline__ void multiply_tiles(const Arguments<typename Epilogue::Params>& arguments, const Ring& ring,
                                               int block, int cluster, uint8_t* scratch) {
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroup, lane = thread % 32, warp = thread / 32;
    const int multiplier = thread / kWarpgroup;
    const int n_steps = arguments.terms.n * (arguments.depth / static_cast<int>(kDepth));
    const StripSchedule& schedule = arguments.schedule;
    const TileRange tiles = schedule.tiles_of(cluster);
    float accumulators[128];
    PipelineStage stage(kStages);
    const auto release = [&](int index) {
        if (lane < kBlocks) barrier_arrive_at(ring.empty + index, lane);
    };

    // Out of step with the first, the second warpgroup multiplies while the first is in its epilogue.
    int until_ahead = multiplier == 0 ? kStepsAhead + 1 : 0;
    if (multiplier == 1 && n_steps > kStepsAhead && tiles.begin < tiles.end) barrier_wait(ring.ahead, 0);

    for (int64_t place = tiles.begin; place < tiles.end;) {
        const int64_t strip = place / schedule.n_tiles, next = (strip + 1) * schedule.n_tiles;
        const int64_t end = next < tiles.end ? next : tiles.end;
        Epilogue epilogue(arguments.epilogue, scratch + warp * Epilogue::warp_shared_bytes,
                          strip * kStripFeatures + block * kTileFeatures + warp * 16 + lane / 4);
        for (; place < end; place += tiles.step) {
            int previous = -1;
            for (int step = 0; step < n_steps; ++step, stage.advance()) {
                barrier_wait(ring.full + stage.index, stage.parity);
                const uint64_t W = descriptor(ring.W(stage.index) + multiplier * (kWBytes / kMultipliers));
                const uint64_t x = descriptor(ring.x(stage.index));
                pin_accumulators(accumulators);
                product_begin();
#pragma unroll
                for (int k = 0; k < kDepth / 16; ++k)
                    product_m64n256k16(accumulators, W + k * kStep, x + k * kStep, step > 0 || k > 0);
                product_commit();
                product_wait<1>();  // the previous step's products have read their stage
                if (previous >= 0) release(previous);
                previous = stage.index;
                if (until_ahead > 0 && --until_ahead == 0 && lane == 0) barrier_arrive_at(ring.ahead, block);
            }
            product_wait<0>();
            pin_accumulators(accumulators);
            release(previous);
            epilogue.template tile<kTileColumns / 8>(
                accumulators, arguments.epilogue,
                schedule.token_tile(tiles, place) * (Epilogue::paired ? kHalfTokens : kTileColumns));
        }
        epilogue.finish(arguments.epilogue, schedule.slot_of(cluster, strip));
    }
}

// Other architectures lack the instructions: use_sm90 never launches what is compiled for them.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STS_ON_SM90A(...) __VA_ARGS__
#else
#define STS_ON_SM90A(...)
#endif

template <class Epilogue>
__global__ void STS_ON_SM90A(__cluster_dims__(kBlocks, 1, 1)) __launch_bounds__((1 + kMultipliers) * kWarpgroup, 1)
    gemm(const __grid_constant__ Arguments<typename Epilogue::Params> arguments) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    uint8_t* stages = dynamic_shared();
    uint64_t* barriers = reinterpret_cast<uint64_t*>(stages + kBarriersOffset);
    const Ring ring{stages, barriers, barriers + kStages, barriers + 2 * kStages};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(ring.full + stage, 1);
            barrier_init(ring.empty + stage, kBlocks * kMultiplyingWarps);
        }
        barrier_init(ring.ahead, kWarpsOfWarpgroup);
        barrier_init_fence();
    }
    cluster_sync();

    const int block = block_in_cluster(), cluster = static_cast<int>(blockIdx.x) / kBlocks;
    if (threadIdx.x < kWarpgroup) {
        give_registers_above<kLoadingRegisters>();
        if (threadIdx.x == 0) load_tiles<Epilogue>(arguments, ring, block, cluster);
    } else {
        take_registers_up_to<kMultiplyingRegisters>();
        multiply_tiles<Epilogue>(arguments, ring, block, cluster, stages + kScratchOffset);
    }
    // Neither block ends while the other one still writes or signals in its shared memory.
    cluster_sync();
#else
    __trap();
#endif
}

/// 66 clusters of an H200 share its L2 cache of 50 MB, which holds two copies of what both of its halves read.
constexpr int64_t kCacheForW = 24 << 20;

template <class Epilogue>
StripSchedule schedule_of(const Product& product, int n_multiprocessors) {
    const int64_t columns = Epilogue::paired ? kHalfTokens : kTileColumns;
    const int64_t parts = product.W.parts[1] ? 2 : 1;
    return make_schedule((product.n_features() + kStripFeatures - 1) / kStripFeatures,
                         (product.n_tokens() + columns - 1) / columns, n_multiprocessors / kBlocks,
                         kStripFeatures * product.depth * 2 * parts, kCacheForW);
}

}  // namespace sm90

/// Whether this main loop can read the operands; the one of gemm_sm80.cuh reads all.
inline bool sm90_serves(const Product& product) {
    return !product.floats && fits_tensor_map(product.W, product.depth) &&
           fits_tensor_map(product.base, product.depth) && fits_tensor_map(product.other, product.depth);
}

/// Rows of the slab that sm90_launch adds into.
template <class Epilogue>
int64_t sm90_slots(const Product& product, int n_multiprocessors) {
    return sm90::schedule_of<Epilogue>(product, n_multiprocessors).n_slots();
}

/// Runs the product, on operands that sm90_serves; there is at least one feature and one token.
template <class Epilogue>
cudaError_t sm90_launch(const Product& product, const typename Epilogue::Params& params, int n_multiprocessors,
                        cudaStream_t stream) {
    const EncodeTiled encode = tensor_map_encoder();
    if (encode == nullptr) return cudaErrorInsufficientDriver;
    sm90::Arguments<typename Epilogue::Params> arguments{};
    arguments.terms = product.terms;
    arguments.depth = static_cast<int>(product.depth);
    arguments.schedule = sm90::schedule_of<Epilogue>(product, n_multiprocessors);
    arguments.epilogue = params;
    bool encoded = true;
    for (int part = 0; part < 2; ++part) {
        if (product.W.parts[part])
            encoded &=
                encode_tensor_map(encode, product.W, part, product.depth, sm90::kTileFeatures, &arguments.W[part]);
        for (int block = 0; block < sm90::kBlocks; ++block) {
            const Operand& x = Epilogue::paired && block == 1 ? product.other : product.base;
            if (x.parts[part])
                encoded &=
                    encode_tensor_map(encode, x, part, product.depth, sm90::kHalfTokens, &arguments.x[part][block]);
        }
    }
    if (!encoded) return cudaErrorInvalidValue;
    return sm90::launch_clusters<sm90::kBlocks>(
        sm90::gemm<Epilogue>, static_cast<unsigned>(arguments.schedule.n_clusters()),
        (1 + sm90::kMultipliers) * sm90::kWarpgroup, sm90::shared_bytes<Epilogue>(), stream, arguments);
}

}  // namespace sts::cuda
