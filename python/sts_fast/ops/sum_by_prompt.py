"""Sums of sparse features over the tokens of each prompt, by our kernels where they serve and else on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sts_fast.ops import _cpu, backend, cuda
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
    if backend.kernels_serve(base.values):
        sums = cuda.sum_by_prompt(base.parts, base_starts, other.parts, other_starts, pair_at, d_sae=base.d_sae)
        return tuple(values.cpu().numpy() for values in sums)
    on_cpu = base.on_cpu().parts, base_starts, other.on_cpu().parts, other_starts, pair_at
    return _cpu.sum_by_prompt(*on_cpu, d_sae=base.d_sae)
