"""The signed part of a forecast: which way, and how far, a training set moves each domain whose answers are known."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sts_fast.errors import InputError
from sts_fast.gradients import HookedModel, projection
from sts_fast.hooks import Hook, split_name
from sts_fast.ntk import (
    FeatureKind,
    Features,
    MapKind,
    Pull,
    Push,
    measure_pull,
    measure_push,
    pull_warnings,
    push_warnings,
)
from sts_fast.prompts import Prompt, PromptSet
from sts_fast.sae import SAE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

SignedEstimator = Literal["ntk", "step", "adapter"]
SIGNED_ESTIMATORS = get_args(SignedEstimator)
# What each of them forecasts: the change of P(answer), and the fall of the answer's loss.
SIGNED_FIELDS = tuple(f"{name}{of}" for name in SIGNED_ESTIMATORS for of in ("", "_loss"))

N_TOP_FEATURES = 20
N_BOOTSTRAP = 1000
INTERVAL = (2.5, 97.5)
BATCH_TOKENS = 8192

Tell = Callable[[str, int, int], None]


def hook_layer(hook: Hook, sae: SAE) -> int:
    """The layer whose output an SAE reads. Raises InputError for any other place than the residual stream there."""
    place, layer = split_name(hook.name)
    if place == "resid_post" and layer is not None:
        return layer
    if place == "resid_pre" and layer:
        return layer - 1
    raise InputError(
        f"signed estimators add to the residual stream after a layer, but the SAE {sae.source} reads {hook.where}: "
        "use an SAE of a resid_post hook, or leave out ntk, step and adapter"
    )


def measure_signed(
    model: HookedModel,
    sae: SAE,
    trains: Sequence[PromptSet],
    domains: Sequence[PromptSet],
    estimators: Sequence[SignedEstimator],
    *,
    kind: FeatureKind = "sae",
    batch_tokens: int | None = None,
    seed: int = 0,
    tell: Tell | None = None,
) -> dict[str, dict[str, Any]]:
    """By training set, what stands under `signed` in its scores.json; see ntk for the equations.

    trains, domains: prompts that read their answers; each is passed through the model, and back to the hook, once
    """
    budget = min(batch_tokens or BATCH_TOKENS, BATCH_TOKENS)
    features = Features(sae, kind, _centre(model, domains, budget) if kind == "raw" else None)
    Q = projection(sae.d_in, seed=seed)
    maps: list[MapKind] = [name for name in estimators if name != "ntk"]

    def told(name: str) -> Callable[[int, int], None]:
        return lambda done, total: None if tell is None else tell(f"gradients of {name}", done, total)

    pushes = [
        measure_push(
            model, features, Q, train.name, train.prompts, maps=maps, batch_tokens=budget, tell=told(train.name)
        )
        for train in trains
    ]
    pulls = [
        measure_pull(
            model, features, Q, domain.name, domain.prompts, pushes, batch_tokens=budget, tell=told(domain.name)
        )
        for domain in domains
    ]
    return {push.name: _block(i, push, pulls, features, estimators, seed) for i, push in enumerate(pushes)}


def _centre(model: HookedModel, domains: Sequence[PromptSet], batch_tokens: int) -> Doubles:
    """[d_in] mean over domains of their mean residual."""

    def mean(prompts: Sequence[Prompt]) -> Doubles:
        total, n = np.zeros(model.d_in), 0
        for rows in model.answer_rows(prompts, batch_tokens=batch_tokens):
            total += rows.x.double().sum(dim=0).numpy()
            n += len(rows.x)
        return total / n

    centre: Doubles = np.mean([mean(domain.prompts) for domain in domains], axis=0)
    return centre


def _block(
    i: int, push: Push, pulls: Sequence[Pull], features: Features, estimators: Sequence[str], seed: int
) -> dict[str, Any]:
    return {
        "features": features.kind,
        "train_loss": push.loss,
        "loss_left": {kind: found.loss_left for kind, found in push.maps.items()},
        "domains": {pull.name: _domain(i, pull, features, estimators, seed) for pull in pulls},
        "warnings": [*push_warnings(push), *(warning for pull in pulls for warning in pull_warnings(pull))],
    }


def _domain(i: int, pull: Pull, features: Features, estimators: Sequence[str], seed: int) -> dict[str, Any]:
    n = len(pull.nll)
    rng = np.random.default_rng([seed, zlib.crc32(pull.name.encode())])
    resamples = rng.multinomial(n, [1 / n] * n, size=N_BOOTSTRAP) / n
    found: dict[str, Any] = {
        "n_prompts": n,
        "base_loss": float(pull.nll.mean()),
        "p_answer": float(pull.p_answer.mean()),
    }
    for field in SIGNED_FIELDS:
        found[field] = None
        if field.removesuffix("_loss") in estimators:
            values = pull.values[field][i]
            means = np.einsum("rp,p->r", resamples, values)
            found[field] = {"value": float(values.mean()), "ci": np.percentile(means, INTERVAL).tolist()}
    if features.kind == "raw":
        return found | {"top_features": None, "share_of_top_features": None}
    contributions = pull.contributions[i]
    top = np.argsort(-np.abs(contributions), kind="stable")[:N_TOP_FEATURES]
    listed = [{"index": int(j), "contribution": float(contributions[j])} for j in top if contributions[j]]
    return found | {"top_features": listed, "share_of_top_features": _share(contributions, top)}


def _share(contributions: Doubles, top: NDArray[np.int64]) -> float:
    """Part of the summed sizes of all contributions that the top ones hold."""
    total = float(np.abs(contributions).sum())
    return float(np.abs(contributions[top]).sum()) / total if total else 0.0
