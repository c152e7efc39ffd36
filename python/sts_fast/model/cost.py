"""Cost of forward passes, estimated before any is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.model.lengths import ANY_LENGTH, LengthRule, Regime
from sts_fast.model.memory import take
from sts_fast.model.packing import layer_sizes, shared_length
from sts_fast.ops.devices import synchronize

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from sts_fast.statistics import IntArray

# Side of the square matrices whose product tells how fast a device multiplies, and for how long it is watched.
PRODUCT_SIDE, PRODUCT_SECONDS = 1024, 0.2


class ModelSize:
    """Weights of a model.

    n_layers:      decoder layers
    layer_weights: weights in one of them, on average; embedding: those of the embedding, and of the head
    """

    def __init__(self, model: torch.nn.Module) -> None:
        text = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.layer_weights, _, _ = layer_sizes(model, text)
        self.n_layers: int = text.num_hidden_layers
        self.embedding: int = text.vocab_size * text.hidden_size

    def flops(self, n_layers: int) -> float:
        """Floating-point operations for one token; attention between tokens, little of short prompts, left out."""
        return 2.0 * self.layer_weights * n_layers

    @property
    def head_flops(self) -> float:
        """The same of the head, for one token of an answer."""
        return 2.0 * self.embedding

    def n_weights(self, n_layers: int) -> float:
        return self.layer_weights * n_layers + self.embedding


def count_passes(
    prompt_set: PromptSet, budget: Callable[[int], int], *, n_models: int = 1, rule: LengthRule = ANY_LENGTH
) -> tuple[int, int]:
    """Forward passes that reading a set takes, and the tokens in them, where the start that prompts share is run once.

    ForwardPasses runs all models so whose self-check allows it; the others need as many tokens as the prompts have.

    budget:   most tokens of a batch, by how many tokens all its prompts share before them
    n_models: read with no demonstrations, but by this many models
    rule:     of the lengths that may be run together
    """
    of_draws: dict[int, list[Prompt]] = {}
    for prompt in prompt_set.prompts:
        of_draws.setdefault(prompt.draw, []).append(prompt)
    counts = [_count(prompts, budget, n_models, rule) for prompts in of_draws.values()]
    return sum(n_passes for n_passes, _ in counts), sum(n_tokens for _, n_tokens in counts)


def _count(prompts: Sequence[Prompt], budget: Callable[[int], int], n_models: int, rule: LengthRule) -> tuple[int, int]:
    sides = [([p.base_ids for p in prompts], [p.positions for p in prompts])] * n_models
    if n_models == 1 and all(len(p.demos_ids) for p in prompts):
        sides.append(([p.demos_ids for p in prompts], [p.paired_demos for p in prompts]))
    needed = [
        ([rule.needed(ids, int(at.max(initial=-1)) + 1) for ids, at in zip(*side, strict=True)], side[1])
        for side in sides
    ]
    shared = [_served(ids, shared_length(ids, at), rule) for ids, at in needed]
    own = [_own_lengths(ids, n, rule) for (ids, _), n in zip(needed, shared, strict=True)]
    n_tokens = sum(map(int, map(np.sum, own))) + sum(shared)
    n_passes = sum(-(-n // budget(n)) for n in shared if n)
    lengths = np.max(own, axis=0, initial=0)
    alike: dict[tuple[Regime, ...], list[int]] = {}
    for i in np.argsort(lengths, kind="stable").tolist():
        alike.setdefault(tuple(rule.regime(len(ids[i])) for ids, _ in needed), []).append(i)
    for order in alike.values():
        while order:
            batch = take(order, lengths, min(map(budget, shared)))
            order, n_passes = order[len(batch) :], n_passes + len(sides)
    return n_passes, n_tokens


def _served(ids: Sequence[IntArray], n_shared: int, rule: LengthRule) -> int:
    """n_shared; 0 where fewer than two sequences can be run behind a start of that length."""
    same = sum(len(sequence) > 0 and rule.regime(len(sequence)) == rule.regime(n_shared) for sequence in ids)
    return n_shared if same >= 2 else 0


def _own_lengths(ids: Sequence[IntArray], n_shared: int, rule: LengthRule) -> NDArray[np.int64]:
    before = [n_shared if rule.regime(len(sequence)) == rule.regime(n_shared) else 0 for sequence in ids]
    return np.asarray([max(0, len(sequence) - n) for sequence, n in zip(ids, before, strict=True)], np.int64)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a bare matrix product, watched for a fifth of a second."""
    import torch

    a = torch.ones((PRODUCT_SIDE, PRODUCT_SIDE), dtype=dtype, device=device)

    def seconds(n: int) -> float:
        started = time.perf_counter()
        for _ in range(n):
            a @ a
        synchronize(device)
        return time.perf_counter() - started

    seconds(1)  # the first product sets things up
    n = 1
    while (took := seconds(n)) < PRODUCT_SECONDS:
        n *= 2
    return 2.0 * PRODUCT_SIDE**3 * n / took
