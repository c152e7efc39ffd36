#pragma once
#include <sts/tensor_view.h>

#include <memory>
#include <string>
#include <vector>

/// Streaming statistics of the features of a sparse autoencoder, without ever storing [n_tokens, d_sae]
/// features.
///
/// Every op checks all of its arguments before it changes any accumulator, and throws std::invalid_argument
/// with one sentence naming the argument at fault. Any number of threads may call ops at once, each with its own
/// accumulators. For given arguments and instruction set the results are
/// bit-identical whatever the number of threads, and whether the rows come in one call or in several.
namespace sts {

enum class Activation { relu, jumprelu, gated, topk, abstopk };
enum class InputNorm { none, layer_norm, constant_norm_rescale };

/// The encoder half of a SAE, with b_dec and every constant scale already folded in. A row x is first normalised:
///
///   none                   z = x
///   layer_norm             z = (x - mean) / (s + 1e-5), s its standard deviation over d_in - 1 degrees of freedom
///   constant_norm_rescale  z = x * sqrt(d_in) / ||x||, and 0 for a row of zeros
///
/// with mean, s and norm in float64 and z rounded to float32. With p = z · W_enc[:, j]:
///
///   pre_j      = scale[j] * p + bias[j]
///   relu       h_j = max(pre_j, 0)
///   jumprelu   h_j = pre_j where pre_j > max(threshold[j], 0), else 0
///   gated      h_j = max(pre_j, 0) where p + gate_bias[j] > 0, else 0
///   topk       h_j = max(pre_j, 0) where pre_j is among the k largest of its row, else 0;
///              of equal values the lower column wins
///   abstopk    h_j = pre_j where |pre_j| is among the k largest of its row, else 0; of equal |pre_j| the
///              lower column wins. h may be negative.
///
/// W_enc      [d_in, d_sae] f32 or bf16   borrowed: it must outlive the encoder; one of its strides is 1
/// bias       [d_sae] f32
/// scale      [d_sae] f32                 empty: 1
/// threshold  [d_sae] f32                 jumprelu only
/// gate_bias  [d_sae] f32                 gated only
/// k          1..d_sae                    topk and abstopk only, else 0
/// input_norm                             layer_norm needs d_in >= 2
///
/// The vectors are checked for NaN here; a column of W_enc is checked for NaN and infinity when an op first
/// uses it, so that a memory-mapped W_enc is not read before it is needed.
class Encoder {
  public:
    Encoder(MatrixView W_enc, Activation activation, std::vector<float> bias, std::vector<float> scale,
            std::vector<float> threshold, std::vector<float> gate_bias, int64_t k, InputNorm input_norm);
    ~Encoder();

    int64_t d_in() const { return W_enc.n_rows; }
    int64_t d_sae() const { return W_enc.n_cols; }
    /// Whether a feature depends on all columns of its row.
    bool selects_top_k() const { return activation == Activation::topk || activation == Activation::abstopk; }

    /// Throws where one of the given columns of W_enc (all columns where `columns` is null) holds a NaN or
    /// infinity.
    void check_weights(Span<const int64_t> columns) const;

    const MatrixView W_enc;
    const Activation activation;
    const int64_t k;
    const InputNorm input_norm;
    const std::vector<float> bias;
    const std::vector<float> scale;  ///< filled with 1 where none was given
    const std::vector<float> gate;   ///< gate_bias if gated, else max(threshold, 0)

