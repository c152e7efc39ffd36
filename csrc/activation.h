#pragma once
/// The activation functions, written once for both backends: V is float in CUDA and a SIMD vector on the CPU.
/// See Encoder in sts/sae_ops.h for the formulas.

#include <sts/inline.h>

namespace sts {

/// relu too: its threshold is 0. The threshold given here is already max(threshold, 0).
template <class V>
struct JumpRelu {
    V scale, bias, threshold;
    STS_INLINE V operator()(V p) const {
        const V pre = scale * p + bias;
        return pre > threshold ? pre : V{};
    }
    /// Whether the feature differs from 0.
    STS_INLINE bool fires(V p) const { return scale * p + bias > threshold; }
};

template <class V>
struct Gated {
    V scale, bias, gate_bias;
    STS_INLINE V operator()(V p) const {
        const V pre = scale * p + bias;
        const V h = pre > V{} ? pre : V{};
        return p + gate_bias > V{} ? h : V{};
    }
    STS_INLINE bool fires(V p) const { return scale * p + bias > V{} && p + gate_bias > V{}; }
};

/// A candidate for the row's k largest: `row_threshold` >= 0 bounds the k-th largest positive value from below.
template <class V>
struct TopKCandidate {
    V scale, bias, row_threshold;
    STS_INLINE V operator()(V p) const {
        const V pre = scale * p + bias;
        return pre > row_threshold ? pre : V{};
    }
};

/// The same by absolute value.
template <class V>
struct AbsTopKCandidate {
    V scale, bias, row_threshold;
    STS_INLINE V operator()(V p) const {
        const V pre = scale * p + bias;
        const V size = pre < V{} ? -pre : pre;
        return size > row_threshold ? pre : V{};
    }
};

}  // namespace sts
