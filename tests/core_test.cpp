/// The core without Python, as another program embeds it: every op against the literal equations in float64. Whole
/// numbers make every product and sum exact, so that all instruction sets must give the very same features, ties
/// included. It also runs under the sanitizers (make sanitize) and on an emulated ARM machine (tests/ops/test_core.py).
#include <sts/sae_ops.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

namespace {

using sts::Activation;
using sts::DType;

int n_failures = 0, n_checks = 0;

void expect(bool ok, const std::string& what) {
    ++n_checks;
    if (!ok && ++n_failures <= 20) std::fprintf(stderr, "wrong: %s\n", what.c_str());
}

/// A matrix of small whole numbers, and the same as bf16.
struct Matrix {
    int64_t n_rows, n_cols;
    std::vector<float> values;
    std::vector<uint16_t> halves;

    Matrix(std::mt19937& random, int64_t rows, int64_t cols, int largest)
        : n_rows(rows), n_cols(cols), values(rows * cols), halves(rows * cols) {
        for (size_t i = 0; i < values.size(); ++i) {
            values[i] = static_cast<float>(static_cast<int>(random() % (2 * largest + 1)) - largest);
            uint32_t bits;
            std::memcpy(&bits, &values[i], sizeof bits);
            halves[i] = static_cast<uint16_t>(bits >> 16);
        }
    }
    double at(int64_t r, int64_t c) const { return values[r * n_cols + c]; }
    sts::MatrixView view(bool bf16 = false) const {
        return {bf16 ? static_cast<const void*>(halves.data()) : values.data(),
                bf16 ? DType::bfloat16 : DType::float32,
                n_rows,
                n_cols,
                n_cols,
                1};
    }
    /// [n_cols, n_rows] on the same memory.
    sts::MatrixView transposed(bool bf16 = false) const {
        sts::MatrixView view = this->view(bf16);
        std::swap(view.n_rows, view.n_cols);
        std::swap(view.row_stride, view.col_stride);
        return view;
    }
};

std::vector<float> whole_numbers(std::mt19937& random, int64_t n, int lowest, int highest) {
    std::vector<float> values(n);
    for (float& v : values) v = static_cast<float>(lowest + static_cast<int>(random() % (highest - lowest + 1)));
    return values;
}

struct Parameters {
    Activation activation;
    std::vector<float> bias, scale, threshold, gate_bias;
    int64_t k;
};

/// The features of one row, in float64.
std::vector<double> features(const Parameters& p, const Matrix& acts, int64_t t, const Matrix& W_enc_T) {
    const int64_t d_sae = W_enc_T.n_rows;
    std::vector<double> pre(d_sae), h(d_sae), size(d_sae);
    for (int64_t j = 0; j < d_sae; ++j) {
        double product = 0;
        for (int64_t i = 0; i < acts.n_cols; ++i) product += acts.at(t, i) * W_enc_T.at(j, i);
        pre[j] = p.scale[j] * product + p.bias[j];
        size[j] = p.activation == Activation::abstopk ? std::fabs(pre[j]) : pre[j];
        if (p.activation == Activation::relu) h[j] = std::max(pre[j], 0.0);
        if (p.activation == Activation::jumprelu) h[j] = pre[j] > std::max(p.threshold[j], 0.0f) ? pre[j] : 0;
        if (p.activation == Activation::gated) h[j] = product + p.gate_bias[j] > 0 ? std::max(pre[j], 0.0) : 0;
    }
    if (p.k == 0) return h;
    std::vector<int64_t> order(d_sae);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return size[a] > size[b]; });
    for (int64_t i = 0; i < p.k; ++i)
        h[order[i]] = p.activation == Activation::abstopk ? pre[order[i]] : std::max(pre[order[i]], 0.0);
    return h;
}

