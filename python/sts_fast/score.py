"""The forecast: which features a training set shifts, and how strongly each domain leans on them."""

from __future__ import annotations

import datetime
import platform
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args, overload

import numpy as np

from sts_fast import _cpu, controls, cuda, explain, results, settle
from sts_fast._version import __version__
from sts_fast.activations import MODEL_FOLDER, NO_PASSES, Activations, is_activations
from sts_fast.capture import (
    Decoder,
    PairedRows,
    capture,
    load_config,
    load_decoder,
    load_language_model,
    load_tokenizer,
    unembedding,
)
from sts_fast.correlate import CorrelationStats
from sts_fast.encode import SparseFeatures, encode
from sts_fast.errors import InputError
from sts_fast.fit import Fit, check_names, check_width, fit_rows, measure_fit
from sts_fast.forward import MOST_BATCH_TOKENS
from sts_fast.gradients import HookedModel
from sts_fast.hooks import Hook, place_name
from sts_fast.ntk import FeatureKind
from sts_fast.prompts import PromptSet, TokenClass, prompts_sha256, show_prompt
from sts_fast.results import (
    ESTIMATORS,
    DomainScore,
    Estimator,
    Forecast,
    Interval,
    PromptLog,
    ShiftedFeature,
    sae_names,
)
from sts_fast.sae import SAE, load_sae
from sts_fast.sets import MIN_PROMPTS, Fields, Kind, Sampling, Sets, Source, check_enough, common_template
from sts_fast.shift import ShiftStats, top_indices
from sts_fast.signed import SIGNED_ESTIMATORS, SignedEstimator, hook_layer, measure_signed

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Doubles = NDArray[np.float64]
    Indices = NDArray[np.int64]

Dims = Literal["icl", "tuned", "active"]
Controls = Literal["features", "all"]
SAESource = str | Path | SAE
Progress = Callable[[str, int, int], None]

N_BOOTSTRAP = 1000
CONFIDENCE = 0.95
# Resamplings of the training prompts that tell how settled D_N is; each costs one float64 per feature.
N_REPLICATES = 32


class Options(TypedDict, total=False):
    """What can be chosen; `Settings` has the defaults and the meaning of each."""

    dims: Dims
    estimators: Sequence[Estimator | SignedEstimator]
    signed_features: FeatureKind
    controls: Controls
    shots: int
    domain_shots: int
    top_n: int
    tokens: TokenClass
    limit: int | None
    layer: int | None
    dtype: str
    sae_dtype: str | None
    device: str
    batch_tokens: int | None
    seed: int
    question_fields: Mapping[str, str]
    answer_fields: Mapping[str, str]
    labels: str | Path | None
    command: str | None
    progress: Progress | None
    say: Callable[[str], None] | None
    show: Callable[[str], None] | None
    strict: bool


