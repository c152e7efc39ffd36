"""The forecast: which features a training set shifts, and how strongly each domain leans on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, overload

import numpy as np

from sts_fast.data.options import shows
from sts_fast.data.progress import n_sent, with_whole
from sts_fast.data.prompts import PromptSet
from sts_fast.data.sets import Kind, Sets, Source, Sources
from sts_fast.errors import InputError
from sts_fast.forecast import stability
from sts_fast.forecast.assemble import Basis, assemble
from sts_fast.forecast.compare import sae_names
from sts_fast.forecast.cost import Outlook
from sts_fast.forecast.dims import Shift, measure_shift
from sts_fast.forecast.estimators import BY_NAME
from sts_fast.forecast.options import Options, Settings
from sts_fast.forecast.plan import Plan
from sts_fast.forecast.run import Forecast
from sts_fast.model.answers import answer_outcomes
from sts_fast.model.log import AnswerLog
from sts_fast.model.sae_check import Fit
from sts_fast.model.session import Purpose, SAESource, Session
from sts_fast.profile.profile import Profile
from sts_fast.profile.read import read_profiles
from sts_fast.sae import SAE
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import MAP_EVALUATIONS, MAP_PROMPTS
from sts_fast.signed.signed import SignedForecast, hook_layer, measure_signed, with_trial
from sts_fast.signed.trial import measure_trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload  # a string is a sequence of strings too, but never several SAEs
def score(  # type: ignore[overload-overlap]
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource,
    train: Source,
    domains: Sources,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> Forecast: ...


@overload
def score(
    *,
    model: str | Path | PreTrainedModel,
    sae: Sequence[SAESource],
    train: Source,
    domains: Sources,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> list[Forecast]: ...


@shows(Settings, Options)
def score(
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource | Sequence[SAESource],
    train: Source,
    domains: Sources,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> Forecast | list[Forecast]:
    """Forecasts how strongly training on `train` will move each domain, before any training.

    model:     folder or hub id of a causal language model, or one in memory (then with its `tokenizer`); or a folder of
               activations that `capture_activations` wrote of the same sets, and no model is run
    sae:       an SAE of it: folder, 'release/id', or one loaded by load_sae; or several, each of its own place in the
               model, which share every forward pass
    train:     the training set: a path, a name of the hub, rows in memory, or several of them (see load_examples); or a
               list of examples
    domains:   the abilities to forecast, by name, or as on the command line (see load_domains); none at all measures
               the shift of the training set alone
    demos:     examples to demonstrate with, in the same forms, by domain name, and under 'train' for the training set;
               by default answered examples of each set, in `demo_draws` draws
    tuned:     the model after training, for dims='tuned'
    options:   see Settings

    Returns a forecast, or, for several SAEs, one of each in their order. Raises InputError, in one sentence with the
    remedy, for whatever in the input cannot be used.
    """
    forecasts = compare(
        model=model,
        sae=[sae] if isinstance(sae, (str, Path, SAE)) else sae,
        trains={"train": train},
        domains=domains,
        demos=demos,
        tokenizer=tokenizer,
        tuned=tuned,
        **options,
    )
    of_saes = [of_sae["train"] for of_sae in forecasts]
    return of_saes[0] if isinstance(sae, (str, Path, SAE)) else of_saes


@shows(Settings, Options)
def shift(
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource,
    train: Source,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> Forecast:
    """Measures which features a training set shifts, without scoring any domain; arguments as for `score`.

    Returns a forecast without domains. Raises InputError as `score` does.
    """
    options.setdefault("estimators", ("act",))
    return score(
        model=model, sae=sae, train=train, domains={}, demos=demos, tokenizer=tokenizer, tuned=tuned, **options
    )  # fmt: skip


@overload
def compare(  # type: ignore[overload-overlap]
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource,
    trains: Mapping[str, Source],
    domains: Sources,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> dict[str, Forecast]: ...


@overload
def compare(
    *,
    model: str | Path | PreTrainedModel,
    sae: Sequence[SAESource],
    trains: Mapping[str, Source],
    domains: Sources,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> list[dict[str, Forecast]]: ...


@shows(Settings, Options)
def compare(
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource | Sequence[SAESource],
    trains: Mapping[str, Source],
    domains: Sources,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> dict[str, Forecast] | list[dict[str, Forecast]]:
    """Forecasts for several candidate training sets over the same domains, each domain passed through the model once.

    trains: the training sets by name; everything else as for `score`. A domain may be one of the training sets.

    Returns a forecast by training set, each the same as `score` gives for it alone (up to the rounding of a sum); for
    several SAEs, that of each in their order.
    """
    plan = _plan(model, sae, trains, domains, demos, tokenizer, tuned, Settings(**options))
    plan = replace(plan, settings=replace(plan.settings, progress=with_whole(plan.settings.progress, _stages(plan))))
    session, settings = plan.session, plan.settings
    plan.show()
    fits = session.check_fit(plan.trains[0])
    shifts = [
        [measure_shift(profile, settings) for profile in _profiles(plan, "train", train, _stage(plan, train))]
        for train in plan.trains
    ]
    pushed = _pushed(plan)
    answers = read_answers(plan, pushed)
    signed = _with_trials(plan, pushed, answers)
    forecasts = forecasts_of(plan, fits, [list(of_sae) for of_sae in zip(*shifts, strict=True)], signed, answers)
    return forecasts[0] if isinstance(sae, (str, Path, SAE)) else forecasts


@shows(Settings, Options)
def plan(
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource | Sequence[SAESource],
    trains: Mapping[str, Source],
    domains: Sources,
    demos: Sources | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> Outlook:
    """The sets that `compare` would read and the cost of it, without loading the model's weights.

    All arguments are those of `compare`; options: see Settings. The first prompt of each set goes to `show`.

    Returns the sets with their prompts, tokens and columns, and an estimate of time (seconds) and memory (bytes).
    Raises InputError for everything that `compare` would refuse before its first forward pass, but for what only the
    weights can show.
    """
    planned = _plan(model, sae, trains, domains, demos, tokenizer, tuned, Settings(**options), run=False)
    planned.show()
    return Outlook.of(planned)


def _plan(
    model: str | Path | PreTrainedModel,
    sae: SAESource | Sequence[SAESource],
    trains: Mapping[str, Source],
    domains: Sources,
    demos: Sources | None,
    tokenizer: PreTrainedTokenizerBase | None,
    tuned: str | Path | PreTrainedModel | None,
    settings: Settings,
    *,
    run: bool = True,
) -> Plan:
    if (settings.dims == "tuned") != (tuned is not None):
        raise InputError("--dims tuned and --tuned MODEL go together: the true shift needs the model after training")
    saes = [sae] if isinstance(sae, (str, Path, SAE)) else sae
    if not trains:
        raise InputError("there is no training set to forecast: give one or more, by name")
    if not saes:
        raise InputError("there is no SAE to read the model with: give one or more with --sae")
    sets = Sets.read(trains, domains, demos, settings)
    warnings = [f"warning: {warning}" for warning in sets.warnings()]
    for line in sets.lines() if run else [*sets.left_out(), *warnings]:
        settings.tell_line(line)
    library = settings.opened_library() if run else None
    session = Session.open(
        model, saes, settings,
        tokenizer=tokenizer, tuned=tuned, top_n=settings.top_n,
        purpose=Purpose(run=run, needs=_beyond_activations(settings)),
    )  # fmt: skip
    sources = {"model": model, "tuned": tuned, "labels": settings.labels}
    return Plan.make(session, settings, sets, sources, library)


def forecasts_of(
    plan: Plan,
    fits: Sequence[Fit],
    shifts_of: Sequence[Sequence[Shift]],
    signed: Sequence[Mapping[str, SignedForecast]],
    answers: Mapping[str, AnswerLog],
) -> list[dict[str, Forecast]]:
    """By SAE and training set, its forecast, each domain passed through the model once.

    fits:      of each SAE; shifts_of: by SAE, the shift of each training set
    signed:    by SAE and training set, the signed forecasts; empty for an SAE without any
    answers:   of read_answers
    """
    session, settings = plan.session, plan.settings
    called = sae_names([(sae.source, sae.hook_name) for sae in session.saes])
    with_sae = [f" with {name}" if len(called) > 1 else "" for name in called]
    for shifts, suffix in zip(shifts_of, with_sae, strict=True):
        for shift in shifts:
            overlap, n_prompts = float(np.mean(shift.overlaps(settings.top_n))), len(shift.profile.rows)
            settings.tell_line(stability.shift_line(shift.name + suffix, settings.top_n, n_prompts, overlap))
    profiles = [_profiles(plan, "domain", domain, domain.name) for domain in plan.domains]
    session.reader.say_passes()
    forecasts = []
    for i, (sae, fit, shifts, of_train) in enumerate(zip(session.saes, fits, shifts_of, signed, strict=True)):
        basis = Basis.of(plan, sae, fit, [shift.name for shift in shifts])
        forecasts.append(
            assemble(
                basis, shifts, [of_saes[i] for of_saes in profiles], settings,
                signed=of_train, answers=answers if settings.controls == "all" else {},
            )
        )  # fmt: skip
    if len(plan.domains) > 1:
        for by_train, suffix in zip(forecasts, with_sae, strict=True):
            for name, forecast in by_train.items():
                for estimator in settings.sizes:
                    of, n_prompts = BY_NAME[estimator], forecast.prompts_per_domain
                    n_draws = settings.demo_draws if of.of == "pairs" else 0
                    line = stability.ranking_line(
                        name + suffix, of.label, n_prompts, *forecast.column(estimator), n_draws
                    )
                    settings.tell_line(line)
    return forecasts


def _stage(plan: Plan, train: PromptSet) -> str:
    """The stage in which a training set is read for D_N."""
    return f"{'activity' if plan.settings.dims == 'active' else 'shift'} of {train.name}"


def _stages(plan: Plan) -> dict[str, int]:
    """The stages of a forecast in their order, each with the tokens that pass the model, back and forth ones thrice."""
    pushes, pulls = (plan.train_answers, plan.domain_answers) if plan.settings.at_the_hook else ([], [])
    gradients: dict[str, int] = {}
    for train in pushes:
        gradients[f"gradients of {train.name}"] = 3 * n_sent([train])
        fitted = n_sent([replace(train, prompts=train.prompts[:MAP_PROMPTS])])
        maps = [kind for kind in MAP_EVALUATIONS if kind in plan.settings.signed]
        gradients |= {f"{kind} of {train.name}": MAP_EVALUATIONS[kind] * fitted for kind in maps}
    return {
        **{_stage(plan, train): n_sent([train]) for train in plan.trains},
        **gradients,
        **{f"gradients of {domain.name}": 3 * n_sent([domain]) for domain in pulls},
        **{f"trial of {rows.name}": 3 * n_sent([rows]) for rows in plan.trial_rows},
        **{domain.name: n_sent([domain]) for domain in plan.domains},
    }


def _profiles(plan: Plan, kind: Kind, prompt_set: PromptSet, stage: str) -> list[Profile]:
    """The profile of a set by SAE."""
    session, settings = plan.session, plan.settings
    tuned = session.tuned if kind == "train" else None
    return read_profiles(
        session.reader, session.saes, kind, prompt_set, settings,
        tuned=tuned, library=plan.library, tell=partial(settings.tell, stage),
    )  # fmt: skip


def _pushed(plan: Plan) -> list[dict[str, SignedForecast]]:
    """By SAE and training set, the signed forecasts at the hook; empty where none is asked for."""
    session, settings = plan.session, plan.settings
    if not settings.at_the_hook:
        return [{} for _ in session.saes]
    return [
        measure_signed(
            HookedModel(
                session.whole, hook_layer(sae), name=session.reader.name, batch_tokens=settings.batch_tokens,
                say=settings.tell_line, kept=session.kept,
            ),
            sae,
            plan.train_answers,
            plan.domain_answers,
            settings.at_the_hook,
            kind=settings.signed_features,
            seed=settings.seed,
            tell=settings.tell,
        )
        for sae in session.saes
    ]  # fmt: skip


def _with_trials(
    plan: Plan, pushed: Sequence[Mapping[str, SignedForecast]], answers: Mapping[str, AnswerLog]
) -> list[dict[str, SignedForecast]]:
    """The signed forecasts of every SAE with those of the trials, each of which is run once."""
    session, settings, found = plan.session, plan.settings, [dict(of_train) for of_train in pushed]
    for rows in plan.trial_rows:
        trial = measure_trial(
            session.whole, rows, plan.domain_answers, plan.trial_designs[rows.name],
            batch_tokens=settings.batch_tokens, name=session.reader.name, say=settings.tell_line,
            tell=partial(settings.tell, f"trial of {rows.name}"), kept=session.kept,
        )  # fmt: skip
        for of_train in found:
            of_train[rows.name] = with_trial(of_train.get(rows.name), trial, plan.domain_answers, answers)
    return found


def _beyond_activations(settings: Settings) -> list[tuple[str, str]]:
    """The settings that need the model itself, and what of it."""
    needs = (
        ("--dims tuned", settings.dims == "tuned", "the model before and after training"),
        ("--controls all", settings.controls == "all", "the whole model"),
        (f"--estimators {','.join(settings.signed)}", bool(settings.signed), "the whole model, and its gradients"),
        ("--device-map", settings.device_map is not None, "a model to spread"),
    )
    return [(option, why) for option, chosen, why in needs if chosen]


def read_answers(plan: Plan, signed: Sequence[Mapping[str, SignedForecast]]) -> dict[str, AnswerLog]:
    """How well the base model answers each domain, by name, where that is needed; signed forecasts have it already."""
    if plan.settings.controls != "all" and not plan.trial_rows:
        return {}
    already = next((forecast for of_train in signed for forecast in of_train.values()), None)
    if already is not None:
        return {answers.name: already.answers[answers.name] for answers in plan.domain_answers}
    settings, reads = plan.settings, {}
    for done, answers in enumerate(plan.domain_answers):
        outcomes = answer_outcomes(
            plan.session.whole, answers.prompts, batch_tokens=settings.batch_tokens, say=settings.tell_line,
            kept=plan.session.kept,
        )  # fmt: skip
        reads[answers.name] = AnswerLog(answers, *outcomes)
        settings.tell("base loss and accuracy", done + 1, len(plan.domain_answers))
    return reads