void check_ops(std::mt19937& random, Activation activation, int64_t n, int64_t d_in, int64_t d_sae, bool bf16,
               bool by_rows, bool subset, const std::string& name) {
    const Matrix base(random, n, d_in, 3), other(random, n, d_in, 3), W_T(random, d_sae, d_in, 2);
    // The same weights, stored the other way round.
    Matrix W = W_T;
    std::swap(W.n_rows, W.n_cols);
    for (int64_t i = 0; i < d_in; ++i)
        for (int64_t j = 0; j < d_sae; ++j) {
            W.values[i * d_sae + j] = W_T.values[j * d_in + i];
            W.halves[i * d_sae + j] = W_T.halves[j * d_in + i];
        }
    const bool topk = activation == Activation::topk || activation == Activation::abstopk;
    const bool jumprelu = activation == Activation::jumprelu, gated = activation == Activation::gated;
    const Parameters p{activation,
                       whole_numbers(random, d_sae, -9, 3),
                       whole_numbers(random, d_sae, 1, 3),
                       whole_numbers(random, jumprelu ? d_sae : 0, -2, 6),
                       whole_numbers(random, gated ? d_sae : 0, -5, 5),
                       topk ? std::min<int64_t>(7, d_sae) : 0};
    const sts::Encoder encoder(by_rows ? W.view(bf16) : W_T.transposed(bf16), activation, p.bias, p.scale, p.threshold,
                               p.gate_bias, p.k, sts::InputNorm::none);

    std::vector<int64_t> columns;
    for (int64_t j = 0; j < d_sae; j += subset ? 3 : 1) columns.push_back(j);
    const int64_t m = static_cast<int64_t>(columns.size()), n_targets = 3;
    const sts::Span<const int64_t> chosen{subset ? columns.data() : nullptr, subset ? m : 0};
    std::vector<double> targets(n * n_targets);
    for (double& y : targets) y = static_cast<double>(random() % 4);

    std::vector<double> wanted[6], got[6], wanted_hy(m * n_targets), got_hy(m * n_targets), moments[2];
    std::vector<double> wanted_weighted(m * n_targets), got_weighted(m * n_targets);
    for (int i = 0; i < 6; ++i) wanted[i].resize(m), got[i].resize(m);
    std::vector<int64_t> fired_a(m), fired_b(m), got_a(m), got_b(m), got_fired(m);
    sts::SparseRows wanted_rows;
    wanted_rows.indptr.push_back(0);
    for (int64_t t = 0; t < n; ++t) {
        const std::vector<double> a = features(p, base, t, W_T), b = features(p, other, t, W_T);
        for (int64_t c = 0; c < m; ++c) {
            const double h_a = a[columns[c]], h_b = b[columns[c]], d = h_b - h_a;
            const double terms[5] = {d * d, h_a, h_b, h_a * h_a, h_b * h_b};
            for (int i = 0; i < 5; ++i) wanted[i][c] += terms[i];
            fired_a[c] += h_a != 0;
            fired_b[c] += h_b != 0;
            for (int64_t k = 0; k < n_targets; ++k) {
                wanted_hy[c * n_targets + k] += targets[t * n_targets + k] * h_a;
                wanted_weighted[c * n_targets + k] += targets[t * n_targets + k] * d * d;
            }
            if (h_a == 0) continue;
            wanted_rows.indices.push_back(static_cast<int32_t>(columns[c]));
            wanted_rows.values.push_back(static_cast<float>(h_a));
        }
        wanted_rows.indptr.push_back(static_cast<int64_t>(wanted_rows.values.size()));
    }

    const auto span = [](std::vector<double>& v) { return sts::Span<double>{v.data(), int64_t(v.size())}; };
    const auto counts = [](std::vector<int64_t>& v) { return sts::Span<int64_t>{v.data(), int64_t(v.size())}; };
    const sts::Table<const double> rows{targets.data(), n, n_targets};
    sts::accumulate_shift(encoder, base.view(bf16), other.view(), chosen, rows,
                          {span(got[0]),
                           span(got[1]),
                           span(got[2]),
                           span(got[3]),
                           span(got[4]),
                           counts(got_a),
                           counts(got_b),
                           {got_weighted.data(), m, n_targets}});
    for (int i = 0; i < 5; ++i) expect(got[i] == wanted[i], name + ", sum " + std::to_string(i) + " of the shift");
    expect(got_a == fired_a && got_b == fired_b, name + ", firings of the shift");
    expect(got_weighted == wanted_weighted, name + ", weighted shift");
    for (auto& v : moments) v.resize(m);
    sts::accumulate_moments(encoder, base.view(bf16), chosen, rows,
                            {span(moments[0]), span(moments[1]), counts(got_fired), {got_hy.data(), m, n_targets}});
    expect(moments[0] == wanted[1] && moments[1] == wanted[3] && got_fired == fired_a, name + ", moments");
    expect(got_hy == wanted_hy, name + ", moments with targets");
    const sts::SparseRows sparse = sts::encode_sparse(encoder, base.view(bf16), chosen);
    expect(sparse.indptr == wanted_rows.indptr && sparse.indices == wanted_rows.indices &&
               sparse.values == wanted_rows.values,
           name + ", sparse rows");
}

void check_refusals() {
    const std::vector<float> W(6, 1), acts{1, 2, NAN};
    const sts::MatrixView W_enc{W.data(), DType::float32, 3, 2, 2, 1};
    const sts::Encoder encoder(W_enc, Activation::relu, {0, 0}, {}, {}, {}, 0, sts::InputNorm::none);
    try {
        sts::encode_sparse(encoder, {acts.data(), DType::float32, 1, 3, 3, 1}, {});
        expect(false, "a NaN is refused");
    } catch (const std::invalid_argument& error) {
        expect(std::string(error.what()).find("acts contains a NaN or infinity at row 0, column 2") == 0,
               "the sentence about a NaN");
    }
}

struct Stopped {};

void check_poll() {
    const std::vector<float> W(6, 1), acts(3 * 400, 1);
    const sts::MatrixView W_enc{W.data(), DType::float32, 3, 2, 2, 1}, rows{acts.data(), DType::float32, 400, 3, 3, 1};
    const sts::Encoder encoder(W_enc, Activation::relu, {0, 0}, {}, {}, {}, 0, sts::InputNorm::none);
    for (const int n_threads : {1, 3}) {
        sts::set_num_threads(n_threads);
        sts::set_poll([] { throw Stopped{}; });
        bool is_stopped = false;
        // The function is not called again before a tenth of a second has passed.
        for (int i = 0; i < 10'000'000 && !is_stopped; ++i) {
            try {
                sts::encode_sparse(encoder, rows, {});
            } catch (const Stopped&) {
                is_stopped = true;
            }
        }
        sts::set_poll(nullptr);
        expect(is_stopped, "an op throws what the poll throws");
        expect(sts::encode_sparse(encoder, rows, {}).values == std::vector<float>(800, 3),
               "an op after an abandoned one");
    }
}

