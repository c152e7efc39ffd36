// Which features of an SAE fire on two tokens, and how far demonstrations shift them.
#include <inttypes.h>
#include <stdio.h>
#include <sts/c_api.h>

// Row by row: W_enc [d_in 2, d_sae 3], and activations [n_tokens 2, d_in 2].
static const float W_enc[] = {1, 0, 1, 0, 1, -1}, bias[] = {0, -1, 0};
static const float base[] = {1, 2, 3, 0}, other[] = {2, 2, 0, 1};

int main(void) {
    const sts_matrix weights = {W_enc, STS_FLOAT32, 2, 3, 3, 1};
    const sts_matrix base_rows = {base, STS_FLOAT32, 2, 2, 2, 1}, other_rows = {other, STS_FLOAT32, 2, 2, 2, 1};
    double sum_sq_shift[3] = {0};
    const sts_shift_sums sums = {.sum_sq_shift = sum_sq_shift};
    sts_encoder* encoder = NULL;
    sts_sparse_rows* active = NULL;

    sts_status status = sts_encoder_create(&weights, STS_RELU, bias, NULL, NULL, NULL, 0, STS_NO_NORM, &encoder);
    if (status == STS_OK) status = sts_encode_sparse(encoder, &base_rows, NULL, 0, &active);
    if (status == STS_OK) status = sts_accumulate_shift(encoder, &base_rows, &other_rows, NULL, 0, NULL, 0, &sums);
    if (status == STS_OK) {
        const int64_t* indptr = sts_sparse_rows_indptr(active);
        for (int t = 0; t < 2; ++t)
            for (int64_t i = indptr[t]; i < indptr[t + 1]; ++i)
                printf("token %d: feature %" PRId32 " = %g\n", t, sts_sparse_rows_indices(active)[i],
                       sts_sparse_rows_values(active)[i]);
        printf("shift: %g %g %g\n", sum_sq_shift[0], sum_sq_shift[1], sum_sq_shift[2]);
    } else {
        fprintf(stderr, "error: %s\n", sts_last_error());
    }
    sts_sparse_rows_free(active);
    sts_encoder_free(encoder);
    return status;
}
