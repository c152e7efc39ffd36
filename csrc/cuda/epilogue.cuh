#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "activation.h"

/// What becomes of a finished tile of products while it is still in registers.
///
/// A main loop multiplies with features as rows and tokens as columns, because a thread of mma.sync and of wgmma then
/// holds two features and many tokens: sums over tokens stay in its registers. Of 16 features of one warp and
/// 8 * n_blocks columns the thread `lane` holds, in both instructions,
///
///   acc[4 * i + 2 * j + e]   feature first + lane / 4 + 8 * j
///                            column  8 * i + 2 * (lane % 4) + e      i < n_blocks, j < 2, e < 2
///
/// In a paired epilogue the first half of the columns are tokens token0, token0 + 1, ... of `base` and the second half
/// the same tokens of `other`, so that a pair is acc[n] and acc[n + 2 * n_blocks] of one thread. Columns past the last
/// token hold p = 0 and must be masked; features past the last one own nothing, in memory either.
///
/// All 32 lanes of a warp call together:
///
///   Epilogue(params, warp_shared, feature0)   at the start of a strip of tiles that have their features in common;
///                                             feature0 is that of j = 0: the warp's first feature + lane / 4
///   tile<n_blocks>(acc, params, token0)       for each tile, in an order that the geometry fixes
///   finish(params, slot)                      at the end: writes the strip's sums into row `slot` of the slab
///
/// `warp_shared` is the warp's own, warp_shared_bytes of shared memory, 16-byte aligned, kept over the strip. Sums are
/// float32 within a tile and float64 over tiles; fold_slab adds the slab's rows in their order. No float is added
/// atomically, so that one geometry gives one result, bit for bit.
namespace sts::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

/// [n_features] each; the meaning of `gate` is the activation's.
struct EncoderVectors {
    const float *scale, *bias, *gate;
};

/// Where an epilogue leaves its sums, [n_slots, kSums, n_features]; zeroed before the launch.
struct Slab {
    double* sums;
    int64_t n_features;
};

/// Two features' activations, for as long as the strip lasts. A feature past the end never fires.
template <class Activation>
struct FeaturePair {
    Activation activation[2];

    __device__ FeaturePair(const EncoderVectors& vectors, int64_t feature0, int64_t n_features) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int64_t feature = feature0 + 8 * j;
            const bool inside = feature < n_features;
            activation[j] = {inside ? vectors.scale[feature] : 0.0f, inside ? vectors.bias[feature] : 0.0f,
                             inside ? vectors.gate[feature] : 0.0f};
        }
    }
};

/// The tokens of a thread's columns: column(i, e) is acc[4 * i + 2 * j + e]'s.
struct ThreadTokens {
    int64_t first;
    int n_left;  ///< how many there are from `first` on; 32 bits, since every element compares with it

    __device__ ThreadTokens(int64_t token0, int64_t n_tokens) : first(token0 + 2 * (threadIdx.x % 4)) {
        const int64_t left = n_tokens - first;
        n_left = left < kMany ? static_cast<int>(left) : kMany;
    }
    __device__ bool has(int i, int e) const { return 8 * i + e < n_left; }
    __device__ int64_t at(int i, int e) const { return first + 8 * i + e; }

  private:
    static constexpr int kMany = 1 << 30;
};

/// The float64 totals of a warp's 16 features, in shared memory: [kSums, 16], every entry owned by one lane.
template <int kSums>
struct WarpTotals {
    static constexpr int kBytes = kSums * 16 * static_cast<int>(sizeof(double));
    double* totals;

    __device__ explicit WarpTotals(void* warp_shared) : totals(static_cast<double*>(warp_shared)) {
        each_owned([&](int, int, double& total) { total = 0; });
    }

    /// Adds one tile's sums of this thread; the four lanes that share its features each keep a quarter of them.
    __device__ void add(const float (&sums)[kSums][2]) {
        const int quarter = static_cast<int>(threadIdx.x % 4);
#pragma unroll
        for (int s = 0; s < kSums; ++s)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float sum = sums[s][j];
                sum += __shfl_xor_sync(kAllLanes, sum, 1);
                sum += __shfl_xor_sync(kAllLanes, sum, 2);
                if (s % 4 == quarter) entry(s, j) += sum;
            }
    }

    __device__ void write(const Slab& slab, int64_t slot, int64_t feature0) {
        each_owned([&](int s, int j, double& total) {
            const int64_t feature = feature0 + 8 * j;
            if (feature < slab.n_features) slab.sums[(slot * kSums + s) * slab.n_features + feature] = total;
        });
    }

  private:
    __device__ double& entry(int s, int j) { return totals[s * 16 + 8 * j + static_cast<int>(threadIdx.x % 32) / 4]; }

    template <class Visit>
    __device__ void each_owned(const Visit& visit) {
        for (int s = static_cast<int>(threadIdx.x % 4); s < kSums; s += 4)
            for (int j = 0; j < 2; ++j) visit(s, j, entry(s, j));
    }
};

