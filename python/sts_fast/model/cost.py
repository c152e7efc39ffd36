"""Cost of forward passes, estimated before any is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.prompts import PromptSet
from sts_fast.model.memory import take
from sts_fast.model.packing import layer_sizes, shared_length

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import IntArray

# Side of the square matrices whose product tells how fast a device multiplies, and for how long it is watched.
PRODUCT_SIDE, PRODUCT_SECONDS = 1024, 0.2


class ModelSize:
    """Multiplications and bytes of a model, from its config alone.

    n_layers:      decoder layers
    layer_weights: weights in one of them, on average; embedding: those of the embedding, and of the head
    d_attention:   width of the queries
    """

    def __init__(self, config: Any) -> None:
        import torch
        from transformers import AutoModel

        text = config.get_text_config()
        with torch.device("meta"):
            model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        self.layer_weights, self.d_attention, _ = layer_sizes(model, text)
        self.n_layers: int = text.num_hidden_layers
        self.embedding: int = text.vocab_size * text.hidden_size

    def flops(self, n_layers: int, *, head: bool = False) -> float:
        """Floating-point operations for one token; attention between tokens, little of short prompts, left out."""
        return 2.0 * (self.layer_weights * n_layers + self.embedding * head)

    def n_weights(self, n_layers: int) -> float:
        return self.layer_weights * n_layers + self.embedding


def count_passes(
    prompt_set: PromptSet, budget: Callable[[int], int], *, shares: bool = True, n_models: int = 1
) -> tuple[int, int]:
    """Forward passes that reading a set takes, and the tokens in them, as ForwardPasses runs them.

    budget:   most tokens of a batch, by how many all its prompts share before them
    shares:   whether what prompts share is run once; a model that cannot be run so, needs as many tokens as they have
    n_models: read with no demonstrations, but by this many models
    """
    prompts = prompt_set.prompts
    sides = [([p.base_ids for p in prompts], [p.positions for p in prompts])] * n_models
    if n_models == 1 and prompts and all(len(p.demos_ids) for p in prompts):
        sides.append(([p.demos_ids for p in prompts], [p.paired_demos for p in prompts]))
    needed = [([ids[: int(at.max(initial=-1)) + 1] for ids, at in zip(*side, strict=True)], side[1]) for side in sides]
    shared = [shared_length(*side) if shares else 0 for side in needed]
    own = [_own_lengths(ids, n) for (ids, _), n in zip(needed, shared, strict=True)]
    n_tokens = sum(map(int, map(np.sum, own))) + sum(shared)
    n_passes = sum(-(-n // budget(n)) for n in shared if n)
    lengths = np.max(own, axis=0, initial=0)
    order = np.argsort(lengths, kind="stable").tolist()
    while order:
        batch = take(order, lengths, min(map(budget, shared)))
        order, n_passes = order[len(batch) :], n_passes + len(sides)
    return n_passes, n_tokens


def _own_lengths(ids: Sequence[IntArray], n_shared: int) -> Any:
    return np.asarray([max(0, len(sequence) - n_shared) for sequence in ids], np.int64)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a bare matrix product, watched for a fifth of a second."""
    import torch

    a = torch.ones((PRODUCT_SIDE, PRODUCT_SIDE), dtype=dtype, device=device)

    def seconds(n: int) -> float:
        started = time.perf_counter()
        for _ in range(n):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    n, took = 1, seconds(1)  # the first product sets things up
    while (took := seconds(n)) < PRODUCT_SECONDS:
        n *= 2
    return 2.0 * PRODUCT_SIDE**3 * n / took