@dataclass(frozen=True)
class Settings:
    """The options of a forecast.

    dims:      what the shifted features D_N are taken from: 'icl' (demonstrations of the training set in context),
               'tuned' (the model after training, given as `tuned`), 'active' (most active, no demonstrations)
    estimators: any of 'act', 'icl', 'act_sq' ('act' where none is named), see DomainScore for the equations; and the
               signed 'ntk', 'step', 'adapter', see ntk, which need answers and the whole model
    signed_features: what the signed ones are written in: 'sae', 'fired' or 'raw', see ntk.Features
    controls:  'features' (other features, raw activations, cosine of means) or 'all' (also the base model's loss and
               accuracy, which need the whole model and answers)
    shots, domain_shots: demonstrations of the training set (for D_N), of each domain (for 'icl')
    top_n:     size of D_N
    tokens:    which tokens are read; see build_prompts
    limit:     most prompts of a set, drawn at random; None for all
    layer:     reads the residual stream after this layer, whatever the SAE's files say
    dtype, device: of the model, see load_decoder; sae_dtype: 'float32' or 'bfloat16', by default as stored
    batch_tokens: most tokens of one forward pass; None: as many as the free memory allows
    question_fields, answer_fields: columns to read, by set name ('train', a domain's), '' for all others
    labels:    file of feature labels, as Neuronpedia exports them
    command:   recorded in the provenance
    progress:  called with (stage, prompts done, prompts in all)
    show:      called with the first prompt of each set as it is sent, before any pass
    say:       called with a line about how the run goes: how the model is run, what went wrong and was put right, or
               a warning that should not wait for its end
    strict:    raises InputError where an SAE does not seem to belong to the model, instead of a warning

    Raises InputError for a value outside its choices.
    """

    dims: Dims = "icl"
    estimators: Sequence[Estimator | SignedEstimator] = ("act", "icl")
    signed_features: FeatureKind = "sae"
    controls: Controls = "features"
    shots: int = 2
    domain_shots: int = 5
    top_n: int = 100
    tokens: TokenClass = "query"
    limit: int | None = 256
    layer: int | None = None
    dtype: str = "auto"
    sae_dtype: str | None = None
    device: str = "auto"
    batch_tokens: int | None = None
    seed: int = 0
    question_fields: Mapping[str, str] | None = None
    answer_fields: Mapping[str, str] | None = None
    labels: str | Path | None = None
    command: str | None = None
    progress: Progress | None = None
    say: Callable[[str], None] | None = None
    show: Callable[[str], None] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("dims", self.dims, get_args(Dims)),
            ("controls", self.controls, get_args(Controls)),
            ("tokens", self.tokens, get_args(TokenClass)),
            ("signed_features", self.signed_features, get_args(FeatureKind)),
        ):
            if value not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not '{value}'")
        for estimator in self.estimators:
            if estimator not in (*ESTIMATORS, *SIGNED_ESTIMATORS):
                known = ", ".join((*ESTIMATORS, *SIGNED_ESTIMATORS))
                raise InputError(f"estimators must be among {known}, not '{estimator}'")
        if not self.estimators or len(set(self.estimators)) < len(self.estimators):
            raise InputError("estimators must name one or more, each once")
        for name in ("shots", "domain_shots", "top_n", "limit", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")

    def warn(self, *warnings: str | None) -> None:
        """Tells at once, or stops, where an SAE does not seem to belong."""
        for warning in filter(None, warnings):
            if self.strict:
                raise InputError(f"{warning} (--strict)")
            self.tell_line(f"warning: {warning}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.shots, self.domain_shots, self.tokens, self.limit, self.seed)

    def tell_line(self, line: str) -> None:
        if self.say is not None:
            self.say(line)

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


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
    signed: list[SignedEstimator] = [name for name in settings.estimators if name in SIGNED_ESTIMATORS]  # type: ignore[misc]
    unsigned = [name for name in settings.estimators if name in ESTIMATORS]
    settings = replace(settings, estimators=unsigned or ["act"])
    if (settings.dims == "tuned") != (tuned is not None):
        raise InputError("--dims tuned and --tuned MODEL go together: the true shift needs the model after training")
    saes = [_loaded_sae(one, settings) for one in ([sae] if isinstance(sae, (str, Path, SAE)) else sae)]
    if not saes:
        raise InputError("there is no SAE to read the model with: give one or more with --sae")

    fields = Fields(settings.question_fields or {}, settings.answer_fields or {})
    sets = Sets.read(trains, domains, demos, fields)
    sampling = settings.sampling
    activations = Activations(model, device=settings.device) if is_activations(model) else None
    if activations is not None:
        _check_activations(activations, settings, signed, domain_shots=bool(sets.domains))
    source = model if activations is None else activations.folder / MODEL_FOLDER
    tokenizer = tokenizer or (load_tokenizer(source) if isinstance(source, (str, Path)) else None)
    if tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer: score(..., tokenizer=...)")
    config = load_config(source) if isinstance(source, (str, Path)) else source.config
    model_name = str(model) if isinstance(model, (str, Path)) else "the model"
    model_name = model_name if activations is None else activations.name
    names = [check_names(sae, config, model_name) for sae in saes]
    settings.warn(*names)
    template = common_template(tokenizer, saes)
    reader: Decoder | Activations
    if activations is not None:
        activations.check_template(template, saes[0])
        activations.read_at(saes)
        reader = activations
    else:
        reader = _decoder(model, saes, settings, name="the model")
        if reader.device.type == "cuda" and (reason := cuda.missing_reason()) is not None:
            settings.tell_line(f"the model runs on {reader.device}, its features are computed on the CPU: {reason}")
    tuned_decoder = None if tuned is None else _decoder(tuned, saes, settings, name="the tuned model")
    if settings.controls == "all" and not isinstance(model, (str, Path)) and model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise InputError(
            "the base model's loss and accuracy need its head: give a model with one, or --controls features"
        )
    layers = [hook_layer(_hook_of(reader, one), one) for one in saes if signed]

    def prompts_of(kind: Kind, name: str, *, show: bool, tokens: TokenClass | None = None) -> PromptSet:
        examples = (sets.trains if kind == "train" else sets.domains)[name]
        if activations is not None:
            return activations.prompts(kind, name, examples, sets.demos.get(name), show=show)
        return sampling.prompts(
            name,
            examples,
            sets.demos.get(name),
            template,
            reader.context_length,
            kind=kind,
            show=show,
            tokens=tokens,
        )

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
            settings.show(show_prompt(prompt_set, tokenizer))
    train_answers = [prompts_of("train", name, show=False, tokens="answer") for name in sets.trains if signed]
    for prompt_set in train_answers:
        check_enough(prompt_set, reader.context_length, "train")
    if signed and not answer_sets:
        raise InputError(
            f"no domain has the {MIN_PROMPTS} answered questions that signed estimators need: add answers, or leave "
            f"out {', '.join(signed)}"
        )

    labels = {} if settings.labels is None else explain.read_labels(settings.labels)

    measured = (
        measure_fit(reader, saes, train_sets[0].prompts)
        if isinstance(reader, Decoder)
        else fit_rows(saes, reader.sample(train_sets[0]))
    )
    fits = [replace(fit, names=name) for fit, name in zip(measured, names, strict=True)]
    settings.warn(*(fit.warning for fit in fits))

    shifts = [_measure_shifts(reader, saes, train_set, settings, tuned_decoder) for train_set in train_sets]
    called = sae_names([(one.source, one.hook_name) for one in saes])
    with_sae = [f" with {name}" if len(saes) > 1 else "" for name in called]
    for of_saes in shifts:
        for shift, suffix in zip(of_saes, with_sae, strict=True):
            overlap = float(np.mean(shift.overlaps(settings.top_n)))
            n_prompts = len(shift.prompt_set.prompts)
            settings.tell_line(settle.shift_line(shift.name + suffix, settings.top_n, n_prompts, overlap))
    shifts_of = [[of_saes[i] for of_saes in shifts] for i in range(len(saes))]
    reads = [_read_domain(reader, saes, domain_set, shifts_of, settings) for domain_set in domain_sets]
    language_model = _with_head(model, settings) if answer_sets else None
    answer_reads = _read_answers(language_model, answer_sets if settings.controls == "all" else [], settings)
    signed_of = [
        measure_signed(
            HookedModel(language_model, layer, name=reader.name),
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
    ]

    if isinstance(reader, Decoder):
        reader.passes.say_summary()
    provenance = {
        **{"model": model, "tuned": tuned, "labels": settings.labels},
        **{"domains": domains, "demos": demos or {}},
    }
    loaded_from = model if isinstance(model, (str, Path)) else None
    forecasts: list[dict[str, Forecast]] = []
    for i, one in enumerate(saes):
        shown = sorted({int(j) for shift in shifts_of[i] for j in shift.top[: explain.N_FEATURES]})
        promoted: dict[int, list[str]] = {}
        if isinstance(reader, Decoder):
            promoted = _promoted_tokens(reader, one, shown, tokenizer, loaded_from)
        forecasts.append(
            {
                shift.name: _with_signed(
                    signed_of[i][shift.name] if signed else None,
                    _forecast(
                        reader,
                        one,
                        fits[i],
                        shift,
                        [of_saes[i] for of_saes in reads],
                        answer_reads,
                        settings,
                        None if tuned_decoder is None else tuned_decoder.name,
                        shift.firings.table(tokenizer),
                        promoted,
                        labels,
                        {
                            **_provenance({**provenance, "sae": one.source, "train": trains[shift.name]}, settings),
                            "prompts_sha256": prompts_sha256([shift.prompt_set, *domain_sets]),
                            "forward_passes": reader.passes.summary() if isinstance(reader, Decoder) else NO_PASSES,
                        },
                    ),
                )
                for shift in shifts_of[i]
            }
        )
    if len(domain_sets) > 1:
        n_prompts = round(np.mean([len(domain_set.prompts) for domain_set in domain_sets]))
        for of_sae, suffix in zip(forecasts, with_sae, strict=True):
            for name, forecast in of_sae.items():
                for estimator in settings.estimators:
                    values = [getattr(domain, f"sts_{estimator}") for domain in forecast.domains]
                    intervals = [getattr(domain, f"sts_{estimator}_ci") for domain in forecast.domains]
                    line = settle.ranking_line(name + suffix, estimator, n_prompts, values, intervals)
                    settings.tell_line(line)
    return forecasts[0] if isinstance(sae, (str, Path, SAE)) else forecasts


def _loaded_sae(source: SAESource, settings: Settings) -> SAE:
    sae = source if isinstance(source, SAE) else load_sae(source, layer=settings.layer, dtype=settings.sae_dtype)
    if isinstance(source, SAE) and settings.layer is not None:
        sae = replace(sae, hook_name=place_name("resid_post", settings.layer))
    if settings.sae_dtype is not None:
        sae = sae.with_dtype(settings.sae_dtype)
    if settings.top_n > sae.d_sae:
        raise InputError(f"--top-n is {settings.top_n}, but the SAE {sae.source} has {sae.d_sae} features")
    if not sae.hook_name:
        raise InputError(f"the SAE {sae.source} does not say which layer it reads: give --layer, or --hook")
    return sae


def _decoder(model: str | Path | PreTrainedModel, saes: Sequence[SAE], settings: Settings, *, name: str) -> Decoder:
    """The model, to be read where the SAEs read."""
    places = list(dict.fromkeys(sae.hook_name for sae in saes))
    if isinstance(model, (str, Path)):
        decoder = load_decoder(model, *places, dtype=settings.dtype, device=settings.device)
    else:
        decoder = Decoder(model, *places, name=name)
    for sae in saes:
        check_width(sae, _hook_of(decoder, sae), decoder.name)
    decoder.passes.batch_tokens = settings.batch_tokens
    decoder.passes.say = settings.say or decoder.passes.say
    return decoder


def _check_activations(
    activations: Activations, settings: Settings, signed: Sequence[SignedEstimator], *, domain_shots: bool
) -> None:
    """Raises InputError for settings that need the model itself, or that differ from those captured with."""
    for option, chosen, needs in (
        ("--dims tuned", settings.dims == "tuned", "the model before and after training"),
        ("--controls all", settings.controls == "all", "the whole model"),
        (f"--estimators {','.join(signed)}", bool(signed), "the whole model, and its gradients"),
    ):
        if chosen:
            raise InputError(
                f"{option} needs {needs}, but {activations.folder} holds activations: give a folder or hub id of a "
                "model with --model"
            )
    activations.check_sampling(settings.sampling, domain_shots=domain_shots)


def _hook_of(reader: Decoder | Activations, sae: SAE) -> Hook:
    return next(hook for hook in reader.hooks if hook.name == sae.hook_name)


def _rows(
    reader: Decoder | Activations, kind: Kind, prompt_set: PromptSet, tuned: Decoder | None = None
) -> Iterator[list[PairedRows]]:
    if isinstance(reader, Decoder):
        return capture(reader, prompt_set.prompts, other=tuned)
    return reader.rows(kind, prompt_set)


@dataclass(frozen=True)
class _Shift:
    """What the training set moves.

    stats:       sums per feature; importance: [d_sae] what D_N is ranked by
    replicates:  [d_sae, N_REPLICATES] the same for resamplings of the prompts, up to a factor
    top:         [top_n] D_N, most shifted first
    random, low_shift, most_active: [n_sets, top_n], [<= top_n], [top_n] features of the controls, ascending
    raw:         sums over the residual stream itself; raw_top: its dimensions that shift most
    firings:     where the first of D_N fire, filled while the domains are read
    """

    prompt_set: PromptSet
    stats: ShiftStats | CorrelationStats
    importance: Doubles
    replicates: Doubles
    mean_activation: Doubles
    mean_l0: float
    top: Indices
    random: Indices
    low_shift: Indices
    most_active: Indices
    raw: controls.RawShift
    raw_top: Indices
    log: PromptLog
    firings: explain.Firings

    @property
    def name(self) -> str:
        return self.prompt_set.name

    def overlaps(self, top_n: int) -> Doubles:
        """[N_REPLICATES] share of D_N that each resampling of the prompts keeps."""
        kept = [len(np.intersect1d(self.top, top_indices(one, top_n))) for one in self.replicates.T]
        return np.asarray(kept) / top_n

    def feature_sets(self) -> list[Indices]:
        return [self.top, *self.random, self.low_shift, self.most_active]

    def weights(self, columns: Indices) -> dict[str, Doubles]:
        """[n_columns] by control ('' is D_N itself): how much each feature counts towards its score."""
        random = np.mean([np.isin(columns, features) for features in self.random], axis=0)
        return {
            "": np.isin(columns, self.top).astype(np.float64),
            "random": random,
            "low_shift": np.isin(columns, self.low_shift).astype(np.float64),
            "most_active": np.isin(columns, self.most_active).astype(np.float64),
        }


def _measure_shifts(
    reader: Decoder | Activations,
    saes: Sequence[SAE],
    prompt_set: PromptSet,
    settings: Settings,
    tuned: Decoder | None,
) -> list[_Shift]:
    """One pass over a training set, for all SAEs."""
    sums = [_ShiftSums(sae, prompt_set, settings) for sae in saes]
    at = [reader.hooks.index(_hook_of(reader, sae)) for sae in saes]
    done = 0
    for of_hooks in _rows(reader, "train", prompt_set, tuned):
        for one, hook in zip(sums, at, strict=True):
            one.update(of_hooks[hook])
        done += len(of_hooks[0].prompts)
        settings.tell(f"shift of {prompt_set.name}", done, len(prompt_set.prompts))
    return [_shift(one, settings) for one in sums]


class _ShiftSums:
    """Sums over a training set's tokens, for one SAE."""

    def __init__(self, sae: SAE, prompt_set: PromptSet, settings: Settings) -> None:
        self.sae, self.prompt_set, self.of_active = sae, prompt_set, settings.dims == "active"
        n_prompts = len(prompt_set.prompts)
        rng = np.random.default_rng([settings.seed, zlib.crc32(b"shift")])
        # [n_prompts, N_REPLICATES] how often each resampling of the prompts drew each of them.
        self.draws = rng.multinomial(n_prompts, [1 / n_prompts] * n_prompts, size=N_REPLICATES).T.astype(np.float64)
        self.log = PromptLog("shift", prompt_set)
        self.raw = controls.RawShift(sae.d_in)
        self.shift = ShiftStats(sae, n_replicates=N_REPLICATES)
        self.active = CorrelationStats(sae, N_REPLICATES)

    def update(self, rows: PairedRows) -> None:
        if self.of_active:
            self.active.update(rows.base, self.draws[rows.base_of])
        else:
            self.shift.update(rows.paired, rows.demos, self.draws[rows.paired_of])
        self.raw.update(rows.base, rows.paired, rows.demos)
        self.log.record(rows)


def _shift(sums: _ShiftSums, settings: Settings) -> _Shift:
    sae, prompt_set = sums.sae, sums.prompt_set
    shift_stats, active_stats, raw = sums.shift, sums.active, sums.raw
    stats: ShiftStats | CorrelationStats
    if settings.dims == "active":
        stats, importance, sum_base = active_stats, active_stats.sum_h, active_stats.sum_h
        n_fired = active_stats.n_fired
        replicates = active_stats.sum_hy + np.outer(active_stats.sum_h, active_stats.origin)
    else:
        stats, importance, sum_base = shift_stats, shift_stats.sum_sq_shift, shift_stats.sum_base
        n_fired = shift_stats.n_fired_base
        replicates = shift_stats.weighted_sq_shift
    if stats.n_tokens == 0:
        raise InputError(
            f"'{prompt_set.name}' has no token in common between its prompts without and with demonstrations: "
            "use --tokens all or --dims active"
        )
    if not np.isfinite(importance).all():
        raise InputError(f"the SAE {sae.source} gives features too large to add up: is it the SAE of this model?")
    importance, mean_activation = importance / stats.n_tokens, sum_base / stats.n_tokens
    top = top_indices(importance, settings.top_n)
    random_rng = np.random.default_rng([settings.seed, zlib.crc32(b"random features")])
    return _Shift(
        prompt_set=prompt_set,
        stats=stats,
        importance=importance,
        replicates=replicates,
        mean_activation=mean_activation,
        mean_l0=float(n_fired.sum()) / stats.n_tokens,
        top=top,
        random=controls.random_sets(sae.d_sae, top, random_rng),
        low_shift=controls.low_shift(importance, n_fired, top),
        most_active=controls.most_active(mean_activation, settings.top_n),
        raw=raw,
        raw_top=raw.top(settings.top_n),
        log=sums.log,
        firings=explain.Firings(top[: explain.N_FEATURES]),
    )


@dataclass(frozen=True)
class _DomainRead:
    """Sums over a domain's tokens: sums[training set, control, estimator] is [n_prompts]; mean: [d_in] residual."""

    prompt_set: PromptSet
    log: PromptLog
    sums: dict[tuple[str, str, str], Doubles]
    mean: Doubles


def _read_domain(
    reader: Decoder | Activations,
    saes: Sequence[SAE],
    prompt_set: PromptSet,
    shifts_of: Sequence[Sequence[_Shift]],
    settings: Settings,
) -> list[_DomainRead]:
    """One pass over a domain, for all SAEs, training sets, controls and estimators."""
    sums = [_DomainSums(sae, prompt_set, shifts, settings) for sae, shifts in zip(saes, shifts_of, strict=True)]
    at = [reader.hooks.index(_hook_of(reader, sae)) for sae in saes]
    done = 0
    for of_hooks in _rows(reader, "domain", prompt_set):
        for one, hook in zip(sums, at, strict=True):
            one.update(of_hooks[hook])
        done += len(of_hooks[0].prompts)
        settings.tell(prompt_set.name, done, len(prompt_set.prompts))
    return [_DomainRead(prompt_set, one.log, one.sums, one.raw.mean) for one in sums]


class _DomainSums:
    """Sums over a domain's tokens, for one SAE; see _DomainRead."""

    def __init__(self, sae: SAE, prompt_set: PromptSet, shifts: Sequence[_Shift], settings: Settings) -> None:
        self.sae, self.prompt_set, self.shifts, self.estimators = sae, prompt_set, shifts, settings.estimators
        self.columns = np.unique(np.concatenate([features for shift in shifts for features in shift.feature_sets()]))
        self.log = PromptLog("score", prompt_set)
        self.raw = controls.RawShift(sae.d_in)
        self.weights = {
            (shift.name, control): weight for shift in shifts for control, weight in shift.weights(self.columns).items()
        }
        # Of the residual stream only these dimensions are brought to the CPU.
        self.raw_dims = np.unique(np.concatenate([shift.raw_top for shift in shifts]))
        self.raw_tops = {
            (shift.name, controls.RAW_CONTROL): np.searchsorted(self.raw_dims, shift.raw_top) for shift in shifts
        }
        self.sums: dict[tuple[str, str, str], Doubles] = {
            (*key, name): np.zeros(len(prompt_set.prompts))
            for key in (*self.weights, *self.raw_tops)
            for name in settings.estimators
        }

    def update(self, rows: PairedRows) -> None:
        self.raw.update(rows.base, rows.paired[:0], rows.demos[:0])
        active = encode(self.sae, rows.base, self.columns).on_cpu()
        for shift in self.shifts:
            shift.firings.add(self.prompt_set, rows, active)
        if "act" in self.estimators or "act_sq" in self.estimators:
            self._add_activations(rows, active)
        if "icl" in self.estimators:
            self._add_shifts(rows)
        self.log.record(rows)

    def _add_activations(self, rows: PairedRows, active: SparseFeatures) -> None:
        n_prompts = len(self.prompt_set.prompts)
        prompt_of = np.repeat(rows.base_of, np.diff(active.indptr))
        column_of = np.searchsorted(self.columns, active.indices)
        values = active.values.astype(np.float64)
        residual = self._raw(rows.base)
        for name, term, raw_term in (("act", values, np.abs(residual)), ("act_sq", values**2, residual**2)):
            if name in self.estimators:
                for key, weight in self.weights.items():
                    self.sums[(*key, name)] += np.bincount(prompt_of, weight[column_of] * term, minlength=n_prompts)
                for key, dims in self.raw_tops.items():
                    per_token = raw_term[:, dims].sum(axis=1)
                    self.sums[(*key, name)] += np.bincount(rows.base_of, per_token, minlength=n_prompts)

    def _raw(self, rows: torch.Tensor) -> Doubles:
        """[n_tokens, n_raw_dims]"""
        import torch

        found: Doubles = rows[:, torch.from_numpy(self.raw_dims).to(rows.device)].double().cpu().numpy()
        return found

    def _add_shifts(self, rows: PairedRows) -> None:
        n_prompts = len(self.prompt_set.prompts)
        # One "replicate" per prompt, so that a single pass over the rows gives each prompt its own sums.
        of_prompt = (rows.paired_of[:, None] == np.asarray(rows.prompts)).astype(np.float64)
        stats = ShiftStats(self.sae, columns=self.columns, n_replicates=len(rows.prompts))
        stats.update(rows.paired, rows.demos, of_prompt)
        squares = (self._raw(rows.demos) - self._raw(rows.paired)) ** 2
        for key, weight in self.weights.items():
            self.sums[(*key, "icl")][rows.prompts] = np.einsum("j,jp->p", weight, stats.weighted_sq_shift)
        for key, dims in self.raw_tops.items():
            per_token = squares[:, dims].sum(axis=1)
            self.sums[(*key, "icl")] += np.bincount(rows.paired_of, per_token, minlength=n_prompts)


def _with_head(model: str | Path | PreTrainedModel, settings: Settings) -> Any:
    """The whole model."""
    if isinstance(model, (str, Path)):
        return load_language_model(model, dtype=settings.dtype, device=settings.device)
    return model


def _with_signed(signed: dict[str, Any] | None, forecast: Forecast) -> Forecast:
    if signed is None:
        return forecast
    block = {name: value for name, value in signed.items() if name != "warnings"}
    unanswered = [domain.name for domain in forecast.domains if domain.name not in signed["domains"]]
    more = [f"too few answers for a signed forecast of {', '.join(unanswered)}"] if unanswered else []
    return replace(forecast, signed=block, warnings=[*forecast.warnings, *signed["warnings"], *more])


def _read_answers(whole: Any, answer_sets: Sequence[PromptSet], settings: Settings) -> dict[str, results.AnswerLog]:
    """How well the base model answers each domain, by domain name."""
    batch_tokens = settings.batch_tokens or MOST_BATCH_TOKENS
    reads = {}
    for done, answer_set in enumerate(answer_sets):
        outcomes = controls.answer_outcomes(whole, answer_set.prompts, batch_tokens=batch_tokens)
        reads[answer_set.name] = results.AnswerLog(answer_set, *outcomes)
        settings.tell("base loss and accuracy", done + 1, len(answer_sets))
    return reads


def _domain_score(
    read: _DomainRead, shift: _Shift, answers: results.AnswerLog | None, settings: Settings
) -> DomainScore:
    name, log, n_prompts = read.prompt_set.name, read.log, len(read.prompt_set.prompts)
    rng = np.random.default_rng([settings.seed, zlib.crc32(name.encode())])
    resamples = rng.multinomial(n_prompts, [1 / n_prompts] * n_prompts, size=N_BOOTSTRAP).astype(np.float64)
    n_read, n_pairs = log.n_read.astype(np.float64), log.n_pairs.astype(np.float64)
    sizes = {
        "": len(shift.top),
        "random": len(shift.top),
        "low_shift": len(shift.low_shift),
        "most_active": len(shift.most_active),
        controls.RAW_CONTROL: len(shift.raw_top),
    }
    value: dict[str, float | None] = dict.fromkeys(ESTIMATORS)
    interval: dict[str, Interval | None] = dict.fromkeys(ESTIMATORS)
    found: dict[str, dict[str, float]] = {control: {} for control in sizes if control}
    for estimator in settings.estimators:
        for control, size in sizes.items():
            numerator = read.sums[shift.name, control, estimator]
            denominator = {"act": n_read, "icl": n_pairs, "act_sq": n_read * max(size, 1)}[estimator]
            if denominator.sum() == 0:
                raise InputError(
                    f"domain '{name}' has no token to read for the estimator '{estimator}': its prompts without and "
                    "with demonstrations end differently, or all their tokens are special"
                )
            ratio = float(numerator.sum() / denominator.sum())
            if control:
                found[control][f"sts_{estimator}"] = ratio
            else:
                value[estimator] = ratio
                interval[estimator] = bootstrap_interval(numerator, denominator, resamples)
    found["cosine_of_means"] = {"cosine": controls.cosine(shift.raw.mean, read.mean)}
    if answers is not None:
        found["base_loss"] = {"nll": float(answers.nll.sum() / answers.n_tokens.sum())}
        found["base_accuracy"] = {"accuracy": float(answers.exact.mean())}
    return DomainScore(
        name=name,
        sts_act=value["act"],
        sts_act_ci=interval["act"],
        sts_icl=value["icl"],
        sts_icl_ci=interval["icl"],
        sts_act_sq=value["act_sq"],
        sts_act_sq_ci=interval["act_sq"],
        n_prompts=n_prompts,
        **_skipped(read.prompt_set),
        **log.counts(),
        controls=found,
    )


def _forecast(
    reader: Decoder | Activations,
    sae: SAE,
    fit: Fit,
    shift: _Shift,
    domain_reads: Sequence[_DomainRead],
    answer_reads: Mapping[str, results.AnswerLog],
    settings: Settings,
    tuned: str | None,
    firings: pa.Table,
    promoted: Mapping[int, list[str]],
    labels: Mapping[int, str],
    provenance: dict[str, Any],
) -> Forecast:
    import pyarrow as pa

    top_n, stats, hook = settings.top_n, shift.stats, _hook_of(reader, sae)
    n_moved = int((shift.importance > 0).sum())
    warnings = [*filter(None, (fit.warning, fit.names)), *(f"SAE: {note}" for note in sae.notes)]
    prompt_sets = [shift.prompt_set, *(read.prompt_set for read in domain_reads)]
    warnings += [warning for prompt_set in prompt_sets for warning in prompt_set.warnings]
    if settings.controls == "all":
        unanswered = [read.prompt_set.name for read in domain_reads if read.prompt_set.name not in answer_reads]
        if unanswered:
            warnings.append(f"too few answers to measure the base model on {', '.join(unanswered)}")
    if n_moved < top_n:
        warnings.append(
            f"only {n_moved} features shift at all, so {top_n - n_moved} of the {top_n} in D_N stand there by their "
            "index alone: lower --top-n"
        )
    stability = shift.overlaps(top_n)
    total = float(shift.importance.sum())
    tables = [shift.log.table({})]
    for read in domain_reads:
        values = {
            f"{control}_{estimator}_sum".removeprefix("_"): sums
            for (train, control, estimator), sums in read.sums.items()
            if train == shift.name
        }
        tables.append(read.log.table(values))
    tables += [answers.table() for answers in answer_reads.values()]
    return Forecast(
        model={
            "name": reader.name,
            "layer": hook.layer,
            "module": hook.path,
            "side": hook.side,
            "d_in": hook.d_in,
            "dtype": reader.dtype,
            "context_length": reader.context_length,
            "revision": reader.revision,
        },
        sae={
            "source": sae.source,
            "architecture": sae.architecture,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "k": sae.k or None,
            "hook_name": sae.hook_name,
            "mean_l0": shift.mean_l0,
            "fit": asdict(fit),
        },
        train={
            "name": shift.name,
            "n_prompts": len(shift.prompt_set.prompts),
            **_skipped(shift.prompt_set),
            **shift.log.counts(),
        },
        settings={
            "dims": settings.dims,
            "estimators": list(settings.estimators),
            "controls": settings.controls,
            "top_n": top_n,
            "tokens": settings.tokens,
            "shots": settings.shots,
            "domain_shots": settings.domain_shots,
            "limit": settings.limit,
            "n_bootstrap": N_BOOTSTRAP,
            "confidence": CONFIDENCE,
            "tuned": tuned,
        },
        shift={
            "share_of_top_n": float(shift.importance[shift.top].sum() / total) if total else 0.0,
            "n_features_shifted": n_moved,
            "stability": {
                "n_replicates": N_REPLICATES,
                "mean_overlap": float(np.mean(stability)),
                "overlap_ci": list(_interval(stability)),
            },
        },
        domains=[_domain_score(read, shift, answer_reads.get(read.prompt_set.name), settings) for read in domain_reads],
        shifted_features=[
            ShiftedFeature(
                index=int(j),
                mean_squared_shift=float(shift.importance[j]) if isinstance(stats, ShiftStats) else None,
                mean_activation=float(shift.mean_activation[j]),
                share=float(shift.importance[j] / total) if total else 0.0,
                promoted_tokens=promoted.get(int(j)) if rank < explain.N_FEATURES else None,
                neuronpedia=link,
                label=labels.get(int(j)),
            )
            for rank, (j, link) in enumerate(
                zip(
                    shift.top,
                    explain.neuronpedia_links(sae.metadata.get("neuronpedia_id"), shift.top.tolist()),
                    strict=True,
                )
            )
        ],
        warnings=warnings,
        provenance=provenance,
        stats=stats,
        controls={
            "random_features": shift.random,
            "low_shift_features": shift.low_shift,
            "most_active_features": shift.most_active,
            "raw_dimensions": shift.raw_top,
            "mean_residual": shift.raw.mean,
            "domain_mean_residuals": np.stack([read.mean for read in domain_reads] or [np.zeros(sae.d_in)]),
        },
        prompts=pa.concat_tables(tables),
        firings=firings,
    )


def _promoted_tokens(
    decoder: Decoder, sae: SAE, features: list[int], tokenizer: PreTrainedTokenizerBase, source: str | Path | None
) -> dict[int, list[str]]:
    """The output tokens that each feature promotes; none where W_dec or the unembedding is not at hand."""
    try:
        directions, matrix = sae.decoder_rows(features), unembedding(decoder.model, source)
        if directions is None or matrix is None or matrix.shape[1] != directions.shape[1]:
            return {}
        return dict(zip(features, explain.promoted_tokens(directions, matrix, tokenizer), strict=True))
    except Exception:  # an ornament of the report: a damaged head must not cost the forecast
        return {}


def bootstrap_interval(numerator: Doubles, denominator: Doubles, resamples: Doubles) -> Interval:
    """95% percentile interval of sum(numerator) / sum(denominator) under resampling of prompts.

    numerator, denominator: [n_prompts] sum over a prompt's tokens, number of them
    resamples: [n_resamples, n_prompts] how often each resampling drew each prompt

    Tokens of one prompt depend on each other, so whole prompts are drawn, numerator and denominator together.
    """
    # einsum adds in one order; a BLAS product would depend on the number of threads.
    totals = np.einsum("rp,p->r", resamples, denominator)
    ratios = np.einsum("rp,p->r", resamples, numerator)[totals > 0] / totals[totals > 0]
    return _interval(ratios)


def _interval(values: Doubles) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _skipped(prompt_set: PromptSet) -> dict[str, int]:
    return {
        "n_skipped": prompt_set.n_too_long + prompt_set.n_unanswered,
        "n_too_long": prompt_set.n_too_long,
        "n_unanswered": prompt_set.n_unanswered,
    }


def _provenance(sources: Mapping[str, object], settings: Settings) -> dict[str, Any]:
    import torch
    import transformers

    inputs = []
    for role, source in sources.items():
        several = role in ("domains", "demos") and not isinstance(source, (str, Path))
        for one in (list(source.values()) if isinstance(source, Mapping) else source) if several else [source]:  # type: ignore[attr-defined]
            path = _existing_path(one)
            inputs += results.hashed_inputs(role, [path]) if path else []
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": settings.command,
        "seed": settings.seed,
        "versions": {
            "sts_fast": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "instruction_set": _cpu.instruction_set(),
        "inputs": inputs,
    }


def _existing_path(source: object) -> Path | None:
    """The file or folder behind a path or 'name=path'; None for hub ids and for what is in memory."""
    if not isinstance(source, (str, Path)):
        return None
    candidates = [Path(source), Path(str(source).partition("=")[2] or source)]
    return next((path for path in candidates if path.exists()), None)