/// Adds a token's weights, times the value of each of two features, to the sums from `first` on. A value of 0 adds
/// nothing, whatever the weight.
template <int first, int n_sums>
__device__ __forceinline__ void add_weighted(float (&sums)[n_sums][2], const float (&value)[2], const float* weights,
                                             int64_t token) {
    constexpr int kWeights = n_sums - first;
    static_assert(kWeights % 4 == 0);
    if (value[0] == 0 && value[1] == 0) return;
    const float4* const row = reinterpret_cast<const float4*>(weights + token * kWeights);
#pragma unroll
    for (int k = 0; k < kWeights; k += 4) {
        asm volatile("" ::: "memory");  // no load before its turn: all four at once would not fit into the registers
        const float4 four = row[k / 4];
        const float weight[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j)
                if (value[j] != 0) sums[first + k + n][j] += weight[n] * value[j];
    }
}

/// What a warp has found in a tile and not yet handed on, in shared memory: collecting waits for nothing, while a list
/// in global memory makes a warp wait for its counter.
class WarpList {
  public:
    static constexpr int kCapacity = 256;
    static constexpr int kBytes = kCapacity * 8;

    struct Found {
        int token, feature;  ///< from the tile's and the warp's first
        float value;
    };

    __device__ explicit WarpList(void* warp_shared) : entries_(static_cast<uint2*>(warp_shared)) {}

    /// All lanes call together, with room for four entries of each: element n is feature j = n / 2 and e = n % 2 of
    /// block i, as in acc.
    __device__ void collect(const bool (&found)[4], const float (&values)[4], int i) {
        const unsigned lane = threadIdx.x % 32, below = (1u << lane) - 1;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const unsigned finders = __ballot_sync(kAllLanes, found[n]);
            const unsigned token = 8 * i + 2 * (lane % 4) + n % 2, feature = 8 * (n / 2) + lane / 4;
            if (found[n]) entries_[n_ + __popc(finders & below)] = {token << 4 | feature, __float_as_uint(values[n])};
            n_ += __popc(finders);
        }
    }

    __device__ int size() const { return n_; }
    __device__ bool is_full() const { return n_ > kCapacity - 4 * 32; }
    /// Visits the entries, 32 at a time: visit(rank, found), and forgets them.
    template <class Visit>
    __device__ void flush(const Visit& visit) {
        __syncwarp();
#pragma unroll 1  // it stands in many places and runs in few
        for (int at = static_cast<int>(threadIdx.x % 32); at < n_; at += 32) {
            const uint2 entry = entries_[at];
            visit(at, Found{static_cast<int>(entry.x >> 4), static_cast<int>(entry.x & 15), __uint_as_float(entry.y)});
        }
        __syncwarp();
        n_ = 0;
    }

  private:
    uint2* entries_;
    int n_ = 0;
};

/// Per feature, over pairs a = h(base), b = h(other): the sums of ShiftSums in their order, then kWeights sums of
/// weight * (b - a)^2.
template <class Activation, int kWeights>
struct ShiftEpilogue {
    static constexpr bool paired = true;
    static constexpr int kSums = 7 + kWeights;
    static constexpr int warp_shared_bytes = WarpTotals<kSums>::kBytes;

    struct Params {
        EncoderVectors vectors;
        Slab slab;
        int64_t n_tokens;
        const float* weights;  ///< [n_tokens, kWeights], aligned to 16 bytes
    };

    __device__ ShiftEpilogue(const Params& params, void* warp_shared, int64_t feature0)
        : features_(params.vectors, feature0, params.slab.n_features), totals_(warp_shared), feature0_(feature0) {}

    template <int n_blocks>
    __device__ void tile(const float (&acc)[4 * n_blocks], const Params& params, int64_t token0) {
        float sums[kSums][2] = {};
        const ThreadTokens tokens(token0, params.n_tokens);
#pragma unroll
        for (int i = 0; i < n_blocks / 2; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                bool fires = false;
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int n = 4 * i + 2 * j + e;
                    fires |= features_.activation[j].fires(acc[n]);
                    fires |= features_.activation[j].fires(acc[n + 2 * n_blocks]);
                }
                if (!fires || !tokens.has(i, e)) continue;  // nearly always
                float squares[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int n = 4 * i + 2 * j + e;
                    const float a = features_.activation[j](acc[n]);
                    const float b = features_.activation[j](acc[n + 2 * n_blocks]);
                    const float difference = b - a;
                    squares[j] = difference * difference;
                    sums[0][j] += squares[j];
                    sums[1][j] += a;
                    sums[2][j] += b;
                    sums[3][j] += a * a;
                    sums[4][j] += b * b;
                    sums[5][j] += a != 0 ? 1.0f : 0.0f;
                    sums[6][j] += b != 0 ? 1.0f : 0.0f;
                }
                if constexpr (kWeights > 0) add_weighted<7>(sums, squares, params.weights, tokens.at(i, e));
            }
        totals_.add(sums);
    }

    __device__ void finish(const Params& params, int64_t slot) { totals_.write(params.slab, slot, feature0_); }

  private:
    FeaturePair<Activation> features_;
    WarpTotals<kSums> totals_;
    int64_t feature0_;
};

