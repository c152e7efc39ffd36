"""Zeroes features at the hook and scores the answers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.prompts import PromptSet
from sts_fast.errors import InputError
from sts_fast.forecast.controls import N_NEAREST, like_activity, low_shift, random_sets
from sts_fast.ops.encode import encode
from sts_fast.profile.means import FeatureMeans
from sts_fast.sae import SAE
from sts_fast.sae.features import SparseFeatures
from sts_fast.signed.gradients import AnswerRows, HookedModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles, Indices

NOTHING, TOP, CONTROLS = "none", "top", ("random", "like_activity", "low_shift")
OUTCOMES = ("loss", "p_answer", "accuracy")
# The least shifted features are drawn from a pool this many times as large.
LOW_SHIFT_POOL = 4


def draw_features(
    means: FeatureMeans,
    top: Indices,
    n_draws: int,
    seed: int,
    *,
    few_shot: bool = False,
) -> dict[str, list[Indices]]:
    """Sets of features to be zeroed, ascending, by condition: D_N itself, and n_draws sets of each control.

    few_shot: compare activity after demonstrations, not without them

    Raises InputError where too few features lie outside D_N.
    """
    importance, activity, n_fired = means.importance, means.activation, means.n_fired
    if few_shot:
        activity = means.activation + means.shift
        n_fired = (activity != 0).astype(np.int64)
    if len(importance) < 2 * len(top) + N_NEAREST:
        raise InputError(
            f"{len(top)} of the SAE's {len(importance)} features leave too few others to compare with: lower --top-n"
        )
    rng = np.random.default_rng([seed, zlib.crc32(b"ablation")])
    # low_shift returns as many features as it is given, so `top` is repeated.
    least = low_shift(importance, n_fired, np.resize(top, LOW_SHIFT_POOL * len(top)))
    return {
        TOP: [np.sort(top)],
        "random": list(random_sets(len(importance), top, rng, n_draws)),
        "like_activity": [like_activity(activity, top, rng) for _ in range(n_draws)],
        "low_shift": [np.sort(rng.choice(least, min(len(top), len(least)), replace=False)) for _ in range(n_draws)],
    }


@dataclass(frozen=True)
class Measured:
    """Answers of a set: [n_draws, n_prompts] by condition, NOTHING among them.

    nll:     nats per token of the answer; exact: whether each token is the model's first choice
    removed: by condition [n_draws], the squared length of what was removed over that of the residuals
    """

    prompt_set: PromptSet
    n_answer: NDArray[np.int64]
    nll: dict[str, Doubles]
    exact: dict[str, Doubles]
    removed: dict[str, Doubles]

    def outcomes(self, condition: str = NOTHING) -> dict[str, Doubles]:
        nll = self.nll[condition]
        return {"loss": nll, "p_answer": np.exp(-nll * self.n_answer), "accuracy": self.exact[condition]}


def measure(model: HookedModel, sae: SAE, prompt_set: PromptSet, drawn: Mapping[str, list[Indices]]) -> Measured:
    """The answers of a set, with nothing and with each set of features zeroed.

    prompt_set: prompts that read their answers; drawn: by condition, n_draws sets of features [n], as of draw_features
    """
    columns = np.unique(np.concatenate([features for draws in drawn.values() for features in draws]))
    written, of_prompts = sae.decoder_rows(columns.tolist()), [prompt.read_plain for prompt in prompt_set.prompts]
    of = model.kept.arrays(
        "ablations",
        [sae.fingerprint, None if written is None else written.numpy(), of_prompts, drawn],
        lambda: _measured(model, sae, prompt_set, drawn, columns),
    )
    parts = {
        what: {name: of[f"{what}.{name}"] for name in (NOTHING, *drawn) if f"{what}.{name}" in of}
        for what in ("nll", "exact", "removed")
    }
    return Measured(prompt_set, of["n_answer"], **parts)


def _measured(
    model: HookedModel, sae: SAE, prompt_set: PromptSet, drawn: Mapping[str, list[Indices]], columns: Indices
) -> dict[str, NDArray[Any]]:
    """Parts of Measured, and of these by condition, such as 'nll.top'; columns: all features that are zeroed."""
    prompts = prompt_set.prompts
    conditions = {NOTHING: [np.empty(0, np.int64)], **drawn}
    nll = {name: np.zeros((len(draws), len(prompts))) for name, draws in conditions.items()}
    exact = {name: np.zeros((len(draws), len(prompts))) for name, draws in conditions.items()}
    removed = {name: np.zeros(len(draws)) for name, draws in drawn.items()}
    n_answer, total = np.zeros(len(prompts), np.int64), 0.0
    for rows in model.answer_rows(prompts):
        active = encode(sae, rows.x, columns)
        n_answer[rows.prompts] = rows.n_answer
        total += float((rows.x.double() ** 2).sum())
        for name, draws in conditions.items():
            for i, features in enumerate(draws):
                written = _written(sae, rows, active, features)
                of_batch = model.answers_from_hook(rows, prompts, -written)
                nll[name][i, rows.prompts], exact[name][i, rows.prompts] = of_batch
                if name in removed:
                    removed[name][i] += float((written**2).sum())
    removed = {name: sums / total if total else sums for name, sums in removed.items()}
    parts: dict[str, dict[str, Doubles]] = {"nll": nll, "exact": exact, "removed": removed}
    return {
        "n_answer": n_answer,
        **{f"{what}.{name}": values for what, of in parts.items() for name, values in of.items()},
    }


def _written(sae: SAE, rows: AnswerRows, active: SparseFeatures, features: Indices) -> Any:
    """[n_tokens, d_in] float64 sum_{j in features} h_j(x) W_dec[j]."""
    chosen = np.isin(active.indices, features)
    row_of = np.repeat(np.arange(len(rows.x)), np.diff(active.indptr))[chosen]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(rows.x)))])
    return sae.written(rows.x, (indptr, active.indices[chosen], active.values[chosen])).double()
