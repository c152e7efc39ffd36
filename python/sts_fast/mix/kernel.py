"""The tangent kernel between every pair of sets: the first effect of training on each on the loss of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import Progress, PromptSet, Tell
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features, measure_pull, measure_push, push_warnings
from sts_fast.statistics import resamples

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles


@dataclass(frozen=True)
class Kernel:
    """K[a, T] = <M_a, M_T> of every pair of sets, prompt by prompt of T; see signed.push.

    values:   by T, [n_sets, n_prompts] <M_a, m_prompt>, of which K[a, T] is the mean
    nll:      by T, [n_prompts] loss of each prompt's answer, in nats per token
    warnings: remarks about the sets for the reader
    """

    names: list[str]
    values: list[Doubles]
    nll: list[Doubles]
    warnings: list[str]

    def means(self) -> tuple[Doubles, Doubles]:
        """[n_sets, n_sets] K and [n_sets] loss, over all prompts."""
        return np.stack([of.mean(axis=1) for of in self.values], axis=1), np.asarray([nll.mean() for nll in self.nll])

    def resampled(self, n: int, seed: int) -> tuple[Doubles, Doubles]:
        """[n, n_sets, n_sets] K and [n, n_sets] loss, over n resamples of each set's prompts."""
        K, loss = np.empty((n, len(self.names), len(self.names))), np.empty((n, len(self.names)))
        for i, (name, values, nll) in enumerate(zip(self.names, self.values, self.nll, strict=True)):
            drawn = resamples(len(nll), seed, name, n) / len(nll)
            K[:, :, i] = np.einsum("rp,ap->ra", drawn, values)
            loss[:, i] = np.einsum("rp,p->r", drawn, nll)
        return K, loss


def measure_kernel(
    model: HookedModel,
    features: Features,
    Q: Doubles,
    sets: Sequence[PromptSet],
    *,
    tell: Progress | None = None,
) -> Kernel:
    """The kernel, from two passes over each set, forward and back down to the hook, regardless of the number of pairs.

    sets: prompts that read their answers
    Q:    [d_in, r] of `projection`

    All M are in memory at once. At 7B shape (131,072 features, r = 64) a set takes 67 MB, and 2.8 forward passes.
    """

    def tell_of(stage: str) -> Tell:
        return lambda done, total: None if tell is None else tell(stage, done, total)

    pushes = [measure_push(model, features, Q, prompt_set.name, prompt_set.prompts, tell=tell) for prompt_set in sets]
    norms = np.asarray([push.norm for push in pushes])
    values, nll = [], []
    for prompt_set in sets:
        pull = measure_pull(
            model, features, Q, prompt_set.name, prompt_set.prompts, pushes,
            tell=tell_of(f"kernel of {prompt_set.name}"),
        )  # fmt: skip
        values.append(norms[:, None] * pull.values["ntk_loss"])
        nll.append(pull.nll)
    return Kernel([prompt_set.name for prompt_set in sets], values, nll, push_warnings(pushes[0]))