/// Per feature: the sums of h, h^2 and h != 0, then kTargets sums of h * target, which are 0 where there are no
/// targets.
template <class Activation>
struct MomentsEpilogue {
    static constexpr int kTargets = 16;
    static constexpr bool paired = false;
    static constexpr int kSums = 3 + kTargets;
    static constexpr int warp_shared_bytes = WarpTotals<kSums>::kBytes;

    struct Params {
        EncoderVectors vectors;
        Slab slab;
        int64_t n_tokens;
        const float* targets;  ///< [n_tokens, kTargets], aligned to 16 bytes, or null
    };

    __device__ MomentsEpilogue(const Params& params, void* warp_shared, int64_t feature0)
        : features_(params.vectors, feature0, params.slab.n_features), totals_(warp_shared), feature0_(feature0) {}

    template <int n_blocks>
    __device__ void tile(const float (&acc)[4 * n_blocks], const Params& params, int64_t token0) {
        float sums[kSums][2] = {};
        const ThreadTokens tokens(token0, params.n_tokens);
#pragma unroll
        for (int i = 0; i < n_blocks; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                bool fires = false;
#pragma unroll
                for (int j = 0; j < 2; ++j) fires |= features_.activation[j].fires(acc[4 * i + 2 * j + e]);
                if (!fires || !tokens.has(i, e)) continue;  // nearly always
                float h[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    h[j] = features_.activation[j](acc[4 * i + 2 * j + e]);
                    sums[0][j] += h[j];
                    sums[1][j] += h[j] * h[j];
                    sums[2][j] += h[j] != 0 ? 1.0f : 0.0f;
                }
                if (params.targets) add_weighted<3>(sums, h, params.targets, tokens.at(i, e));
            }
        totals_.add(sums);
    }

    __device__ void finish(const Params& params, int64_t slot) { totals_.write(params.slab, slot, feature0_); }

  private:
    FeaturePair<Activation> features_;
    WarpTotals<kSums> totals_;
    int64_t feature0_;
};

/// Appends (token, feature, h) for every h != 0, in no particular order: sorting by `keys` gives one.
template <class Activation>
struct AppendEpilogue {
    static constexpr bool paired = false;
    static constexpr int warp_shared_bytes = WarpList::kBytes;

    struct Params {
        EncoderVectors vectors;
        int64_t n_tokens, n_features;
        int64_t* keys;              ///< [capacity] (first_token + token) << 32 | feature
        float* values;              ///< [capacity]
        unsigned long long* count;  ///< how many there are, also where they are more than `capacity`
        int64_t capacity, first_token;
    };

    __device__ AppendEpilogue(const Params& params, void* warp_shared, int64_t feature0)
        : features_(params.vectors, feature0, params.n_features),
          list_(warp_shared),
          first_feature_(feature0 - threadIdx.x % 32 / 4) {}

    template <int n_blocks>
    __device__ void tile(const float (&acc)[4 * n_blocks], const Params& params, int64_t token0) {
        const ThreadTokens tokens(token0, params.n_tokens);
#pragma unroll
        for (int i = 0; i < n_blocks; ++i) {
            bool fires[4];
            float h[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                fires[n] = features_.activation[n / 2].fires(acc[4 * i + n]) && tokens.has(i, n % 2);
                h[n] = features_.activation[n / 2](acc[4 * i + n]);
            }
            if (!__any_sync(kAllLanes, fires[0] || fires[1] || fires[2] || fires[3])) continue;
            list_.collect(fires, h, i);
            if (list_.is_full()) flush(params, token0);
        }
        if (list_.size() > 0) flush(params, token0);
    }

    __device__ void finish(const Params&, int64_t) {}

