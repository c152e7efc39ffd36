"""Options of a forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from sts_fast.data.options import Option
from sts_fast.data.sets import MIN_PROMPTS, Fields, FieldsOptions, Sampling, SamplingOptions
from sts_fast.errors import InputError
from sts_fast.forecast.estimators import SIZES, SizeEstimator
from sts_fast.model.session import Reading, ReadingOptions
from sts_fast.profile.library import Library
from sts_fast.signed.push import FeatureKind
from sts_fast.signed.signed import AT_THE_HOOK, SignedEstimator
from sts_fast.signed.trial import BATCH_ROWS, TrialDesign

# Of a trial, where nothing else is asked for; and the fewest, which see as many examples as a set must have.
TRIAL_STEPS, LEAST_STEPS = 16, MIN_PROMPTS // BATCH_ROWS
TRIAL_PROMPTS = 16

Dims = Literal["icl", "tuned", "active"]
Controls = Literal["features", "all"]


@dataclass(frozen=True)
class Settings(Sampling, Fields, Reading):
    """The options of a forecast; see Sampling, Fields and Reading for the rest of them.

    dims:      what the shifted features D_N are taken from: 'icl' (demonstrations of the training set in context),
               'tuned' (the model after training, given as `tuned`), 'active' (most active, no demonstrations)
    estimators: any of 'act', 'icl', 'act_sq' ('act' where none is named), see DomainScore for the equations; and the
               signed 'ntk', 'step', 'adapter', see push, and 'trial', see trial, which need answers and the whole model
    signed_features: what the signed ones are written in: 'sae', 'fired' or 'raw', see push.Features
    trial_steps, trial_cost: length of a trial, in steps of trial.BATCH_ROWS examples, or as a share of one pass over
               the training set, '2%'; trial_prompts: most prompts of a domain that it asks again, 0 for all
    controls:  'features' (other features, raw activations, cosine of means) or 'all' (also the base model's loss and
               accuracy, which need the whole model and answers)
    top_n:     size of D_N
    labels:    feature labels as Neuronpedia exports them: a file, an answer of its API or a folder of batches
    library:   place of profiles, see Library; a set that it has is not read again, and others are added to it
    show:      called with the first prompt of each set as it is sent, before any pass
    """

    TITLE = "Forecast"

    dims: Annotated[
        Dims,
        Option("D_N: what demonstrations shift (icl), what training shifted (tuned), or what is most active (active)."),
    ] = "icl"
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
    trial_steps: Annotated[
        int | None, Option(f"Steps of a trial, {BATCH_ROWS} examples each; default: {TRIAL_STEPS}.", least=LEAST_STEPS)
    ] = None
    trial_cost: Annotated[
        str | None, Option("Instead of --trial-steps: the share of one pass over the training set, as 2%.")
    ] = None
    trial_prompts: Annotated[
        int | None,
        Option(f"Most prompts of a domain that a trial asks again, 0 for all; default: {TRIAL_PROMPTS}.", least=0),
    ] = None
    controls: Annotated[
        Controls, Option("features, or all: also the base model's loss and accuracy (needs answers).")
    ] = "features"
    top_n: Annotated[
        int, Option("Features of D_N: the most shifted ones, or with --dims active the most active.", least=1)
    ] = 100
    labels: Annotated[str | Path | None, Option("Feature labels, a Neuronpedia export.")] = None
    library: Annotated[
        str | Path | None,
        Option("Folder of profiles, or as s3://bucket/lib: a set that is in it is not read again, others are added."),
    ] = None
    show: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trial_steps is not None and self.trial_cost is not None:
            raise InputError("--trial-steps and --trial-cost say the same thing: give one of them")
        of_trials = ("trial_steps", "trial_cost", "trial_prompts")
        for option, value in ((f"--{name.replace('_', '-')}", getattr(self, name)) for name in of_trials):
            if value is not None and "trial" not in self.estimators:
                raise InputError(f"{option} is of the estimator trial: add trial to --estimators")
        if self.trial_prompts == 1:
            raise InputError("--trial-prompts must be 2 or more, or 0 for all: one prompt says nothing of its error")
        if self.trial_cost is not None:
            self._steps_of_trial(1)

    def trial_design(self, n_examples: int) -> TrialDesign:
        """The trial of a training set of so many examples."""
        n_prompts = TRIAL_PROMPTS if self.trial_prompts is None else self.trial_prompts
        return TrialDesign(self._steps_of_trial(n_examples), n_prompts, self.seed)

    def _steps_of_trial(self, n_examples: int) -> int:
        """Raises InputError for a cost that is no share."""
        if self.trial_cost is None:
            return self.trial_steps or TRIAL_STEPS
        number, percent, rest = self.trial_cost.strip().partition("%")
        try:
            share = float(number) / (100 if percent else 1)
        except ValueError:
            share = 0.0
        if rest or not 0 < share <= 1:
            raise InputError(f"--trial-cost takes a share of the training set above 0%, as 2%, not '{self.trial_cost}'")
        return max(LEAST_STEPS, round(share * n_examples / BATCH_ROWS))

    def opened_library(self) -> Library | None:
        """Profiles to take and to add to: the library, or what the run keeps.

        Raises InputError where the library is in an object store that cannot be reached.
        """
        library = self.kept_profiles if self.library is None else Library(self.library)
        if library is not None:
            library.place.find()
        return library

    @property
    def kept_profiles(self) -> Library | None:
        """Profiles of the run alone; None where none are kept, or weights stay on disk, and so are not told apart."""
        return None if self.kept.folder is None or self.device_map is not None else Library(self.kept.folder)

    @property
    def signed(self) -> list[SignedEstimator]:
        """The estimators with a sign."""
        return [name for name in self.estimators if name not in SIZES]  # type: ignore[misc]

    @property
    def at_the_hook(self) -> list[SignedEstimator]:
        """Those of them that need gradients or maps at the SAE's hook."""
        return [name for name in self.signed if name in AT_THE_HOOK]

    @property
    def sizes(self) -> list[SizeEstimator]:
        """The estimators without a sign; `act` where none is named."""
        return [name for name in self.estimators if name in SIZES] or ["act"]  # type: ignore[misc]


class Options(SamplingOptions, FieldsOptions, ReadingOptions, total=False):
    """`Settings` as keywords."""

    dims: Dims
    estimators: Sequence[SizeEstimator | SignedEstimator]
    signed_features: FeatureKind
    trial_steps: int | None
    trial_cost: str | None
    trial_prompts: int | None
    controls: Controls
    top_n: int
    labels: str | Path | None
    library: str | Path | None
    show: Callable[[str], None] | None
