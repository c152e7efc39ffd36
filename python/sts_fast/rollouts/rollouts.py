"""Forecasts before RL: the features that training will shift, from a policy's rewarded completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack, get_args

import numpy as np

from sts_fast.data.options import Option, shows
from sts_fast.data.prompts import PromptSet
from sts_fast.data.sets import MIN_PROMPTS, Sets, Sources, check_enough
from sts_fast.data.sources import Places
from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.dims import Shift, measure_shift
from sts_fast.forecast.options import Options, Settings
from sts_fast.forecast.plan import Plan
from sts_fast.forecast.run import Forecast
from sts_fast.forecast.score import forecasts_of, read_answers
from sts_fast.model.session import Purpose, SAESource, Session
from sts_fast.profile.projection import projection
from sts_fast.profile.read import read_profiles
from sts_fast.rollouts.dims import (
    N_FOLDS,
    Completions,
    correlation_shifts,
    gradient_shift,
    step_shift,
)
from sts_fast.rollouts.prompts import Rendering, Verified, read_completions, verified_demos, with_endings
from sts_fast.rollouts.read import Columns, Rollouts, load_rollouts
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features, MapKind, measure_push
from sts_fast.signed.signed import (
    SignedForecast,
    hook_layer,
    signed_forecasts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Way = Literal["verified", "correlation", "gradient", "step"]
WAYS: tuple[Way, ...] = get_args(Way)

# A larger share of truncated completions than this is worth a warning.
MANY_TRUNCATED = 0.1


@dataclass(frozen=True)
class RolloutSettings(Settings):
    """The options of a forecast from rollouts.

    ways:            how D_N is found: 'verified', the model's own completions with a high reward as demonstrations,
                     instead of ground truth; 'correlation', 'gradient' and 'step', see rollouts.dims
    verified_reward: smallest reward of a verified completion; by default halfway between the smallest and the largest
    """

    ways: Annotated[Sequence[Way], Option("Ways of finding the features, comma-separated.")] = WAYS
    verified_reward: Annotated[float | None, Option("Least reward of a verified completion; default: halfway.")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if "trial" in self.estimators:
            raise InputError("a trial trains on given answers, which rollouts have not: take ntk, step or adapter")


class RolloutOptions(Options, total=False):
    """`RolloutSettings` as keywords."""

    ways: Sequence[Way]
    verified_reward: float | None


@shows(RolloutSettings, RolloutOptions)
def rollouts(
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource,
    rollouts: Places | Rollouts,
    domains: Sources,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    columns: Columns | None = None,
    **options: Unpack[RolloutOptions],
) -> dict[str, Forecast]:
    """Forecasts how strongly RL will move each domain, from completions of the model and their rewards.

    model, sae, domains, demos, tokenizer: as for `score`, with one SAE
    options:  see RolloutSettings; `dims` does not apply. Signed estimators take the policy gradient of the completions
              instead of a training set's answers
    rollouts: (prompt, completion, reward) rows: a file or folder, rows in memory, or several, see load_rollouts; or
              rollouts in memory
    tuned:    the model after RL: adds a forecast 'tuned', from the true shift on the same prompts
    columns:  which columns of the file to read

    Returns a forecast by way. Raises InputError, in one sentence with the remedy, for what cannot be used.
    """
    if "dims" in options:
        raise TypeError("rollouts() takes no dims: give ways")
    settings = RolloutSettings(**options)
    ways = settings.ways
    data = rollouts if isinstance(rollouts, Rollouts) else load_rollouts(rollouts, columns or Columns())
    sets = Sets.read({"rollouts": []}, domains, demos, settings)
    for line in sets.lines():
        settings.tell_line(line)
    library = settings.opened_library()
    session = Session.open(
        model, [sae], settings,
        tokenizer=tokenizer, tuned=tuned, top_n=settings.top_n,
        purpose=Purpose(needs=[("rollouts", "a model")]),
    )  # fmt: skip
    reader, [loaded_sae] = session.reader, session.saes
    rendering = Rendering(session.template)
    data = with_endings(data, rendering)
    by_gradient = bool(settings.signed or {"gradient", "step"} & {*ways})
    if by_gradient:
        hook_layer(loaded_sae)
        if settings.signed_features != "sae":
            raise InputError("--signed-features must be sae for rollouts: D_N is chosen from rows of the same gradient")

    # All sets are prepared before the first forward pass, so that bad input is reported at once.
    verified = verified_demos(data, rendering, settings.verified_reward)
    own = _verified_prompts(verified, session, settings) if "verified" in ways else None
    plain = _plain_prompts(verified, session, settings) if tuned is not None else None
    completions = None
    if by_gradient or "correlation" in ways:
        completions = read_completions(
            data, rendering, context_length=reader.context_length, limit=settings.limit, seed=settings.seed
        )
        _check_groups(completions)
    sources = {"model": model, "tuned": tuned, "labels": settings.labels, "train": data.origin}
    plan = replace(
        Plan.make(session, settings, replace(sets, trains={}), sources, library),
        trains=[
            *([] if own is None else [own]),
            *([] if completions is None else [completions.prompt_set]),
            *([] if plain is None else [plain]),
        ],
    )
    plan.show()
    fits = session.check_fit(plan.trains[0])
    warnings = _warnings(data)

    shifts: dict[str, Shift] = {}
    if own is not None:
        shifts["verified"] = _shift(session, own, settings)
    signed: dict[str, SignedForecast] = {}
    if completions is not None:
        of_completions, by_push = _read_completions(plan, completions, ways)
        shifts |= of_completions
        # The signed forecast does not depend on D_N.
        signed = {} if by_push is None else dict.fromkeys([*shifts, "tuned"], by_push)
    if plain is not None:
        shifts["tuned"] = _shift(session, plain, replace(settings, dims="tuned"))
    [forecasts] = forecasts_of(plan, fits, [list(shifts.values())], [signed], read_answers(plan, [signed]))
    block = _block(data, verified, completions)
    return {
        way: replace(
            forecast,
            settings={**forecast.settings, "dims": way},
            rollouts={**block, "overlaps": _overlaps(shifts, way)},
            warnings=[*forecast.warnings, *warnings],
        )
        for way, forecast in forecasts.items()
    }


def _verified_prompts(verified: Verified, session: Session, settings: Settings) -> PromptSet:
    """The prompts of the rollouts, with the best verified completions as demonstrations."""
    if verified.alike and settings.shots:
        raise InputError(
            f"0 prompts have a verified completion, because all rewards are the same, {verified.lowest:g}: give the "
            "least reward of a verified completion with --verified-reward, or leave verified out of --ways"
        )
    if len(verified.demos) < settings.shots:
        raise InputError(
            f"{len(verified.demos)} prompts have a verified completion, with a reward of {verified.lowest:g} or more, "
            f"but {settings.shots} are needed as demonstrations: lower --verified-reward or --shots, or leave "
            "verified out of --ways"
        )
    prompt_set = settings.prompts(
        "verified", verified.queries, verified.demos, session.template, session.context_length,
        kind="train", show=True,
    )  # fmt: skip
    check_enough(prompt_set, session.context_length, "train")
    return prompt_set


def _plain_prompts(verified: Verified, session: Session, settings: Settings) -> PromptSet:
    """The same prompts without demonstrations, on which the true shift is measured."""
    prompt_set = settings.prompts(
        "tuned", verified.queries, verified.demos, session.template, session.context_length,
        kind="train", show=False,
    )  # fmt: skip
    check_enough(prompt_set, session.context_length, "train")
    return prompt_set


def _check_groups(completions: Completions) -> None:
    n = int(completions.group_of[-1]) + 1
    if n < MIN_PROMPTS:
        raise InputError(
            f"{n} prompts have readable completions with different rewards, but at least {MIN_PROMPTS} are needed: "
            "give more rollouts, or raise --limit"
        )


def _read_completions(
    plan: Plan, completions: Completions, ways: Sequence[Way]
) -> tuple[dict[str, Shift], SignedForecast | None]:
    """The shift of the completions by way; and their signed forecast, where signed estimators are chosen."""
    settings, reader, [sae] = plan.settings, plan.session.reader, plan.session.saes
    # One pass serves all ways.
    [read] = correlation_shifts(reader, [sae], completions, settings)
    shifts = {"correlation": read} if "correlation" in ways else {}
    maps: list[MapKind] = [
        kind for kind in get_args(MapKind) if kind in settings.signed or (kind == "step" and kind in ways)
    ]
    if not (maps or settings.signed or "gradient" in ways):
        return shifts, None
    hooked = HookedModel(
        plan.session.whole, hook_layer(sae), name=reader.name, batch_tokens=settings.batch_tokens,
        kept=plan.session.kept,
    )  # fmt: skip
    features, Q = Features(sae), projection(sae.d_in, seed=settings.seed)
    push = measure_push(
        hooked, features, Q, "rollouts", completions.prompt_set.prompts,
        objective=completions.objective, maps=maps, n_folds=N_FOLDS if "gradient" in ways else 0,
        tell=settings.tell,
    )  # fmt: skip
    if "gradient" in ways:
        shifts["gradient"] = gradient_shift(push, read, settings)
        push = replace(push, folds=None)  # eight times as large as the rest of it
    if "step" in ways:
        shifts["step"] = step_shift(hooked, sae, Q, push, read, completions, settings)
    if not settings.signed:
        return shifts, None
    signed = signed_forecasts(
        hooked, features, Q, [push], [completions.prompt_set], plan.domain_answers, settings.signed,
        seed=settings.seed, tell=settings.tell,
    )  # fmt: skip
    return shifts, signed[push.name]


def _shift(session: Session, prompt_set: PromptSet, settings: Settings) -> Shift:
    """The shift of prompts that are asked behind demonstrations, or of both models."""
    tuned = session.tuned if settings.dims == "tuned" else None
    tell = partial(settings.tell, f"shift of {prompt_set.name}")
    [profile] = read_profiles(
        session.reader, session.saes, "train", prompt_set, settings,
        tuned=tuned, library=settings.kept_profiles, tell=tell,
    )  # fmt: skip
    return measure_shift(profile, settings)


def _block(data: Rollouts, verified: Verified, completions: Completions | None) -> Document:
    """`rollouts` in scores.json, without the overlaps."""
    recorded = bool(data.read_as.get("advantage"))
    return {
        **data.counts(),
        "mean_reward": float(data.rewards.mean()),
        "n_verified": len(verified.demos),
        "verified_reward": verified.lowest,
        "advantages": "recorded" if recorded else "group-normalised rewards",
        "columns": data.read_as,
        "n_completions_read": 0 if completions is None else len(completions.group_of),
        "n_groups_read": 0 if completions is None else int(completions.group_of[-1]) + 1,
        "n_too_long": 0 if completions is None else completions.prompt_set.n_too_long,
    }


def _overlaps(shifts: Mapping[str, Shift], way: str) -> dict[str, float]:
    """Share of D_N that each other way, and the most active features, have in common with it."""
    top = shifts[way].top
    others = {name: shift.top for name, shift in shifts.items() if name != way}
    others["most_active"] = shifts[way].feature_sets["most_active"]
    return {name: len(np.intersect1d(top, other)) / len(top) for name, other in others.items()}


def _warnings(data: Rollouts) -> list[str]:
    counts, warnings = data.counts(), []
    if counts["n_truncated"] > MANY_TRUNCATED * counts["n_completions"]:
        warnings.append(
            f"{counts['n_truncated']} of {counts['n_completions']} completions were cut off: their rewards say little "
            "about the answers they would have reached"
        )
    if 2 * (counts["n_settled"] + counts["n_lone"]) > counts["n_groups"]:
        warnings.append(
            f"{counts['n_settled'] + counts['n_lone']} of {counts['n_groups']} prompts have completions of only one "
            "reward, which show nothing about what is better"
        )
    return warnings
