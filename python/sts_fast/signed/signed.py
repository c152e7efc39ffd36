"""The signed part of a forecast: which way, and how far, a training set moves each domain whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import numpy as np

from sts_fast.data.prompts import Progress, Prompt, PromptSet, Tell
from sts_fast.errors import InputError
from sts_fast.model.explain import N_FEATURES, Firings
from sts_fast.model.log import AnswerLog, PromptLog
from sts_fast.ops.encode import encode
from sts_fast.places import split_name
from sts_fast.profile.projection import projection
from sts_fast.sae import SAE
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import (
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
from sts_fast.signed.small_areas import Domain, domain_means
from sts_fast.signed.trial import Trial
from sts_fast.signed.trial import values as trial_values
from sts_fast.statistics import mean_interval, resamples

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles

SignedEstimator = Literal["ntk", "step", "adapter", "trial"]
SIGNED_ESTIMATORS = get_args(SignedEstimator)
# They need one backward pass to the hook, or a map there.
AT_THE_HOOK: tuple[SignedEstimator, ...] = ("ntk", "step", "adapter")
# What each of them forecasts: the change of P(answer), and the fall of the answer's loss.
SIGNED_FIELDS = tuple(f"{name}{of}" for name in SIGNED_ESTIMATORS for of in ("", "_loss"))

N_TOP_FEATURES = 20
# Prompts of each domain in which the features that carry a forecast are looked for.
EXAMPLE_PROMPTS = 64
# What is kept of each firing: its feature, the prompt and the position of its token, and its size.
FIRING_PARTS = ("features", "prompts", "positions", "values")


class ContributionBlock(TypedDict):
    """A feature's part in the ntk_loss of a domain."""

    index: int
    contribution: float


class SignedDomainBlock(TypedDict):
    """Basis of the signed forecast of a domain.

    gradient_cosine: None where no gradient was taken; top_features: None for maps that are not written in features
    """

    n_prompts: int
    base_loss: float
    p_answer: float
    gradient_cosine: float | None
    top_features: list[ContributionBlock] | None
    share_of_top_features: float | None


class CarrierBlock(TypedDict):
    """A feature that carries forecasts; promoted_tokens, neuronpedia and label are None where not looked up."""

    index: int
    share: float
    promoted_tokens: list[str] | None
    neuronpedia: str | None
    label: str | None


class TrialDomainBlock(TypedDict):
    """Basis of a trial's forecast of a domain: the prompts asked again, their mean fall of the loss, and the share of
    this domain's own prompts in trial_loss, the rest of which is what the base losses of all domains foretell."""

    n_prompts: int
    mean_fall: float
    own_share: float


class TrialBlock(TypedDict):
    """A trial: its steps, the rows it was trained on, and the loss of the first of their answers before and after.

    n_prompts: most of a domain that are asked again; 0 for all
    """

    n_steps: int
    n_prompts: int
    n_rows: int
    loss_before: float
    loss_after: float
    domains: dict[str, TrialDomainBlock]


class SignedBlock(TypedDict):
    """`signed` in scores.json.

    features:  what maps at the hook are written in; None where there is only a trial
    train_loss: of the training set's answers before training, in nats per token; with a trial alone, of its first rows
    loss_left: share of the training set's loss, by kind of map; trial: None where there was none
    """

    features: str | None
    train_loss: float
    loss_left: dict[str, float]
    trial: TrialBlock | None
    domains: dict[str, SignedDomainBlock]
    top_features: list[CarrierBlock]


@dataclass(frozen=True)
class SignedForecast:
    """The signed forecasts of one training set.

    block:    `signed` in scores.json; its top_features are not yet looked up
    scores:   by domain and field, its value and interval
    warnings: what a reader should know
    prompts:  rows of prompts.parquet, one for each answered prompt of the training set and of the domains
    firings:  where the features that carry the forecasts fire in the domains' prompts
    answers:  how well the base model answers each domain, whatever the training set
    """

    block: SignedBlock
    scores: dict[str, dict[str, tuple[float, tuple[float, float]]]]
    warnings: list[str]
    prompts: pa.Table
    firings: Firings
    answers: dict[str, AnswerLog]


