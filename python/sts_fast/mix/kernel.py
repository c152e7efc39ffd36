"""The tangent kernel between every pair of sets: how training on each moves the loss of each, to begin with."""

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
    """K[a, T] = <M_a, M_T>, see signed.push, of sets by name, prompt by prompt of T.

    values: by T, [n_sets, n_prompts] <M_a, m_prompt>, of which K[a, T] is the mean
    nll:    by T, [n_prompts] loss of each prompt's answer, in nats per token
    warnings: what a reader should know about the sets
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
    """From two passes over each set, each forward and back down to the hook, whatever the number of pairs.

    sets: prompts that read their answers
    Q:    [d_in, r] of `projection`

    All M are held at once: 67 MB a set at 7B shape (131,072 features, r = 64), where it costs 2.8 forward passes.
    """

    def told(stage: str) -> Tell:
        return lambda done, total: None if tell is None else tell(stage, done, total)

    def pushed(asked: PromptSet) -> Tell:
        return told(f"gradients of {asked.name}")

    pushes = [measure_push(model, features, Q, one.name, one.prompts, tell=pushed(one)) for one in sets]
    norms = np.asarray([push.norm for push in pushes])
    values, nll = [], []
    for one in sets:
        pull = measure_pull(
            model, features, Q, one.name, one.prompts, pushes,
            tell=told(f"kernel of {one.name}"),
        )  # fmt: skip
        values.append(norms[:, None] * pull.values["ntk_loss"])
        nll.append(pull.nll)
    return Kernel([one.name for one in sets], values, nll, push_warnings(pushes[0]))
