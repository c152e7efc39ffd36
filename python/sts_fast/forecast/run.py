"""Contents of a forecast, and the files it is written to."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError, listed, one_line
from sts_fast.files import Document
from sts_fast.forecast import stability
from sts_fast.forecast.blocks import (
    CalibrationBlock,
    LengthBlock,
    ModelBlock,
    ProvenanceBlock,
    SAEBlock,
    Scores,
    SetBlock,
    SettingsBlock,
    SettledBlock,
    SettledRankingBlock,
    ShiftBlock,
)
from sts_fast.forecast.controls import CONTROLS
from sts_fast.forecast.estimators import BY_NAME, SIZES
from sts_fast.forecast.plot import Changes, Plotted, plot
from sts_fast.profile.means import FeatureMeans
from sts_fast.signed.signed import SignedBlock
from sts_fast.statistics import Interval

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from jsonschema import ValidationError
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

SCHEMA_VERSION = "1.0"
SCORES_FILE = "scores.json"
SHIFT_FILE = "shift.safetensors"
PROMPTS_FILE = "prompts.parquet"
FEATURES_FILE = "features.parquet"
VALIDATION_FILE = "validation.json"
TRAINING_FILE = "training.json"
COMPARISON_FILE = "compare.json"
REPORT_FILE = "report.html"
CARD_FILE = "README.md"

# All that is written into the folder of a run.
RUN_FILES = (
    *(SCORES_FILE, SHIFT_FILE, PROMPTS_FILE, FEATURES_FILE, VALIDATION_FILE, TRAINING_FILE, REPORT_FILE, CARD_FILE),
    *("ablation.json", "ablation.parquet", "trace.json", "trace.parquet", "selected.jsonl", files.RESULTS_FILE),
)

VALUE_COLUMNS = [
    f"{control}_{estimator}_sum".removeprefix("_")
    for control in ("", *(picked.name for picked in CONTROLS if picked.pick is not None and picked.of == "features"))
    for estimator in SIZES
] + ["answer_nll_sum", "answer_exact", "advantage"]


@dataclass(frozen=True)
class Score:
    """A number with its 95% percentile interval of a bootstrap over prompts, D_N held fixed."""

    value: float
    ci: Interval


@dataclass(frozen=True)
class DomainScore:
    """The forecast for one domain.

    scores:     by estimator, those that were asked for; signed ones of domains with answers only, see push
        act:    E_x sum_{j in D_N} h_j(x)                          (STS paper, STS_act)
        icl:    E_x sum_{j in D_N} ||h_j(demos, x) - h_j(x)||^2     (STS paper, STS_ICL)
        act_sq: E_x mean_{j in D_N} h_j(x)^2                       (the variant in the authors' notebook)
    n_tokens:   tokens behind act; n_pairs: token pairs behind icl
    n_skipped:  examples looked at and left out: n_too_long for the model's context, n_unanswered where answers are read
    n_special, n_straddling, n_sinks: tokens left out because they are special, because a part of them is the chat
        template's, because they are attention sinks
    demonstrations: of each draw, the ids of the examples shown; empty where none are
    controls:   the same estimators with other features in the place of D_N, by control and estimator
    change, change_interval: what a calibration makes of the score; None without one, or where it does not reach
    """

    name: str
    scores: dict[str, Score]
    n_prompts: int
    n_tokens: int
    n_pairs: int
    n_skipped: int
    n_too_long: int
    n_unanswered: int
    n_special: int
    n_straddling: int
    n_sinks: int
    demonstrations: list[list[str]]
    controls: dict[str, dict[str, float]]
    change: float | None = None
    change_interval: Interval | None = None

    @classmethod
    def from_plain(cls, domain: Mapping[str, Any]) -> DomainScore:
        """Reads one of `domains` of scores.json."""
        scores = {name: Score(score["value"], tuple(score["ci"])) for name, score in domain["scores"].items()}
        interval = domain.get("change_interval")
        return cls(**_known(cls, {**domain, "scores": scores, "change_interval": interval and tuple(interval)}))


@dataclass(frozen=True)
class ShiftedFeature:
    """One feature of D_N.

    mean_squared_shift: E_x ||h_j(x) - h_j(demos, x)||^2; None where no shift was measured
    mean_activation:    E_x h_j(x)
    share:              its part of the total, over all features, of what D_N is ranked by
    promoted_tokens:    the output tokens that its decoder direction raises most; None where not looked up
    neuronpedia:        address of its page; label: its explanation; None where there is none
    """

    index: int
    mean_squared_shift: float | None
    mean_activation: float
    share: float
    promoted_tokens: list[str] | None = None
    neuronpedia: str | None = None
    label: str | None = None


@dataclass(frozen=True, repr=False)
class Forecast:
    """A whole forecast: numbers, the statistics they come from, and every prompt that was sent.

    model, sae, train, settings, shift, length, provenance: the blocks of scores.json
    means:   what each feature does on the training set
    controls: what the controls were computed from: feature sets, raw dimensions and mean residuals, by name
    prompts: one row per prompt and stage, as in prompts.parquet
    firings: where the most shifted features fire in the domains, as in features.parquet
    signed: what signed scores rest on, where they were asked for; see signed.measure_signed
    rollouts: the completions and rewards that it rests on, where it is one of RL; see rollouts.rollouts
    calibration: what `change` of the domains was made with; None without it
    """

    model: ModelBlock
    sae: SAEBlock
    train: SetBlock
    settings: SettingsBlock
    shift: ShiftBlock
    length: dict[str, LengthBlock]
    domains: list[DomainScore]
    shifted_features: list[ShiftedFeature]
    warnings: list[str]
    provenance: ProvenanceBlock
    means: FeatureMeans
    controls: dict[str, NDArray[Any]]
    prompts: pa.Table
    firings: pa.Table
    signed: SignedBlock | None = None
    rollouts: Document | None = None
    calibration: CalibrationBlock | None = None

    def __repr__(self) -> str:
        model, names = self.model["name"], ", ".join(self.settings["estimators"])
        return f"Forecast('{self.train['name']}' on {len(self.domains)} domains by {names}, {model})"

    def _repr_html_(self) -> str:
        """A table of the scores, for notebooks."""
        columns = [name for name in BY_NAME if any(name in domain.scores for domain in self.domains)]
        head = "".join(f"<th>{html.escape(BY_NAME[name].label)}</th>" for name in columns)
        rows = []
        for domain in self.domains:
            found = [(BY_NAME[name], domain.scores.get(name)) for name in columns]
            texts = ["" if score is None else of.text(score.value, score.ci) for of, score in found]
            cells = "".join(f"<td>{text}</td>" for text in texts)
            rows.append(f"<tr><th>{html.escape(domain.name)}</th>{cells}</tr>")
        return f"<p>{html.escape(repr(self))}</p><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"

    @classmethod
    def load(cls, folder: str | Path) -> Forecast:
        """The forecast that `save` wrote. Raises InputError where one of its files is missing or damaged."""
        run = Run.load(folder)
        means, more = run.means()
        features = [ShiftedFeature(**_known(ShiftedFeature, feature)) for feature in run.scores["shifted_features"]]
        read = {
            "domains": [DomainScore.from_plain(domain) for domain in run.scores["domains"]],
            "shifted_features": features,
            "means": means,
            "controls": {name: array for name, array in more.items() if name != "shifted_features"},
            "prompts": run.table(PROMPTS_FILE),
            "firings": run.table(FEATURES_FILE),
        }
        return cls(**_known(cls, {**run.scores, **read}))

    @property
    def settled(self) -> SettledBlock:
        """Measures how settled D_N and the ranking are, and how many more prompts would settle them; see stability.

        shifted_features: share of D_N that resampling the training prompts keeps; ranking: by estimator, share of the
        pairs of domains that are apart, empty for fewer than two domains; more_prompts: of the training set, of each
        domain, until that share is 90%: 0 where it is, None for more than 100 times those that there are; behind
        demonstrations, with more draws of them in proportion
        """
        kept, n_train = self.shift["stability"]["mean_overlap"], self.train["n_prompts"]
        times = stability.times_for_overlap(kept)
        ranking: dict[str, SettledRankingBlock] = {}
        for estimator in self.settings["estimators"] if len(self.domains) > 1 else ():
            apart, times_apart = stability.pairs_apart(*self.column(estimator))
            ranking[estimator] = {
                "pairs_apart": apart,
                "more_prompts": stability.n_more(self.prompts_per_domain, times_apart),
            }
        return {
            "shifted_features": {"kept": kept, "more_prompts": stability.n_more(n_train, times)},
            "ranking": ranking,
        }

    @property
    def prompts_per_domain(self) -> int:
        """In the mean."""
        return round(np.mean([domain.n_prompts for domain in self.domains])) if self.domains else 0

    def column(self, estimator: str) -> tuple[list[float], list[Interval]]:
        """Scores of all domains by an estimator without sign, and their intervals."""
        scores = [domain.scores[estimator] for domain in self.domains]
        return [score.value for score in scores], [score.ci for score in scores]

    def to_dict(self) -> Scores:
        """Contents of scores.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "sae": self.sae,
            "train": self.train,
            "settings": self.settings,
            "shift": self.shift,
            "settled": self.settled,
            "length": self.length,
            "domains": [_plain(domain) for domain in self.domains],
            "shifted_features": [_plain(feature) for feature in self.shifted_features],
            "signed": self.signed,
            "rollouts": self.rollouts,
            "calibration": self.calibration,
            "warnings": self.warnings,
            "provenance": self.provenance,
        }

    def to_pandas(self) -> pd.DataFrame:
        """One row per domain: scores as columns `act` and `act_ci`, controls as `random_act`, and so on."""
        import pandas as pd

        return pd.json_normalize([_plain(domain) for domain in self.domains], sep="_").rename(
            columns=lambda name: re.sub("^scores_(.*?)(_value)?$", r"\1", name).removeprefix("controls_")
        )

    def plot(
        self,
        estimator: str | None = None,
        outcome: Mapping[str, float] | Changes | None = None,
        *,
        ax: Axes | None = None,
    ) -> Axes:
        """Draws the scores of all domains, the highest on top, with 95% intervals; needs the extra 'sts-fast[plot]'.

        estimator: such as 'act' or 'trial_loss'; by default the first with a sign, or else the first
        outcome:   measured changes by domain, as numbers or of read_outcomes: then a scatter of the change, or for
                   scores without a sign of its size, over the forecast, of the domains that have one
        ax:        where to draw; by default in a figure of its own

        Returns the Axes. A bar beside a score without a sign is that of random features. Raises InputError without
        matplotlib, for an estimator that the forecast does not have, and for outcomes of none of its domains.
        """
        scores: dict[str, list[Plotted]] = {}
        for domain in self.domains:
            for name, score in domain.scores.items():
                low, high = (BY_NAME[name].factor * bound for bound in score.ci)
                random = domain.controls.get("random", {}).get(name)
                row = Plotted(domain.name, BY_NAME[name].factor * score.value, (low, high), random)
                scores.setdefault(name, []).append(row)
        return plot(scores, estimator, outcome, ax)

    def save(self, folder: str | Path) -> None:
        """Writes the run as a folder, whole or not at all; one of an earlier run, and all that it holds, is replaced.

        Raises InputError where the folder holds anything else, or cannot be written to.
        """
        folder = Path(folder)
        held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if other := [name for name in held if name not in RUN_FILES] or ([] if SCORES_FILE in held else held):
            raise InputError(f"{folder} holds {listed(other)}, which a run does not have: give another folder")
        with files.atomic_folder(folder) as temporary:
            self.write(temporary)

    def write(self, folder: Path) -> None:
        """Writes prompts.parquet, features.parquet, shift.safetensors and scores.json into an empty folder."""
        import pyarrow.parquet as pq

        scores = self.to_dict()
        validate_scores(scores)
        pq.write_table(self.prompts, folder / PROMPTS_FILE, compression="zstd")
        pq.write_table(self.firings, folder / FEATURES_FILE, compression="zstd")
        shifted = np.asarray([feature.index for feature in self.shifted_features])
        self.means.save(folder / SHIFT_FILE, {"shifted_features": shifted, **self.controls})
        (folder / SCORES_FILE).write_text(files.to_json(scores), encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """The folder of a forecast. scores: scores.json; the other files are read when they are asked for."""

    folder: Path
    scores: Scores

    @classmethod
    def load(cls, place: str | Path) -> Run:
        """Reads the folder, or the scores.json, that is given.

        A later minor version may add keys, and a control may be any number.

        Raises InputError where scores.json is missing, damaged, of another kind or of another version.
        """
        place = Path(place)
        if not place.is_file():
            _check_has_scores(place)
        path = place if place.is_file() else place / SCORES_FILE
        document = files.read_json(path)
        _check_scores(document, path)
        return cls(path.parent, cast(Scores, document))

    def means(self) -> tuple[FeatureMeans, dict[str, NDArray[Any]]]:
        """What each feature does on the training set, and the other arrays of shift.safetensors."""
        return FeatureMeans.load(self.folder / SHIFT_FILE)

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One of the parquet files."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(self.folder / name, columns=columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InputError(f"{self.folder / name} cannot be read ({one_line(error)}): make the run again") from error


def save_beside(folder: Path, name: str, document: Document) -> None:
    """Writes a further file of a run, which names the run's scores.json by its digest.

    document: names that of its own run, where it was made of one, as `run`

    Raises InputError where it cannot be written.
    """
    scores = folder / SCORES_FILE
    of_run = {"run": files.sha256(scores)} if scores.is_file() else {}
    with files.atomic_path(folder / name) as path:
        path.write_text(files.to_json({**of_run, **document}), encoding="utf-8")


def belongs(folder: Path, document: Document) -> bool:
    """True for what `save_beside` wrote beside the scores.json that the folder has now."""
    return document.get("run") == files.sha256(folder / SCORES_FILE)


def scores_schema() -> Document:
    """The JSON schema of scores.json: that of the package, with the names of estimators and of controls' numbers."""
    schema = files.load_schema("forecast/scores.schema.json")
    quantities = (control.quantity for control in CONTROLS if control.quantity)
    names = {"control_number": (*SIZES, *quantities), "size_estimator": SIZES, "estimator": tuple(BY_NAME)}
    filled: Document = {name: {"enum": [*dict.fromkeys(values)]} for name, values in names.items()}
    sizes = {f"^({'|'.join(SIZES)})$": {"$ref": "#/$defs/size"}}
    filled["scores"] = {**schema["$defs"]["scores"], "patternProperties": sizes}
    return {**schema, "$defs": {**schema["$defs"], **filled}}


def validate_scores(scores: Mapping[str, Any]) -> None:
    """Raises jsonschema.ValidationError where a document is not a valid scores.json."""
    files.check_document(scores, scores_schema())


def _check_has_scores(folder: Path) -> None:
    """Raises InputError for a folder without scores.json, with those below it: one for each SAE or training set."""
    if (folder / SCORES_FILE).is_file():
        return
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: give the --output folder of sts-fast score")
    run_folders = [path.parent for depth in ("[!.]*", "[!.]*/[!.]*") for path in folder.glob(f"{depth}/{SCORES_FILE}")]
    below = sorted(path.relative_to(folder).as_posix() for path in run_folders)
    if below:
        some = ", ".join(below[:5]) + (", …" if len(below) > 5 else "")
        raise InputError(f"{folder} has no {SCORES_FILE} itself, but folders that do ({some}): give one of them")
    raise InputError(f"{folder} has no {SCORES_FILE}: give the --output folder of sts-fast score")


def _check_scores(scores: Document, path: Path) -> None:
    import jsonschema

    version = scores.get("schema_version")
    if not isinstance(version, str) or version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        shown = f"of schema version {version}" if isinstance(version, (str, int, float)) else "without a schema version"
        raise InputError(
            f"{path} is a file {one_line(shown)}, and this sts-fast reads {SCHEMA_VERSION}: make the run again"
        )
    for error in jsonschema.Draft202012Validator(scores_schema()).iter_errors(scores):
        if not _is_extension(error):
            reason = f"{one_line(error.json_path)}: {one_line(error.message)}"
            raise InputError(f"{path} is not a {SCORES_FILE}: {reason}; make the run again")


def _is_extension(error: ValidationError) -> bool:
    """True where what breaks a rule of the schema is a new key, a control of one number or none, or a version."""
    where = list(error.absolute_path)
    if error.validator == "additionalProperties" or "propertyNames" in error.absolute_schema_path:
        return True
    if where == ["schema_version"]:
        return True
    return "controls" in where[:-1] and (error.instance is None or isinstance(error.instance, (int, float)))


def with_value_columns(table: pa.Table) -> pa.Table:
    """Rows of prompts.parquet with every value column behind the others, null where a stage has none."""
    import pyarrow as pa

    columns = {name: table[name] for name in table.column_names if name not in VALUE_COLUMNS}
    for name in VALUE_COLUMNS:
        columns[name] = table[name] if name in table.column_names else pa.nulls(len(table), pa.float64())
    return pa.table(columns)


def _known(kind: type, values: Mapping[str, Any]) -> Document:
    """Without the keys that a later version added."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def _plain(record: DomainScore | ShiftedFeature) -> Any:
    """The record's block of scores.json."""
    return asdict(record, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})