def hook_layer(sae: SAE) -> int:
    """The layer whose output an SAE reads. Raises InputError for any other place than the residual stream there."""
    place, layer = split_name(sae.hook_name)
    if place == "resid_post" and layer is not None:
        return layer
    if place == "resid_pre" and layer:
        return layer - 1
    raise InputError(
        f"signed estimators and ablations change the residual stream after a layer, but the SAE {sae.source} reads at "
        f"{sae.hook_name}: use an SAE of a resid_post hook, or leave out ntk, step and adapter"
    )


def measure_signed(
    model: HookedModel,
    sae: SAE,
    trains: Sequence[PromptSet],
    domains: Sequence[PromptSet],
    estimators: Sequence[SignedEstimator],
    *,
    kind: FeatureKind = "sae",
    seed: int = 0,
    tell: Progress | None = None,
) -> dict[str, SignedForecast]:
    """By training set, which way each domain moves; see push for the equations.

    trains, domains: prompts that read their answers; each is passed through the model, and back to the hook, once
    """
    features = Features(sae, kind, _centre(model, domains) if kind == "raw" else None)
    Q = projection(sae.d_in, seed=seed)
    maps: list[MapKind] = [kind for kind in get_args(MapKind) if kind in estimators]

    pushes = [measure_push(model, features, Q, train.name, train.prompts, maps=maps, tell=tell) for train in trains]
    return signed_forecasts(model, features, Q, pushes, trains, domains, estimators, seed=seed, tell=tell)


def signed_forecasts(
    model: HookedModel,
    features: Features,
    Q: Doubles,
    pushes: Sequence[Push],
    trains: Sequence[PromptSet],
    domains: Sequence[PromptSet],
    estimators: Sequence[SignedEstimator],
    *,
    seed: int = 0,
    tell: Progress | None = None,
) -> dict[str, SignedForecast]:
    """By training set, which way each domain moves, from its push and one pass over each domain."""
    pulls = [
        measure_pull(
            model,
            features,
            Q,
            domain.name,
            domain.prompts,
            pushes,
            tell=_tell_for(tell, domain.name),
        )
        for domain in domains
    ]
    blocks = [_block(i, push, pulls, features) for i, push in enumerate(pushes)]
    carriers = [[feature["index"] for feature in block["top_features"][:N_FEATURES]] for block in blocks]
    firings = [Firings(np.asarray(indices, np.int64), "signed") for indices in carriers]
    for domain in domains:
        _find_firings(model, features.sae, domain, firings)
    answers = {
        domain.name: AnswerLog(domain, pull.nll * pull.n_answer, pull.n_answer, pull.exact)
        for domain, pull in zip(domains, pulls, strict=True)
    }
    return {
        push.name: SignedForecast(
            block,
            {pull.name: _scores(pull.name, _asked(i, pull, estimators), seed) for pull in pulls},
            [*push_warnings(push), *pull_warnings(pulls)],
            _prompt_table(i, train, push, domains, pulls),
            train_firings,
            answers,
        )
        for i, (train, push, block, train_firings) in enumerate(zip(trains, pushes, blocks, firings, strict=True))
    }


def _find_firings(model: HookedModel, sae: SAE, domain: PromptSet, firings: Sequence[Firings]) -> None:
    columns = np.unique(np.concatenate([train_firings.features for train_firings in firings]))
    if not len(columns):
        return
    prompts = domain.prompts[:EXAMPLE_PROMPTS]

    def find() -> dict[str, NDArray[Any]]:
        parts: list[tuple[NDArray[Any], ...]] = []
        for rows in model.hook_rows(prompts):
            active = encode(sae, rows.x, columns)
            prompt_of = np.asarray(rows.prompts)[rows.prompt_of]
            positions = rows.at.cpu().numpy() % rows.ids.shape[1]
            row_of = np.repeat(np.arange(len(positions)), np.diff(active.indptr))
            parts.append((active.indices, prompt_of[row_of], positions[row_of], active.values))
        found = [np.concatenate(part) for part in zip(*parts, strict=True)]
        order = np.lexsort((found[2], found[1]))
        return {name: part[order] for name, part in zip(FIRING_PARTS, found, strict=True)}

    of_prompts = [prompt.read_plain for prompt in prompts]
    found = model.kept.arrays("firings", [sae.fingerprint, columns, of_prompts], find)
    for train_firings in firings:
        train_firings.add(domain, *(found[part] for part in FIRING_PARTS))


