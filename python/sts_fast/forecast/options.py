"""What can be chosen of a forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sts_fast.data.prompts import Progress, TokenClass
from sts_fast.data.sets import Sampling
from sts_fast.errors import InputError
from sts_fast.forecast.run import ESTIMATOR_OPTIONS, SIZES
from sts_fast.model.session import Reading, ReadingOptions
from sts_fast.signed.push import FeatureKind
from sts_fast.signed.signed import SignedEstimator

Dims = Literal["icl", "tuned", "active"]
Controls = Literal["features", "all"]
SizeEstimator = Literal["act", "icl", "act_sq"]


class Options(ReadingOptions, total=False):
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
    seed: int
    question_fields: Mapping[str, str]
    answer_fields: Mapping[str, str]
    labels: str | Path | None
    command: str | None
    progress: Progress | None
    show: Callable[[str], None] | None


@dataclass(frozen=True)
class Settings(Reading):
    """The options of a forecast, with those of how the model is read.

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
    question_fields, answer_fields: columns to read, by set name ('train', a domain's), '' for all others
    labels:    file of feature labels, as Neuronpedia exports them
    command:   recorded in the provenance
    progress:  called with (stage, prompts done, prompts in all)
    show:      called with the first prompt of each set as it is sent, before any pass

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
    seed: int = 0
    question_fields: Mapping[str, str] | None = None
    answer_fields: Mapping[str, str] | None = None
    labels: str | Path | None = None
    command: str | None = None
    progress: Progress | None = None
    show: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
        for name in ("shots", "domain_shots", "top_n", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")

    @property
    def signed(self) -> list[SignedEstimator]:
        """The estimators with a sign."""
        return [name for name in self.estimators if name not in SIZES]  # type: ignore[misc]

    @property
    def sizes(self) -> list[SizeEstimator]:
        """The estimators without a sign; `act` where none is named."""
        return [name for name in self.estimators if name in SIZES] or ["act"]  # type: ignore[misc]

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.shots, self.domain_shots, self.tokens, self.limit, self.seed)

    def tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)
