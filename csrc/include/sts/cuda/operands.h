#pragma once
#include <sts/inline.h>

#include <cstdint>

/// What goes into a product p[feature, token] = sum over d_in of W_enc[d_in, feature] * x[token, d_in].
namespace sts::cuda {

/// Rows of operands are padded with zeros to a multiple of this many elements, so that no main loop has an edge
/// along d_in.
inline constexpr int64_t kDepth = 64;

/// A matrix split into bfloat16 parts whose sum it is, [n_rows, depth]; a row contiguous, 16-byte aligned.
///
/// For weights a row is a feature (W_enc transposed), for activations a token.
struct Operand {
    const uint16_t* parts[2];  ///< bits of hi, and of lo or null
    int64_t n_rows, row_stride;
};

/// The products of parts whose sum is p, small ones first: p = sum over terms of W.parts[w] x.parts[x].
struct Terms {
    int n;
    struct {
        int w, x;
    } term[3];
};

/// bf16: hi hi. bf16x2: every product but lo lo, of the parts that there are.
inline Terms terms_of(bool w_has_lo, bool x_has_lo) {
    Terms terms{0, {}};
    if (w_has_lo) terms.term[terms.n++] = {1, 0};
    if (x_has_lo) terms.term[terms.n++] = {0, 1};
    terms.term[terms.n++] = {0, 0};
    return terms;
}

/// One product; `other` is read where the epilogue is paired, and has base's shape.
struct Product {
    Operand W, base, other;
    Terms terms;
    int64_t depth;  ///< d_in rounded up to a multiple of kDepth
    bool floats;    ///< parts[0] is all there is, in float32

    STS_INLINE int64_t n_features() const { return W.n_rows; }
    STS_INLINE int64_t n_tokens() const { return base.n_rows; }
};

}  // namespace sts::cuda
