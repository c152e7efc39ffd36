"""Types of the blocks of scores.json, as a run writes them and every reader of a run gets them.

scores.schema.json describes each number and its limits. A later minor version may add keys.
"""

from __future__ import annotations

from typing import TypedDict

from sts_fast.data.columns import RowsBlock
from sts_fast.files import Document, InputFile
from sts_fast.model.forward import PassRecord
from sts_fast.signed.signed import CarrierBlock, SignedBlock


class ModelBlock(TypedDict):
    """The model, and the place in it that was read."""

    name: str
    layer: int | None
    module: str
    side: str
    d_in: int
    dtype: str
    context_length: int | None
    revision: str | None
    weights_sha256: str | None


class SAEBlock(TypedDict):
    """The SAE. fit: the fields of sae_check.Fit."""

    source: str
    architecture: str
    d_in: int
    d_sae: int
    k: int | None
    hook_name: str
    mean_l0: float
    fit: Document


class SetBlock(TypedDict):
    """The prompts of a set; `train` is one. See DomainScore for the counts."""

    name: str
    n_prompts: int
    n_skipped: int
    n_too_long: int
    n_unanswered: int
    n_tokens: int
    n_pairs: int
    n_special: int
    n_straddling: int
    n_sinks: int
    demonstrations: list[list[str]]


class SettingsBlock(TypedDict):
    """The settings of a run that its scores depend on."""

    dims: str
    estimators: list[str]
    controls: str
    top_n: int
    tokens: str
    shots: int
    domain_shots: int
    demo_draws: int
    limit: int | None
    n_bootstrap: int
    confidence: float
    tuned: str | None


class ConcentrationBlock(TypedDict):
    """Share of the total shift that the n most shifted features have."""

    n: int
    share: float


class StabilityBlock(TypedDict):
    """Share of D_N that resampling the training prompts keeps."""

    n_replicates: int
    mean_overlap: float
    overlap_ci: list[float]


class ShiftBlock(TypedDict):
    """The shift of all features, or the quantity that D_N is ranked by."""

    share_of_top_n: float
    n_features_shifted: int
    concentration: list[ConcentrationBlock]
    stability: StabilityBlock


class SettledFeaturesBlock(TypedDict):
    """kept: share of D_N that resampling the training prompts keeps; more_prompts: see Forecast.settled."""

    kept: float
    more_prompts: int | None


class SettledRankingBlock(TypedDict):
    """pairs_apart: share of the pairs of domains that are apart; more_prompts: see Forecast.settled."""

    pairs_apart: float
    more_prompts: int | None


class SettledBlock(TypedDict):
    """Certainty of D_N and, by estimator, of the ranking."""

    shifted_features: SettledFeaturesBlock
    ranking: dict[str, SettledRankingBlock]


class ScoreBlock(TypedDict):
    """A number with its 95% interval, [low, high]."""

    value: float
    ci: list[float]


class DomainBlock(SetBlock):
    """A DomainScore. An entry of `controls` that another version wrote may also be one number, or none."""

    scores: dict[str, ScoreBlock]
    controls: dict[str, dict[str, float] | float | None]
    change: float | None
    change_interval: list[float] | None


class FeatureBlock(CarrierBlock):
    """A ShiftedFeature."""

    mean_squared_shift: float | None
    mean_activation: float


class LearnedBlock(TypedDict):
    """The calibration that made `change` of the domains."""

    estimator: str
    unit: str
    signed: bool
    level: float
    n_trains: int
    n_runs: int


class TestedCalibrationBlock(LearnedBlock):
    """A calibration whose intervals were tested on training sets left out of it."""

    coverage: float
    width: float
    constant_width: float
    warnings: list[str]


class UntestedCalibrationBlock(LearnedBlock):
    """A calibration learned from too few training sets to leave any out."""

    coverage: None
    width: None
    constant_width: None
    warnings: list[str]


CalibrationBlock = TestedCalibrationBlock | UntestedCalibrationBlock


class ProvenanceBlock(TypedDict):
    """Everything that a run can be repeated from."""

    created_at: str
    command: str | None
    seed: int
    versions: dict[str, str]
    instruction_set: str
    prompts_sha256: str
    forward_passes: PassRecord
    inputs: list[InputFile]
    rows: list[RowsBlock]


class LengthBlock(TypedDict):
    """Extent to which the length of the questions explains an estimator's scores; see LengthEffect."""

    constant_share: float | None
    r_inverse_length: float | None


class Scores(TypedDict):
    """Contents of scores.json. rollouts: counts of completions and rewards, written by `rollouts`."""

    schema_version: str
    model: ModelBlock
    sae: SAEBlock
    train: SetBlock
    settings: SettingsBlock
    shift: ShiftBlock
    settled: SettledBlock
    length: dict[str, LengthBlock]
    domains: list[DomainBlock]
    shifted_features: list[FeatureBlock]
    signed: SignedBlock | None
    rollouts: Document | None
    calibration: CalibrationBlock | None
    warnings: list[str]
    provenance: ProvenanceBlock