  private:
    struct CheckedColumns;
    std::unique_ptr<CheckedColumns> checked_;
};

/// In all ops `columns` is null, or strictly increasing column numbers of the SAE: then only these features
/// are computed, and n_columns below is their number instead of d_sae. Activations are [n_tokens, d_in] f32
/// or bf16, with any row stride and contiguous elements in a row; n_tokens may be 0. Accumulators are added
/// to in place; the caller zeroes them once. Features are float32; every sum is taken in float64, in token
/// order.

/// Sums over paired rows, with h_a = h(base[t]), h_b = h(other[t]).
struct ShiftSums {
    Span<double> sum_sq_shift;                  ///< [n_columns] += (h_b - h_a)^2
    Span<double> sum_base, sum_other;           ///< [n_columns] += h_a, h_b; these six are all given or all null
    Span<double> sum_sq_base, sum_sq_other;     ///< [n_columns] += h_a^2, h_b^2
    Span<int64_t> n_fired_base, n_fired_other;  ///< [n_columns] += (h != 0)
    Table<double> weighted_sq_shift;            ///< [n_columns, K] += row_weights[t, k] * (h_b - h_a)^2, or null
};

/// base, other  [n_tokens, d_in]   row t is the same token, without and with the demonstrations
/// row_weights  [n_tokens, K] f64  finite; null where sums.weighted_sq_shift is
void accumulate_shift(const Encoder& encoder, const MatrixView& base, const MatrixView& other,
                      Span<const int64_t> columns, Table<const double> row_weights, const ShiftSums& sums);

struct MomentSums {
    Span<double> sum_h, sum_sq_h;  ///< [n_columns] += h, h^2
    Span<int64_t> n_fired;         ///< [n_columns] += (h != 0)
    Table<double> sum_hy;          ///< [n_columns, K] += h * targets[t, k], or null
};

/// acts     [n_tokens, d_in]
/// targets  [n_tokens, K] f64  finite; null where sums.sum_hy is
void accumulate_moments(const Encoder& encoder, const MatrixView& acts, Span<const int64_t> columns,
                        Table<const double> targets, const MomentSums& sums);

/// The active features of each row, as compressed sparse rows.
struct SparseRows {
    std::vector<int64_t> indptr;   ///< [n_tokens + 1] row t is indices/values[indptr[t] : indptr[t + 1]]
    std::vector<int32_t> indices;  ///< column numbers of the SAE, ascending within a row
    std::vector<float> values;     ///< h != 0
};

SparseRows encode_sparse(const Encoder& encoder, const MatrixView& acts, Span<const int64_t> columns);

/// Compressed sparse rows of others, as SparseRows.
struct SparseView {
    Span<const int64_t> indptr;
    Span<const int32_t> indices;
    Span<const float> values;
};

/// Sums over each prompt's tokens, as compressed sparse rows: one row a prompt, one entry a feature that fires on one
/// of its tokens, with the demonstrations or without.
struct PromptRows {
    std::vector<int64_t> indptr;                  ///< [n_prompts + 1]
    std::vector<int32_t> indices;                 ///< ascending within a row
    std::vector<int32_t> n_fired;                 ///< tokens of `base` on which h != 0
    std::vector<double> sum_h, sum_sq_h;          ///< over these, of h and h^2
    std::vector<double> sum_shift, sum_sq_shift;  ///< over pairs, of h_b - h_a and its square
    std::vector<float> strongest;                 ///< largest h of `base`, 0 where none fires
    std::vector<int32_t> strongest_at;            ///< the first of the prompt's rows with it, or -1
};

/// base          features of each token without the demonstrations
/// base_starts   [n_prompts + 1]  prompt p has rows base_starts[p] to base_starts[p + 1]
/// other         features of tokens with the demonstrations; other_starts [n_prompts + 1] likewise
/// pair_at       [n_other]        row of `base` with the same token; of the same prompt
PromptRows sum_by_prompt(const SparseView& base, Span<const int64_t> base_starts, const SparseView& other,
                         Span<const int64_t> other_starts, Span<const int64_t> pair_at, int64_t d_sae);

/// Threads that an op may use; by default all cores available to the process.
void set_num_threads(int n);
int get_num_threads();

/// A function that an op calls while it runs, at most ten times a second, on the thread that called the op; null, the
/// default: none. To abandon the op it throws. The op throws the same, and its accumulators have changed in part.
void set_poll(void (*poll)());

/// "avx512", "avx2" or "portable"; by default the best that this machine has.
std::string instruction_set();
void set_instruction_set(const std::string& name);

}  // namespace sts
