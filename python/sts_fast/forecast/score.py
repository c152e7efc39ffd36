"""The forecast: which features a training set shifts, and how strongly each domain leans on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np

from sts_fast.data.prompts import PromptSet, TokenClass, prompts_sha256, show_prompt
from sts_fast.data.sets import MIN_PROMPTS, Fields, Kind, Sets, Source, check_enough
from sts_fast.errors import InputError
from sts_fast.forecast import stability
from sts_fast.forecast.assemble import forecast_of, promoted_tokens, provenance_of, with_signed
from sts_fast.forecast.compare import sae_names
from sts_fast.forecast.dims import Shift, measure_shifts
from sts_fast.forecast.estimators import read_domain
from sts_fast.forecast.options import Options, Settings
from sts_fast.forecast.run import BY_NAME, SIZES, Forecast
from sts_fast.model import explain
from sts_fast.model.answers import answer_outcomes
from sts_fast.model.log import AnswerLog
from sts_fast.model.memory import MOST_BATCH_TOKENS
from sts_fast.model.sae_check import Fit
from sts_fast.model.session import SAESource, Session
from sts_fast.sae import SAE
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.signed import SignedEstimator, SignedForecast, hook_layer, measure_signed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@overload  # a string is a sequence of strings too, but never several SAEs
def score(  # type: ignore[overload-overlap]
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource,
    train: Source,
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
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
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> list[Forecast]: ...


def score(
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource | Sequence[SAESource],
    train: Source,
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> Forecast | list[Forecast]:
    """Forecasts how strongly training on `train` will move each domain, before any training.

    model:     folder or hub id of a causal language model, or one in memory (then with its `tokenizer`); or a folder of
               activations that `capture_activations` wrote of the same sets, and no model is run
    sae:       an SAE of it: folder, 'release/id', or one loaded by load_sae; or several, each of its own place in the
               model, which share every forward pass
    train:     the training set: a file, a folder, or examples
    domains:   the abilities to forecast, by name, or as on the command line (see load_domains); none at all measures
               the shift of the training set alone
    demos:     examples to demonstrate with, in the same forms, by domain name, and under 'train' for the training set;
               by default the first answered examples of each set
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


