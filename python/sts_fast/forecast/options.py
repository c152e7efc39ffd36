"""Options of a forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from sts_fast.data.options import Option
from sts_fast.data.sets import Fields, FieldsOptions, Sampling, SamplingOptions
from sts_fast.forecast.estimators import SIZES, SizeEstimator
from sts_fast.model.session import Reading, ReadingOptions
from sts_fast.signed.push import FeatureKind
from sts_fast.signed.signed import SignedEstimator

Dims = Literal["icl", "tuned", "active"]
Controls = Literal["features", "all"]


@dataclass(frozen=True)
class Settings(Sampling, Fields, Reading):
    """The options of a forecast; see Sampling, Fields and Reading for the rest of them.

    dims:      what the shifted features D_N are taken from: 'icl' (demonstrations of the training set in context),
               'tuned' (the model after training, given as `tuned`), 'active' (most active, no demonstrations)
    estimators: any of 'act', 'icl', 'act_sq' ('act' where none is named), see DomainScore for the equations; and the
               signed 'ntk', 'step', 'adapter', see push, which need answers and the whole model
    signed_features: what the signed ones are written in: 'sae', 'fired' or 'raw', see push.Features
    controls:  'features' (other features, raw activations, cosine of means) or 'all' (also the base model's loss and
               accuracy, which need the whole model and answers)
    top_n:     size of D_N
    labels:    feature labels as Neuronpedia exports them: a file, an answer of its API or a folder of batches
    show:      called with the first prompt of each set as it is sent, before any pass
    """

    dims: Annotated[Dims, Option("What the shifted features are taken from.")] = "icl"
    estimators: Annotated[
        Sequence[SizeEstimator | SignedEstimator],
        Option(
            f"Comma-separated, of: {', '.join(get_args(SizeEstimator))}; with a sign, from answers: "
            f"{', '.join(get_args(SignedEstimator))}."
        ),
    ] = ("act", "icl")
    signed_features: Annotated[
        FeatureKind, Option("What signed estimators are written in: activations, firings, residuals.")
    ] = "sae"
    controls: Annotated[
        Controls, Option("features, or all: also the base model's loss and accuracy (needs answers).")
    ] = "features"
    top_n: Annotated[int, Option("How many of the most shifted features are followed.", least=1)] = 100
    labels: Annotated[str | Path | None, Option("Feature labels, a Neuronpedia export.")] = None
    show: Callable[[str], None] | None = None

    @property
    def signed(self) -> list[SignedEstimator]:
        """The estimators with a sign."""
        return [name for name in self.estimators if name not in SIZES]  # type: ignore[misc]

    @property
    def sizes(self) -> list[SizeEstimator]:
        """The estimators without a sign; `act` where none is named."""
        return [name for name in self.estimators if name in SIZES] or ["act"]  # type: ignore[misc]


class Options(SamplingOptions, FieldsOptions, ReadingOptions, total=False):
    """`Settings` as keywords."""

    dims: Dims
    estimators: Sequence[SizeEstimator | SignedEstimator]
    signed_features: FeatureKind
    controls: Controls
    top_n: int
    labels: str | Path | None
    show: Callable[[str], None] | None