  private:
    __device__ void flush(const Params& params, int64_t token0) {
        unsigned long long start = 0;
        if (threadIdx.x % 32 == 0) start = atomicAdd(params.count, static_cast<unsigned long long>(list_.size()));
        start = __shfl_sync(kAllLanes, start, 0);
        list_.flush([&](int rank, const WarpList::Found& found) {
            const int64_t at = static_cast<int64_t>(start) + rank;
            if (at >= params.capacity) return;
            params.keys[at] = (params.first_token + token0 + found.token) << 32 | (first_feature_ + found.feature);
            params.values[at] = found.value;
        });
    }

    FeaturePair<Activation> features_;
    WarpList list_;
    int64_t first_feature_;
};

/// TopK and AbsTopK: pre-activations as they are, or those that exceed their row's bound. `gate` is not used.
struct PreActivations {
    EncoderVectors vectors;
    int64_t n_tokens, n_features;
    bool absolute;
};

/// Writes every pre-activation of a strip of at most a few thousand features: pre[token, feature].
struct DenseEpilogue {
    static constexpr bool paired = false;
    static constexpr int warp_shared_bytes = 0;

    struct Params {
        PreActivations from;
        float* pre;  ///< [n_tokens, n_features]
    };

    __device__ DenseEpilogue(const Params& params, void*, int64_t feature0)
        : features_(params.from.vectors, feature0, params.from.n_features), feature0_(feature0) {}

    template <int n_blocks>
    __device__ void tile(const float (&acc)[4 * n_blocks], const Params& params, int64_t token0) {
        const ThreadTokens tokens(token0, params.from.n_tokens);
#pragma unroll
        for (int n = 0; n < 4 * n_blocks; ++n) {
            const int j = n / 2 % 2;
            const int64_t feature = feature0_ + 8 * j;
            if (tokens.has(n / 4, n % 2) && feature < params.from.n_features)
                params.pre[tokens.at(n / 4, n % 2) * params.from.n_features + feature] =
                    features_.activation[j].scale * acc[n] + features_.activation[j].bias;
        }
    }

    __device__ void finish(const Params&, int64_t) {}

  private:
    FeaturePair<JumpRelu<float>> features_;
    int64_t feature0_;
};

/// Appends to each row's list what exceeds the row's bound; the list is complete where its count is at most its
/// capacity.
struct CandidateEpilogue {
    static constexpr bool paired = false;
    static constexpr int warp_shared_bytes = WarpList::kBytes;

    struct Params {
        PreActivations from;
        const float* bounds;  ///< [n_tokens] >= 0
        int32_t* columns;     ///< [n_tokens, capacity]
        float* values;        ///< [n_tokens, capacity]
        int* counts;          ///< [n_tokens]
        int64_t capacity;
        int64_t first_feature;  ///< column number of feature 0
    };

    __device__ CandidateEpilogue(const Params& params, void* warp_shared, int64_t feature0)
        : features_(params.from.vectors, feature0, params.from.n_features),
          list_(warp_shared),
          first_feature_(params.first_feature + feature0 - threadIdx.x % 32 / 4) {}

    template <int n_blocks>
    __device__ void tile(const float (&acc)[4 * n_blocks], const Params& params, int64_t token0) {
        constexpr int kAtOnce = 4;  // bounds are loaded before they are needed, as many as there are registers for
        const ThreadTokens tokens(token0, params.from.n_tokens);
#pragma unroll
        for (int first = 0; first < n_blocks; first += kAtOnce) {
            float bounds[kAtOnce][2];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    bounds[i][e] = tokens.has(first + i, e) ? __ldg(params.bounds + tokens.at(first + i, e)) : INFINITY;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                bool exceeds[4];
                float pre[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    // A feature past the end has a pre-activation of 0, which exceeds no bound.
                    const JumpRelu<float>& activation = features_.activation[n / 2];
                    pre[n] = activation.scale * acc[4 * (first + i) + n] + activation.bias;
                    exceeds[n] = (params.from.absolute ? fabsf(pre[n]) : pre[n]) > bounds[i][n % 2];
                }
                if (!__any_sync(kAllLanes, exceeds[0] || exceeds[1] || exceeds[2] || exceeds[3])) continue;
                list_.collect(exceeds, pre, first + i);
                if (list_.is_full()) flush(params, token0);
            }
        }
        if (list_.size() > 0) flush(params, token0);
    }

    __device__ void finish(const Params&, int64_t) {}

  private:
    __device__ void flush(const Params& params, int64_t token0) {
        list_.flush([&](int, const WarpList::Found& found) {
            const int64_t token = token0 + found.token;
            const int at = atomicAdd(params.counts + token, 1);
            if (at >= params.capacity) return;
            params.columns[token * params.capacity + at] = static_cast<int32_t>(first_feature_ + found.feature);
            params.values[token * params.capacity + at] = found.value;
        });
    }

    FeaturePair<JumpRelu<float>> features_;
    WarpList list_;
    int64_t first_feature_;
};

}  // namespace sts::cuda