def _asked(i: int, pull: Pull, estimators: Sequence[SignedEstimator]) -> dict[str, Doubles]:
    return {field: of[i] for field, of in pull.values.items() if field.removesuffix("_loss") in estimators}


def with_trial(
    forecast: SignedForecast | None,
    trial: Trial,
    domains: Sequence[PromptSet],
    answers: Mapping[str, AnswerLog],
) -> SignedForecast:
    """A signed forecast with that of a trial; forecast: None where there is no other.

    domains: those of the trial; answers: by domain, those of the base model
    """
    import pyarrow as pa

    forecast = forecast or _trial_alone(trial, domains, answers)
    changes = {domain.name: trial_values(answers[domain.name], trial.domains[domain.name]) for domain in domains}
    base = {"trial": {name: of.p_answer for name, of in answers.items()}}
    base["trial_loss"] = {name: of.loss for name, of in answers.items()}
    means = {
        field: domain_means([_area(changes[domain.name][field], base[field][domain.name]) for domain in domains])
        for field in base
    }
    scores = {
        domain.name: forecast.scores.get(domain.name, {})
        | {field: (float(of.values[i]), of.interval(i)) for field, of in means.items()}
        for i, domain in enumerate(domains)
    }
    for name, of_domain in scores.items():
        p = float(answers[name].p_answer.mean())  # which can neither fall below 0 nor rise above 1
        value, low, high = np.clip([of_domain["trial"][0], *of_domain["trial"][1]], -p, 1 - p).tolist()
        of_domain["trial"] = value, (low, high)
    falls = {name: of["trial_loss"][~np.isnan(of["trial_loss"])] for name, of in changes.items()}
    of_trial: TrialBlock = {
        "n_steps": trial.design.n_steps,
        "n_prompts": trial.design.n_prompts,
        "n_rows": len(trial.train.prompts),
        "loss_before": float(np.nanmean(trial.nll)),
        "loss_after": float(np.nanmean(trial.nll_after)),
        "domains": {
            domain.name: {
                "n_prompts": len(falls[domain.name]),
                "mean_fall": float(falls[domain.name].mean()),
                "own_share": float(means["trial_loss"].own_share[i]),
            }
            for i, domain in enumerate(domains)
        },
    }
    rows = [_rows("trial_train", trial.train, trial.nll, {})]
    rows += [_rows("trial", domain, answers[domain.name].loss, changes[domain.name]) for domain in domains]
    return replace(
        forecast,
        block={**forecast.block, "trial": of_trial},
        scores=scores,
        prompts=pa.concat_tables([forecast.prompts, *rows]),
    )


def _area(change: Doubles, base: Doubles) -> Domain:
    asked = ~np.isnan(change)
    return Domain(change[asked], base[asked], base)


def _trial_alone(trial: Trial, domains: Sequence[PromptSet], answers: Mapping[str, AnswerLog]) -> SignedForecast:
    """What is known of the domains without a gradient or a map at the hook."""
    of_domains: dict[str, SignedDomainBlock] = {
        domain.name: {
            "n_prompts": len(domain.prompts),
            "base_loss": float(answers[domain.name].loss.mean()),
            "p_answer": float(answers[domain.name].p_answer.mean()),
            "gradient_cosine": None,
            "top_features": None,
            "share_of_top_features": None,
        }
        for domain in domains
    }
    block: SignedBlock = {
        "features": None,
        "train_loss": float(np.nanmean(trial.nll)),
        "loss_left": {},
        "trial": None,
        "domains": of_domains,
        "top_features": [],
    }
    no_rows = _rows("trial", trial.train, trial.nll, {}).slice(0, 0)
    return SignedForecast(block, {}, [], no_rows, Firings(np.zeros(0, np.int64), "signed"), dict(answers))


def _prompt_table(
    i: int, train: PromptSet, push: Push, domains: Sequence[PromptSet], pulls: Sequence[Pull]
) -> pa.Table:
    """Rows of the stages 'signed_train' and 'signed'; `positions` are those of the answer, the values the prompt's."""
    import pyarrow as pa

    tables = [_rows("signed_train", train, push.nll, {})]
    for domain, pull in zip(domains, pulls, strict=True):
        tables.append(_rows("signed", domain, pull.nll, {field: values[i] for field, values in pull.values.items()}))
    return pa.concat_tables(tables)


