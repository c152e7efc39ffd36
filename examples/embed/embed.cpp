// Which features of an SAE fire on two tokens, and how far demonstrations shift them.
#include <sts/sae_ops.h>

#include <cstdio>
#include <exception>
#include <vector>

int main() try {
    // Row by row: W_enc [d_in 2, d_sae 3], and activations [n_tokens 2, d_in 2].
    const std::vector<float> W_enc{1, 0, 1, 0, 1, -1}, base{1, 2, 3, 0}, other{2, 2, 0, 1};
    const auto rows = [](const std::vector<float>& values, int64_t n_cols) {
        const int64_t n_rows = static_cast<int64_t>(values.size()) / n_cols;
        return sts::MatrixView{values.data(), sts::DType::float32, n_rows, n_cols, n_cols, 1};
    };
    const sts::Encoder encoder(rows(W_enc, 3), sts::Activation::relu, {0, -1, 0}, {}, {}, {}, 0, sts::InputNorm::none);

    const sts::SparseRows active = sts::encode_sparse(encoder, rows(base, 2), {});
    for (size_t t = 0; t + 1 < active.indptr.size(); ++t)
        for (int64_t i = active.indptr[t]; i < active.indptr[t + 1]; ++i)
            std::printf("token %zu: feature %d = %g\n", t, active.indices[i], active.values[i]);

    std::vector<double> sum_sq_shift(3);
    sts::accumulate_shift(encoder, rows(base, 2), rows(other, 2), {}, {},
                          {{sum_sq_shift.data(), 3}, {}, {}, {}, {}, {}, {}, {}});
    std::printf("shift: %g %g %g\n", sum_sq_shift[0], sum_sq_shift[1], sum_sq_shift[2]);
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
