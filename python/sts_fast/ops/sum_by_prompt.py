"""Sums of sparse features over the tokens of each prompt, where the features are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.ops import _cpu, cuda
from sts_fast.sae.features import SparseFeatures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Counts


def sum_by_prompt(
    base: SparseFeatures, base_starts: Counts, other: SparseFeatures, other_starts: Counts, pair_at: Counts
) -> tuple[NDArray[Any], ...]:
    """What _cpu.sum_by_prompt gives, as numpy arrays; the same, bit for bit, on the CPU and on a CUDA device.

    base, other: features of the tokens without and with the demonstrations, on one device
    base_starts, other_starts: [n_prompts + 1] int64; prompt p has rows starts[p] to starts[p + 1]
    pair_at:     [n_other] int64, the row of base with the same token, of the same prompt

    Raises ValueError, naming the argument, for what is not such.
    """
    on_cpu = isinstance(base.values, np.ndarray)
    run: Any = _cpu.sum_by_prompt if on_cpu else cuda.sum_by_prompt
    sums = run(base.parts, base_starts, other.parts, other_starts, pair_at, d_sae=base.d_sae)
    return sums if on_cpu else tuple(values.cpu().numpy() for values in sums)
