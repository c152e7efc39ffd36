"""What can be chosen of a forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args

from sts_fast.data.prompts import Progress, TokenClass
from sts_fast.data.sets import Sampling
from sts_fast.errors import InputError
from sts_fast.forecast.run import ESTIMATOR_OPTIONS
from sts_fast.model.session import Reading
from sts_fast.model.weights import DeviceMap
from sts_fast.signed.push import FeatureKind
from sts_fast.signed.signed import SignedEstimator

Dims = Literal["icl", "tuned", "active"]
Controls = Literal["features", "all"]
SizeEstimator = Literal["act", "icl", "act_sq"]


class Options(TypedDict, total=False):
    """What can be chosen; `Settings` has the defaults and the meaning of each."""

    dims: Dims
    estimators: Sequence[SizeEstimator | SignedEstimator]
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
    device_map: DeviceMap | None
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
               signed 'ntk', 'step', 'adapter', see push, which need answers and the whole model
    signed_features: what the signed ones are written in: 'sae', 'fired' or 'raw', see push.Features
    controls:  'features' (other features, raw activations, cosine of means) or 'all' (also the base model's loss and
               accuracy, which need the whole model and answers)
    shots, domain_shots: demonstrations of the training set (for D_N), of each domain (for 'icl')
    top_n:     size of D_N
    tokens:    which tokens are read; see build_prompts
    limit:     most prompts of a set, drawn at random; None for all
    layer:     reads the residual stream after this layer, whatever the SAE's files say
    dtype, device: of the model, see load_decoder; sae_dtype: 'float32' or 'bfloat16', by default as stored
    device_map: spreads the model over devices, memory and disk: 'auto', 'balanced', 'cpu', 'disk', ...; see
        weights.Placement
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
    estimators: Sequence[SizeEstimator | SignedEstimator] = ("act", "icl")
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
    device_map: DeviceMap | None = None
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
            if estimator not in ESTIMATOR_OPTIONS:
                raise InputError(f"estimators must be among {', '.join(ESTIMATOR_OPTIONS)}, not '{estimator}'")
        if not self.estimators or len(set(self.estimators)) < len(self.estimators):
            raise InputError("estimators must name one or more, each once")
        for name in ("shots", "domain_shots", "top_n", "limit", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.shots, self.domain_shots, self.tokens, self.limit, self.seed)

    @property
    def reading(self) -> Reading:
        return Reading(
            self.layer,
            self.dtype,
            self.sae_dtype,
            self.device,
            self.device_map,
            self.batch_tokens,
            self.say,
            self.strict,
        )

    def tell_line(self, line: str) -> None:
        if self.say is not None:
            self.say(line)

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)
