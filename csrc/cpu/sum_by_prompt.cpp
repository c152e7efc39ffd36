#include <sts/check.h>
#include <sts/sae_ops.h>

#include <algorithm>
#include <numeric>

#include "cpu/parallel.h"

namespace sts {
namespace cpu {
namespace {

/// The sums of one prompt; entry i is feature `features[i]`.
struct Sums {
    std::vector<int32_t> features, n_fired, strongest_at;
    std::vector<double> sum_h, sum_sq_h, sum_shift, sum_sq_shift;
    std::vector<float> strongest;
    std::vector<int32_t> order;  ///< entries by feature, once all are there
};

/// Finds the entry of a feature in a prompt's sums. One worker's; where[feature] is -1 between prompts.
class Entries {
  public:
    explicit Entries(int64_t d_sae) : where_(static_cast<size_t>(d_sae), -1) {}

    size_t of(int32_t feature, Sums& sums) {
        int32_t& entry = where_[static_cast<size_t>(feature)];
        if (entry < 0) {
            entry = static_cast<int32_t>(sums.features.size());
            sums.features.push_back(feature);
            sums.n_fired.push_back(0);
            sums.strongest_at.push_back(-1);
            sums.strongest.push_back(0);
            for (auto* sum : {&sums.sum_h, &sums.sum_sq_h, &sums.sum_shift, &sums.sum_sq_shift}) sum->push_back(0);
        }
        return static_cast<size_t>(entry);
    }

    void forget(const Sums& sums) {
        for (const int32_t feature : sums.features) where_[static_cast<size_t>(feature)] = -1;
    }