def _rows(stage: str, prompt_set: PromptSet, nll: Doubles, values: Mapping[str, Doubles]) -> pa.Table:
    """A stage's rows of prompts.parquet, null for NaN; nll: [n_prompts] per token; values: by field, [n_prompts]."""
    import pyarrow as pa

    log = PromptLog(prompt_set)
    log.kept = [np.ones(len(prompt.positions), bool) for prompt in prompt_set.prompts]
    n_answer = np.asarray([len(prompt.positions) for prompt in prompt_set.prompts])
    table = log.table(stage, {"answer_nll_sum": pa.array(nll * n_answer, from_pandas=True)})
    for field in SIGNED_FIELDS:
        of_field = values.get(field)
        column = pa.nulls(len(nll), pa.float64()) if of_field is None else pa.array(of_field, from_pandas=True)
        table = table.append_column(field, column)
    return table


def _tell_for(tell: Progress | None, name: str) -> Tell | None:
    return None if tell is None else lambda done, total: tell(f"gradients of {name}", done, total)


def _centre(model: HookedModel, domains: Sequence[PromptSet]) -> Doubles:
    """[d_in] mean over domains of their mean residual."""

    def mean(prompts: Sequence[Prompt]) -> dict[str, NDArray[Any]]:
        total, n = np.zeros(model.d_in), 0
        for rows in model.hook_rows(prompts):
            total += rows.x.double().sum(dim=0).numpy()
            n += len(rows.x)
        return {"mean": total / n}

    def kept_mean(prompts: Sequence[Prompt]) -> Doubles:
        of_prompts = [prompt.read_plain for prompt in prompts]
        return model.kept.arrays("means", [of_prompts], lambda: mean(prompts))["mean"]

    centre: Doubles = np.mean([kept_mean(domain.prompts) for domain in domains], axis=0)
    return centre


def _block(i: int, push: Push, pulls: Sequence[Pull], features: Features) -> SignedBlock:
    domains = {pull.name: _domain(i, pull, features) for pull in pulls}
    sizes = np.sum([np.abs(pull.contributions[i]) for pull in pulls], axis=0)
    listed = {top["index"] for domain in domains.values() for top in domain["top_features"] or []}
    shares = {j: float(sizes[j] / sizes.sum()) for j in listed}
    return {
        "features": features.kind,
        "train_loss": push.loss,
        "loss_left": {kind: fitted.loss_left for kind, fitted in push.maps.items()},
        "trial": None,
        "domains": domains,
        # Over all domains, those that carry most first.
        "top_features": [
            {"index": j, "share": shares[j], "promoted_tokens": None, "neuronpedia": None, "label": None}
            for j in sorted(shares, key=lambda j: (-shares[j], j))
        ],
    }


def _scores(domain: str, values: Mapping[str, Doubles], seed: int) -> dict[str, tuple[float, tuple[float, float]]]:
    """By field, the mean of values [n_prompts] and its interval; the same resamples of prompts for every field."""
    n = len(next(iter(values.values())))
    shares = resamples(n, seed, domain) / n
    return {field: (float(of.mean()), mean_interval(of, shares)) for field, of in values.items()}


def _domain(i: int, pull: Pull, features: Features) -> SignedDomainBlock:
    block: SignedDomainBlock = {
        "n_prompts": len(pull.nll),
        "base_loss": float(pull.nll.mean()),
        "p_answer": float(pull.p_answer.mean()),
        "gradient_cosine": float(pull.values["ntk_loss"][i].mean() / pull.norm) if pull.norm else 0.0,
        "top_features": None,
        "share_of_top_features": None,
    }
    if features.kind != "raw":
        contributions = pull.contributions[i]
        top = np.argsort(-np.abs(contributions), kind="stable")[:N_TOP_FEATURES]
        block["top_features"] = [
            {"index": int(j), "contribution": float(contributions[j])} for j in top if contributions[j]
        ]
        block["share_of_top_features"] = _share(contributions, top)
    return block


def _share(contributions: Doubles, top: NDArray[np.int64]) -> float:
    """Part of the summed sizes of all contributions that the top ones hold."""
    total = float(np.abs(contributions).sum())
    return float(np.abs(contributions[top]).sum()) / total if total else 0.0
