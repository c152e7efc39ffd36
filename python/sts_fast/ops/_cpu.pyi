"""The CPU ops: streaming statistics of SAE features, without ever storing [n_tokens, d_sae] features.

Every op checks all of its arguments before it changes an accumulator and raises ValueError with one sentence naming
the argument at fault. For given arguments and instruction set the results are bit-identical whatever the number of
threads, and whether the rows come in one call or in several. The global interpreter lock is free meanwhile.

Activations are [n_tokens, d_in] float32 or bfloat16: a numpy array, or any tensor on the CPU that speaks DLPack
(bfloat16 must, since numpy has no such dtype). Any stride between rows, contiguous elements in a row, aligned; n_tokens
may be 0. NaN, infinity and masked arrays are refused. Nothing is copied: sts_fast.sae.rows makes such rows of others.

Accumulators are C-contiguous numpy arrays, added to in place; the caller zeroes them once. None may share memory with
another argument. A signal handler runs within a tenth of a second; where it raises, as that of Ctrl-C does, the op
stops, and the accumulators have changed in part. Features are computed in
float32; every sum is taken in float64, in token order.

`columns`: strictly increasing column numbers of the SAE; only these features are computed then, and n_columns is
their number instead of d_sae.
"""

from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

class DLPackTensor(Protocol):
    """A tensor on the CPU, such as torch.Tensor."""

    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

FloatTensor: TypeAlias = NDArray[np.float32] | DLPackTensor
Columns: TypeAlias = NDArray[np.integer[Any]]

class Encoder:
    """The encoder half of an SAE, b_dec and every constant scale already folded in. A row x is first normalised,
      none                   z = x
      layer_norm             z = (x - mean) / (s + 1e-5), s its standard deviation over d_in - 1 degrees of freedom
      constant_norm_rescale  z = x * sqrt(d_in) / ||x||, and 0 for a row of zeros
    with mean, s and norm in float64 and z rounded to float32. With p = z @ W_enc[:, j], pre_j = scale[j] * p + bias[j],
      relu      h_j = max(pre_j, 0)
      jumprelu  h_j = pre_j where pre_j > max(threshold[j], 0), else 0
      gated     h_j = max(pre_j, 0) where p + gate_bias[j] > 0, else 0
      topk      h_j = max(pre_j, 0) where pre_j is among the k largest of its row, else 0; of equal values the lower
                column wins
      abstopk   h_j = pre_j where |pre_j| is among the k largest of its row, else 0; of equal |pre_j| the lower column
                wins. h may be negative.

    W_enc: [d_in, d_sae] float32 or bfloat16, contiguous along its rows or its columns (so the transpose of a
        [d_sae, d_in] array will do); borrowed, never copied: it may be memory-mapped. A column is checked for NaN
        and infinity when an op first uses it.
    bias, scale, threshold, gate_bias: [d_sae] float32, copied. scale None is 1; threshold belongs to jumprelu,
        gate_bias to gated, k (1 to d_sae) to topk and abstopk.
    input_norm: "none", "layer_norm" (d_in of 2 or more) or "constant_norm_rescale".
    """

    def __init__(
        self,
        W_enc: FloatTensor,
        bias: FloatTensor,
        *,
        activation: str,
        scale: FloatTensor | None = None,
        threshold: FloatTensor | None = None,
        gate_bias: FloatTensor | None = None,
        k: int = 0,
        input_norm: str = "none",
    ) -> None: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def k(self) -> int: ...

