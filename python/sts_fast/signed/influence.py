"""Influence of single training examples: each one's part in what training on all of them does to a domain.

The gradient M_S of a training set is the mean of those of its examples, m_i, each of the example's own loss (see push).
Its first-order effect on the loss of a domain T is therefore a mean over examples too,

    ntk_loss = <M_S, M_T> / ||M_S|| = mean_i  <m_i, M_T> / ||M_S||,

whose terms are the influence of each example: above zero it lowers T's loss, below zero it raises it. (TracIn, Pruthi
et al. 2020, with one checkpoint, the base model, and the parameters of that map.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.prompts import Progress, Prompt, PromptSet
from sts_fast.errors import InputError
from sts_fast.ops.encode import encode
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features, measure_push
from sts_fast.statistics import pearson

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles

# Parts of a domain's prompts whose influences are compared.
HALVES = 2


@dataclass(frozen=True)
class Influence:
    """Influence of each training example on each domain.

    values:  [n_domains, n_prompts] fall of the domain's loss per unit of η, as `ntk_loss`, which is the mean of a row
    halves:  [n_domains, HALVES, n_prompts] the same by every other prompt of the domain alone
    nll:     [n_prompts] loss per token of each answer before training, in nats
    pulls:   of each domain [HALVES, n_features, r], whose sum is M_T, gradients projected
    norm:    ||M_S||
    """

    values: Doubles
    halves: Doubles
    nll: Doubles
    pulls: list[Doubles]
    norm: float

    def reliability(self) -> list[float | None]:
        """By domain, r of the examples' influences with those that as many other prompts of the domain would give.

        From both halves, by the formula of Spearman and Brown; None where the influences do not differ.
        """
        found: list[float | None] = []
        for first, second in self.halves:
            r = float(pearson(first, second))
            found.append(None if np.isnan(r) else 2 * r / (1 + r) if r > -1 else -1.0)
        return found


def measure_influence(
    model: HookedModel,
    features: Features,
    Q: Doubles,
    train: PromptSet,
    domains: Sequence[PromptSet],
    *,
    tell: Progress | None = None,
) -> Influence:
    """The influence of every prompt of a training set, from one pass over it, after one over each domain.

    train, domains: prompts that read their answers; Q: [d_in, r] of `projection`

    Raises InputError where a set's loss has no gradient at the hook.
    """
    prompts, n = train.prompts, len(train.prompts)
    pulls: list[Doubles] = []
    for domain in domains:
        push = measure_push(model, features, Q, domain.name, domain.prompts, n_folds=HALVES, tell=tell)
        assert push.folds is not None
        pulls.append(push.folds)

    def measure() -> dict[str, NDArray[Any]]:
        halves, nll, done = np.zeros((len(domains), HALVES, n)), np.zeros(n), 0
        M = np.zeros((features.n, Q.shape[1]))
        for rows in model.answer_rows(prompts, Q):
            along = features.times(rows.x, *(half for of_domain in pulls for half in of_domain))
            for product, values in zip(along, halves.reshape(-1, n), strict=True):
                per_token = np.einsum("tr,tr->t", product, rows.g)
                values[rows.prompts] = np.bincount(rows.prompt_of, per_token, minlength=len(rows.prompts))
            features.accumulate(M, rows.x, rows.g / n)
            nll[rows.prompts] = rows.nll
            done += len(rows.prompts)
            if tell is not None:
                tell(f"gradients of {train.name}", done, n)
        return {"halves": halves, "nll": nll, "norm": np.asarray(np.linalg.norm(M))}

    of_prompts = [prompt.read_plain for prompt in prompts]
    of = model.kept.arrays("influences", [features.sha256, Q, of_prompts, pulls], measure)
    halves, nll, norm = of["halves"], of["nll"], float(of["norm"])
    if norm == 0:
        raise InputError(
            f"the answers of '{train.name}' have no gradient at the SAE's features: none of these fires, or the loss "
            "is exactly zero; give another training set, or the SAE of this model"
        )
    halves = halves / norm
    of_domains = [domain.prompts for domain in domains]
    shares = [[len(of_domain[half::HALVES]) / len(of_domain) for half in range(HALVES)] for of_domain in of_domains]
    return Influence(halves.sum(axis=1), halves / np.asarray(shares)[:, :, None], nll, pulls, norm)


def carriers(
    model: HookedModel, features: Features, Q: Doubles, prompts: Sequence[Prompt], influence: Influence, domain: int
) -> list[dict[int, float]]:
    """Of a few prompts, each feature's part in the influence on one domain; the parts of a prompt add up to it.

    domain: its index in `influence`; the rest as for `measure_influence`
    """
    found: list[dict[int, float]] = [{} for _ in prompts]
    pull = influence.pulls[domain].sum(axis=0) / influence.norm
    for rows in model.answer_rows(prompts, Q):
        active = encode(features.sae, rows.x).on_cpu()
        token_of = np.repeat(np.arange(len(rows.x)), np.diff(active.indptr))
        of_entry = active.values * np.einsum("er,er->e", pull[active.indices], rows.g[token_of])
        for place, prompt in enumerate(rows.prompts):
            of_prompt = rows.prompt_of[token_of] == place
            indices, at = np.unique(active.indices[of_prompt], return_inverse=True)
            sums = np.bincount(at, of_entry[of_prompt], minlength=len(indices))
            found[prompt] = {int(j): float(value) for j, value in zip(indices, sums, strict=True)}
    return found