  private:
    std::vector<int32_t> where_;
};

void add_row(const SparseView& rows, int64_t row, int64_t at, Entries& entries, Sums& sums) {
    for (int64_t i = rows.indptr.data[row]; i < rows.indptr.data[row + 1]; ++i) {
        const float h = rows.values.data[i];
        const size_t entry = entries.of(rows.indices.data[i], sums);
        if (sums.n_fired[entry]++ == 0 || h > sums.strongest[entry]) {
            sums.strongest[entry] = h;
            sums.strongest_at[entry] = static_cast<int32_t>(at);
        }
        const double wide = h;
        sums.sum_h[entry] += wide;
        sums.sum_sq_h[entry] += wide * wide;
    }
}

void add_pair(const SparseView& base, int64_t row, const SparseView& other, int64_t other_row, Entries& entries,
              Sums& sums) {
    int64_t i = base.indptr.data[row], j = other.indptr.data[other_row];
    const int64_t i_end = base.indptr.data[row + 1], j_end = other.indptr.data[other_row + 1];
    while (i < i_end || j < j_end) {
        const bool from_base = i < i_end && (j == j_end || base.indices.data[i] <= other.indices.data[j]);
        const bool from_other = j < j_end && (i == i_end || other.indices.data[j] <= base.indices.data[i]);
        const int32_t feature = from_base ? base.indices.data[i] : other.indices.data[j];
        const double shift =
            (from_other ? double{other.values.data[j++]} : 0) - (from_base ? double{base.values.data[i++]} : 0);
        const size_t entry = entries.of(feature, sums);
        sums.sum_shift[entry] += shift;
        sums.sum_sq_shift[entry] += shift * shift;
    }
}

void check_rows_of_prompts(Span<const int64_t> starts, int64_t n_rows, const char* name) {
    check(starts.size > 0, std::string(name) + " must have an entry for each prompt and one more, got none");
    bool ok = starts.data[0] == 0 && starts.data[starts.size - 1] == n_rows;
    for (int64_t p = 1; ok && p < starts.size; ++p) ok = starts.data[p - 1] <= starts.data[p];
    check(ok, std::string(name) + " must ascend from 0 to the number of rows, " + std::to_string(n_rows));
}

void check_sparse(const SparseView& rows, int64_t d_sae, const std::string& name) {
    check_rows_of_prompts(rows.indptr, rows.indices.size, (name + "_indptr").c_str());
    check_size(rows.values.size, rows.indices.size, (name + "_values").c_str());
    for (int64_t row = 0; row + 1 < rows.indptr.size; ++row) {
        int64_t last = -1;
        bool ascends = true;
        for (int64_t i = rows.indptr.data[row]; i < rows.indptr.data[row + 1]; ++i) {
            ascends &= rows.indices.data[i] > last;
            last = rows.indices.data[i];
        }
        if (!ascends || last >= d_sae)
            check(false, name + "_indices must ascend within a row and lie below d_sae, " + std::to_string(d_sae) +
                             ", which row " + std::to_string(row) + " does not");
    }
}

}  // namespace
}  // namespace cpu

PromptRows sum_by_prompt(const SparseView& base, Span<const int64_t> base_starts, const SparseView& other,
                         Span<const int64_t> other_starts, Span<const int64_t> pair_at, int64_t d_sae) {
    using namespace cpu;
    check(d_sae > 0 && d_sae <= INT32_MAX, "d_sae must be positive, got " + std::to_string(d_sae));
    check_sparse(base, d_sae, "base");
    check_sparse(other, d_sae, "other");
    const int64_t n_base = base.indptr.size - 1, n_pairs = other.indptr.size - 1;
    check_rows_of_prompts(base_starts, n_base, "base_starts");
    check_rows_of_prompts(other_starts, n_pairs, "other_starts");
    check_size(other_starts.size, base_starts.size, "other_starts");
    check_size(pair_at.size, n_pairs, "pair_at");
    const int64_t n_prompts = base_starts.size - 1;
    for (int64_t p = 0; p < n_prompts; ++p)
        for (int64_t t = other_starts.data[p]; t < other_starts.data[p + 1]; ++t)
            if (pair_at.data[t] < base_starts.data[p] || pair_at.data[t] >= base_starts.data[p + 1])
                check(false,
                      "pair_at must name a row of the same prompt, which pair " + std::to_string(t) + " does not");

    std::vector<Sums> of_prompts(static_cast<size_t>(n_prompts));
    const int n_workers = static_cast<int>(std::min<int64_t>(get_num_threads(), std::max<int64_t>(n_prompts, 1)));
    std::vector<std::unique_ptr<Entries>> entries(static_cast<size_t>(n_workers));
    parallel_for(n_workers, n_prompts, [&](int worker, int64_t p) {
        auto& own = entries[static_cast<size_t>(worker)];
        if (!own) own = std::make_unique<Entries>(d_sae);
        Sums& sums = of_prompts[static_cast<size_t>(p)];
        for (int64_t t = base_starts.data[p]; t < base_starts.data[p + 1]; ++t) {
            poll();
            add_row(base, t, t - base_starts.data[p], *own, sums);
        }
        for (int64_t t = other_starts.data[p]; t < other_starts.data[p + 1]; ++t) {
            poll();
            add_pair(base, pair_at.data[t], other, t, *own, sums);
        }
        own->forget(sums);
        sums.order.resize(sums.features.size());
        std::iota(sums.order.begin(), sums.order.end(), 0);
        std::sort(sums.order.begin(), sums.order.end(), [&](int32_t a, int32_t b) {
            return sums.features[static_cast<size_t>(a)] < sums.features[static_cast<size_t>(b)];
        });
    });

    PromptRows rows;
    rows.indptr.push_back(0);
    for (const Sums& sums : of_prompts)
        rows.indptr.push_back(rows.indptr.back() + static_cast<int64_t>(sums.features.size()));
    const auto n_entries = static_cast<size_t>(rows.indptr.back());
    for (auto* numbers : {&rows.indices, &rows.n_fired, &rows.strongest_at}) numbers->resize(n_entries);
    for (auto* sum : {&rows.sum_h, &rows.sum_sq_h, &rows.sum_shift, &rows.sum_sq_shift}) sum->resize(n_entries);
    rows.strongest.resize(n_entries);
    parallel_for(n_workers, n_prompts, [&](int, int64_t p) {
        poll();
        const Sums& sums = of_prompts[static_cast<size_t>(p)];
        auto at = static_cast<size_t>(rows.indptr[static_cast<size_t>(p)]);
        for (const int32_t i : sums.order) {
            const auto entry = static_cast<size_t>(i);
            rows.indices[at] = sums.features[entry];
            rows.n_fired[at] = sums.n_fired[entry];
            rows.sum_h[at] = sums.sum_h[entry];
            rows.sum_sq_h[at] = sums.sum_sq_h[entry];
            rows.sum_shift[at] = sums.sum_shift[entry];
            rows.sum_sq_shift[at] = sums.sum_sq_shift[entry];
            rows.strongest[at] = sums.strongest[entry];
            rows.strongest_at[at++] = sums.strongest_at[entry];
        }
    });
    return rows;
}

}  // namespace sts