@overload
def compare(  # type: ignore[overload-overlap]
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource,
    trains: Mapping[str, Source],
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
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
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> list[dict[str, Forecast]]: ...


def compare(
    *,
    model: str | Path | PreTrainedModel,
    sae: SAESource | Sequence[SAESource],
    trains: Mapping[str, Source],
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    **options: Unpack[Options],
) -> dict[str, Forecast] | list[dict[str, Forecast]]:
    """Forecasts for several candidate training sets over the same domains, each domain passed through the model once.

    trains: the training sets by name; everything else as for `score`. A domain may be one of the training sets.

    Returns a forecast by training set, each the same as `score` gives for it alone (up to the rounding of a sum); for
    several SAEs, that of each in their order.
    """
    settings = Settings(**options)
    signed: list[SignedEstimator] = [name for name in settings.estimators if name not in SIZES]  # type: ignore[misc]
    unsigned = [name for name in settings.estimators if name in SIZES]
    settings = replace(settings, estimators=unsigned or ["act"])
    if (settings.dims == "tuned") != (tuned is not None):
        raise InputError("--dims tuned and --tuned MODEL go together: the true shift needs the model after training")
    sources = [sae] if isinstance(sae, (str, Path, SAE)) else sae
    if not sources:
        raise InputError("there is no SAE to read the model with: give one or more with --sae")

    fields = Fields(settings.question_fields or {}, settings.answer_fields or {})
    sets = Sets.read(trains, domains, demos, fields)
    session = Session.open(
        model, sources, settings,
        tokenizer=tokenizer, tuned=tuned, top_n=settings.top_n, needs=_beyond_activations(settings, signed),
    )  # fmt: skip
    reader, saes = session.reader, session.saes
    if settings.controls == "all" and not isinstance(model, (str, Path)) and model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise InputError(
            "the base model's loss and accuracy need its head: give a model with one, or --controls features"
        )
    layers = [hook_layer(reader.hook(one), one) for one in saes if signed]

    def prompts_of(kind: Kind, name: str, *, show: bool, tokens: TokenClass = settings.tokens) -> PromptSet:
        examples = (sets.trains if kind == "train" else sets.domains)[name]
        sampling = replace(settings.sampling, tokens=tokens)
        return reader.prompts(kind, name, examples, sets.demos.get(name), sampling, session.template, show=show)

    # Every set is made ready before the first forward pass, so that bad input is told at once.
    train_sets = [prompts_of("train", name, show=settings.dims == "icl") for name in sets.trains]
    domain_sets = [prompts_of("domain", name, show="icl" in settings.estimators) for name in sets.domains]
    for prompt_set in train_sets:
        check_enough(prompt_set, reader.context_length, "train")
    for prompt_set in domain_sets:
        check_enough(prompt_set, reader.context_length, "domain")
    # The base model's own answers, without demonstrations, where a domain has enough of them.
    answer_sets = [
        answer_set
        for name in sets.domains
        if (settings.controls == "all" or signed)
        and len((answer_set := prompts_of("domain", name, show=False, tokens="answer")).prompts) >= MIN_PROMPTS
    ]

    if settings.show is not None:
        for prompt_set in (*train_sets, *domain_sets):
            settings.show(show_prompt(prompt_set, session.tokenizer))
    train_answers = [prompts_of("train", name, show=False, tokens="answer") for name in sets.trains if signed]
    for prompt_set in train_answers:
        check_enough(prompt_set, reader.context_length, "train")
    if signed and not answer_sets:
        raise InputError(
            f"no domain has the {MIN_PROMPTS} answered questions that signed estimators need: add answers, or leave "
            f"out {', '.join(signed)}"
        )

    labels = {} if settings.labels is None else explain.read_labels(settings.labels)

    fits = session.check_fit(train_sets[0])
    shifts = [measure_shifts(reader, saes, train_set, settings, session.tuned) for train_set in train_sets]
    forecasts = forecasts_of(
        session,
        [[of_saes[i] for of_saes in shifts] for i in range(len(saes))],
        fits,
        domain_sets,
        answer_sets,
        lambda language_model: [
            measure_signed(
                HookedModel(language_model, layer, name=reader.name, say=settings.tell_line),
                one,
                train_answers,
                answer_sets,
                signed,
                kind=settings.signed_features,
                batch_tokens=settings.batch_tokens,
                seed=settings.seed,
                tell=settings.tell,
            )
            for layer, one in zip(layers, saes, strict=bool(signed))
        ],
        trains,
        {"model": model, "tuned": tuned, "labels": settings.labels, "domains": domains, "demos": demos or {}},
        labels,
        settings,
    )
    return forecasts[0] if isinstance(sae, (str, Path, SAE)) else forecasts


def forecasts_of(
    session: Session,
    shifts_of: Sequence[Sequence[Shift]],
    fits: Sequence[Fit],
    domain_sets: Sequence[PromptSet],
    answer_sets: Sequence[PromptSet],
    measure: Callable[[Any], list[dict[str, SignedForecast]]],
    trains: Mapping[str, object],
    inputs: Mapping[str, object],
    labels: Mapping[int, str],
    settings: Settings,
) -> list[dict[str, Forecast]]:
    """By SAE and training set, its forecast, each domain passed through the model once.

    shifts_of: by SAE, the shift of each training set
    answer_sets: the domains with answers enough, where the whole model is asked for them
    measure: the signed forecasts by SAE and training set, if any, given the whole model
    trains, inputs: what the training sets, and everything else, were read from, for the provenance
    """
    reader, saes, tokenizer = session.reader, session.saes, session.tokenizer
    called = sae_names([(one.source, one.hook_name) for one in saes])
    with_sae = [f" with {name}" if len(saes) > 1 else "" for name in called]
    for of_sae, suffix in zip(shifts_of, with_sae, strict=True):
        for shift in of_sae:
            overlap = float(np.mean(shift.overlaps(settings.top_n)))
            n_prompts = len(shift.prompt_set.prompts)
            settings.tell_line(stability.shift_line(shift.name + suffix, settings.top_n, n_prompts, overlap))
    reads = [read_domain(reader, saes, domain_set, shifts_of, settings) for domain_set in domain_sets]
    language_model = session.whole if answer_sets else None
    signed_of = measure(language_model)
    answer_reads = _read_answers(language_model, answer_sets if settings.controls == "all" else [], signed_of, settings)

    reader.say_passes()
    forecasts: list[dict[str, Forecast]] = []
    for i, one in enumerate(saes):
        signed_by = signed_of[i] if signed_of else {}
        firings = {
            shift.name: shift.firings().take([of_saes[i].firings[shift.name] for of_saes in reads])
            for shift in shifts_of[i]
        }
        explained = [*firings.values(), *(found.firings for found in signed_by.values())]
        shown = sorted({int(j) for found in explained for j in found.features})
        promoted = promoted_tokens(reader, one, shown, tokenizer)
        forecasts.append(
            {
                shift.name: with_signed(
                    signed_by.get(shift.name),
                    forecast_of(
                        reader,
                        one,
                        fits[i],
                        shift,
                        [of_saes[i] for of_saes in reads],
                        answer_reads,
                        settings,
                        None if session.tuned is None else session.tuned.name,
                        firings[shift.name].table(tokenizer),
                        promoted,
                        labels,
                        {
                            **provenance_of({**inputs, "sae": one.source, "train": trains[shift.name]}, settings),
                            "prompts_sha256": prompts_sha256([shift.prompt_set, *domain_sets]),
                            "forward_passes": reader.forward_passes(),
                        },
                    ),
                    one,
                    tokenizer,
                    promoted,
                    labels,
                )
                for shift in shifts_of[i]
            }
        )
    if len(domain_sets) > 1:
        for by_train, suffix in zip(forecasts, with_sae, strict=True):
            for name, forecast in by_train.items():
                for estimator in settings.estimators:
                    label, n_prompts = BY_NAME[estimator].label, forecast.prompts_per_domain
                    settings.tell_line(
                        stability.ranking_line(name + suffix, label, n_prompts, *forecast.column(estimator))
                    )
    return forecasts


def _beyond_activations(settings: Settings, signed: Sequence[SignedEstimator]) -> list[tuple[str, str]]:
    """The settings that need the model itself, and what of it."""
    needs = (
        ("--dims tuned", settings.dims == "tuned", "the model before and after training"),
        ("--controls all", settings.controls == "all", "the whole model"),
        (f"--estimators {','.join(signed)}", bool(signed), "the whole model, and its gradients"),
        ("--device-map", settings.device_map is not None, "a model to spread"),
    )
    return [(option, why) for option, chosen, why in needs if chosen]


def _read_answers(
    whole: Any,
    answer_sets: Sequence[PromptSet],
    signed_of: Sequence[Mapping[str, SignedForecast]],
    settings: Settings,
) -> dict[str, AnswerLog]:
    """How well the base model answers each domain, by domain name; signed forecasts have asked it already."""
    signed = next((forecast for by_train in signed_of for forecast in by_train.values()), None)
    if signed is not None:
        return {answer_set.name: signed.answers[answer_set.name] for answer_set in answer_sets}
    batch_tokens = settings.batch_tokens or MOST_BATCH_TOKENS
    reads = {}
    for done, answer_set in enumerate(answer_sets):
        outcomes = answer_outcomes(whole, answer_set.prompts, batch_tokens=batch_tokens, say=settings.tell_line)
        reads[answer_set.name] = AnswerLog(answer_set, *outcomes)
        settings.tell("base loss and accuracy", done + 1, len(answer_sets))
    return reads
