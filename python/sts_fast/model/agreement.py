"""Agreement of a way of running sequences with each of them run alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.ops.devices import doubled

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import IntArray

# The self-check: tokens that its sequences share, and tokens of each alone. Meanwhile the windows of sliding and
# chunked attention are cut to CHECK_WINDOW, because such short sequences would not exceed them.
CHECK_SHARED, CHECK_LENGTHS, CHECK_WINDOW = 20, (9, 4, 13), 6
CHECK_LONGEST = CHECK_SHARED + max(CHECK_LENGTHS)
# Largest relative error of a token against the sequence run alone. In half precision the median token counts, because
# the last bit may make a router send a token to another expert.
CHECK_TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}


def check_sequences(ids: Sequence[IntArray]) -> list[IntArray]:
    """Sequences of CHECK_SHARED equal tokens and CHECK_LENGTHS others, made of the first tokens of `ids`."""
    tokens = np.concatenate([sequence[:64] for sequence in ids[:8]] or [np.zeros(1, np.int32)])
    tokens = np.resize(tokens, CHECK_SHARED + sum(CHECK_LENGTHS))
    ends = np.cumsum([CHECK_SHARED, *CHECK_LENGTHS])
    return [np.concatenate([tokens[: ends[0]], tokens[a:b]]) for a, b in pairwise(ends)]


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error that rounding explains in a model of this dtype."""
    return CHECK_TOLERANCE.get(str(dtype).removeprefix("torch."), 6e-2)


def relative_error(rows: torch.Tensor, expected: torch.Tensor, *, typical: bool = False) -> float:
    """Largest relative error of a token of [n_tokens, d_in]; infinite for NaN.

    typical: the median token's instead, as always in half precision
    """
    import torch

    error = torch.linalg.vector_norm(doubled(rows) - doubled(expected), dim=-1)
    relative = error / torch.linalg.vector_norm(doubled(expected), dim=-1).clamp_min(1e-12)
    exact = rows.dtype in (torch.float32, torch.float64) and not typical
    worst = relative.max() if exact else relative.median()
    return float(worst.nan_to_num(torch.inf))