/// Two prompts of two and one rows; the pair of the second row of the first, and a feature of `other` alone.
void check_prompts() {
    const std::vector<int64_t> indptr{0, 2, 3, 4}, other_indptr{0, 2}, base_starts{0, 2, 3}, other_starts{0, 1, 1};
    const std::vector<int32_t> indices{1, 4, 4, 0}, other_indices{2, 4};
    const std::vector<float> values{1, 2, 3, 5}, other_values{7, 1};
    const std::vector<int64_t> pair_at{1};
    const auto ints = [](const std::vector<int64_t>& some) {
        return sts::Span<const int64_t>{some.data(), static_cast<int64_t>(some.size())};
    };
    const sts::SparseView base{ints(indptr), {indices.data(), 4}, {values.data(), 4}},
        other{ints(other_indptr), {other_indices.data(), 2}, {other_values.data(), 2}};
    for (const int n_threads : {1, 3}) {
        sts::set_num_threads(n_threads);
        const sts::PromptRows rows =
            sts::sum_by_prompt(base, ints(base_starts), other, ints(other_starts), ints(pair_at), 5);
        expect(rows.indptr == std::vector<int64_t>({0, 3, 4}) && rows.indices == std::vector<int32_t>({1, 2, 4, 0}) &&
                   rows.n_fired == std::vector<int32_t>({1, 0, 2, 1}) &&
                   rows.sum_h == std::vector<double>({1, 0, 5, 5}) &&
                   rows.sum_sq_h == std::vector<double>({1, 0, 13, 25}) &&
                   rows.sum_shift == std::vector<double>({0, 7, -2, 0}) &&
                   rows.sum_sq_shift == std::vector<double>({0, 49, 4, 0}) &&
                   rows.strongest == std::vector<float>({1, 0, 3, 5}) &&
                   rows.strongest_at == std::vector<int32_t>({0, -1, 1, 0}),
               "sums by prompt");
    }
    try {
        sts::sum_by_prompt(base, ints(base_starts), other, ints(other_starts), ints({2}), 5);
        expect(false, "a pair of two prompts is refused");
    } catch (const std::invalid_argument&) {
    }
}

void check_extents() {
    const std::vector<float> W(6, 1), row{1, 2, 3};
    const sts::MatrixView W_enc{W.data(), DType::float32, 3, 2, 2, 1};
    const sts::Encoder encoder(W_enc, Activation::relu, {0, 0}, {}, {}, {}, 0, sts::InputNorm::none);
    try {
        // One row, repeated with a stride of 0 so often that the number of elements does not fit 64 bits.
        sts::encode_sparse(encoder, {row.data(), DType::float32, int64_t{1} << 62, 3, 0, 1}, {});
        expect(false, "too many elements are refused");
    } catch (const std::invalid_argument& error) {
        expect(std::string(error.what()).find("acts must have at most 2^48 elements") == 0, "the sentence about it");
    }
}

}  // namespace

int main() {
    const struct {
        Activation activation;
        const char* name;
    } activations[] = {{Activation::relu, "relu"},
                       {Activation::jumprelu, "jumprelu"},
                       {Activation::gated, "gated"},
                       {Activation::topk, "topk"},
                       {Activation::abstopk, "abstopk"}};
    const int64_t shapes[][3] = {{1, 1, 1}, {5, 7, 300}, {37, 300, 65}, {200, 13, 130}};
    for (const char* instruction_set : {"portable", "avx2", "avx512"}) {
        try {
            sts::set_instruction_set(instruction_set);
        } catch (const std::invalid_argument&) {
            std::printf("%s: not on this machine\n", instruction_set);
            continue;
        }
        std::mt19937 random(0);
        const int before = n_checks;
        for (const auto& [activation, activation_name] : activations)
            for (const auto& shape : shapes)
                for (int form = 0; form < 4; ++form) {
                    const bool bf16 = form & 1, by_rows = form & 2, subset = form == 1 || form == 2;
                    sts::set_num_threads(1 + form % 3);
                    check_ops(random, activation, shape[0], shape[1], shape[2], bf16, by_rows, subset,
                              std::string(instruction_set) + " " + activation_name + " " + std::to_string(shape[0]) +
                                  "x" + std::to_string(shape[1]) + "x" + std::to_string(shape[2]) + " form " +
                                  std::to_string(form));
                }
        std::printf("%s: %d checks\n", instruction_set, n_checks - before);
    }
    check_refusals();
    check_extents();
    check_poll();
    check_prompts();
    std::printf("%d of %d wrong\n", n_failures, n_checks);
    return n_failures ? 1 : 0;
}