def accumulate_shift(
    encoder: Encoder,
    base: FloatTensor,
    other: FloatTensor,
    *,
    sum_sq_shift: NDArray[np.float64],
    sum_base: NDArray[np.float64] | None = None,
    sum_other: NDArray[np.float64] | None = None,
    sum_sq_base: NDArray[np.float64] | None = None,
    sum_sq_other: NDArray[np.float64] | None = None,
    n_fired_base: NDArray[np.int64] | None = None,
    n_fired_other: NDArray[np.int64] | None = None,
    columns: Columns | None = None,
    row_weights: NDArray[np.float64] | None = None,
    weighted_sq_shift: NDArray[np.float64] | None = None,
) -> None:
    """Adds paired rows to per-feature sums, with h_a = h(base[t]) and h_b = h(other[t]).

    base, other:  [n_tokens, d_in]; row t is the same token, without and with the demonstrations.
    sum_sq_shift: [n_columns] float64 += (h_b - h_a)^2, the features widened to float64 first.
    sum_base, sum_other, sum_sq_base, sum_sq_other: [n_columns] float64 += h_a, h_b, h_a^2, h_b^2; and
    n_fired_base, n_fired_other: [n_columns] int64 += (h != 0). These six are given all or none.
    row_weights, weighted_sq_shift: [n_tokens, K] float64, finite, and [n_columns, K] float64, given together:
        weighted_sq_shift[j, k] += row_weights[t, k] * (h_b - h_a)^2.
    """

def accumulate_moments(
    encoder: Encoder,
    acts: FloatTensor,
    targets: NDArray[np.float64] | None = None,
    *,
    sum_h: NDArray[np.float64],
    sum_sq_h: NDArray[np.float64],
    n_fired: NDArray[np.int64],
    sum_hy: NDArray[np.float64] | None = None,
    columns: Columns | None = None,
) -> None:
    """Adds rows to the moments of every feature h and to its cross-moments with K targets y.

    acts:     [n_tokens, d_in].
    sum_h, sum_sq_h: [n_columns] float64 += h, h^2.
    n_fired:  [n_columns] int64 += (h != 0).
    targets, sum_hy: [n_tokens, K] float64, finite, and [n_columns, K] float64, given together:
        sum_hy[j, k] += h_j * targets[t, k].
    """

def encode_sparse(
    encoder: Encoder, acts: FloatTensor, columns: Columns | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """The features h != 0 of each row as compressed sparse rows (indptr, indices, values).

    indptr:  [n_tokens + 1] int64; row t is indices[indptr[t] : indptr[t + 1]], and likewise values.
    indices: int32 column numbers of the SAE (also where `columns` is given), ascending within a row.
    values:  float32.
    """

def sum_by_prompt(
    base: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]],
    base_starts: NDArray[np.int64],
    other: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]],
    other_starts: NDArray[np.int64],
    pair_at: NDArray[np.int64],
    *,
    d_sae: int,
) -> tuple[
    NDArray[np.int64],
    NDArray[np.int32],
    NDArray[np.int32],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float32],
    NDArray[np.int32],
]:
    """Sums over each prompt's tokens: (indptr, indices, n_fired, sum_h, sum_sq_h, sum_shift, sum_sq_shift, strongest,
    strongest_at), compressed sparse rows of a row a prompt, with an entry for every feature that fires in it.

    base, other:  what encode_sparse gives of the tokens without, and with, the demonstrations.
    base_starts, other_starts: [n_prompts + 1]; prompt p has rows starts[p] to starts[p + 1].
    pair_at:      [n_other] the row of base with the same token, of the same prompt.

    indptr:       [n_prompts + 1]; indices ascend within a row.
    n_fired:      base tokens on which the feature fires; sum_h, sum_sq_h: of h and h^2 over them.
    sum_shift, sum_sq_shift: over pairs, of h(other) - h(base) and its square.
    strongest:    the largest h of base, 0 where the feature fires in other alone; strongest_at: the place among the
        prompt's base rows of the first token with it, -1 where there is none.
    """

def set_num_threads(n: int) -> None:
    """How many threads an op may use, at least 1; by default all cores available to the process."""

def get_num_threads() -> int: ...
def instruction_set() -> str:
    """ "avx512", "avx2" or "portable": what the products run on, by default the best of this machine."""

def set_instruction_set(name: str) -> None:
    """Chooses another instruction set; ValueError where this machine lacks it."""
