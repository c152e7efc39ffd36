"""Reads a run's folder for its report."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_fast import files
from sts_fast.ablate.record import ABLATION_FILE, ablation_schema
from sts_fast.errors import InputError, one_line
from sts_fast.files import Document
from sts_fast.forecast.blocks import Scores
from sts_fast.forecast.estimators import SIZES
from sts_fast.forecast.run import (
    FEATURES_FILE,
    PROMPTS_FILE,
    SCORES_FILE,
    SHIFT_FILE,
    TRAINING_FILE,
    VALIDATION_FILE,
    Run,
    belongs,
)
from sts_fast.profile.means import FeatureMeans

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles

CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Firing:
    """One token on which a feature fires, in its context; missing texts are ''."""

    value: float
    before: str
    token: str
    after: str
    stage: str
    domain: str
    id: str


@dataclass(frozen=True)
class Sent:
    """One prompt of prompts.parquet.

    positions, paired: places in its tokens that were read, and read with demonstrations too
    sums:  by estimator, what it adds to the score
    texts: of each token, '' for those not written; empty where the prompt is not shown, or no tokenizer was at hand
    parts: (feature, its sum, the place where it is most active) of the features that add most to the score
    """

    id: str
    question: str
    positions: list[int]
    paired: list[int]
    sums: dict[str, float]
    texts: list[str]
    parts: list[tuple[int, float, int | None]]

    @property
    def is_shown(self) -> bool:
        return bool(self.texts or self.parts)


@dataclass(frozen=True)
class Material:
    """A run's files as plain values.

    scores:     scores.json
    importance: [d_sae] the quantity that ranks D_N, in any unit; None without shift.safetensors
    firings:    feature of D_N -> its firings, strongest first; empty without features.parquet
    signed_firings: the same for the features with large parts in signed forecasts
    validation: validation.json; None without it
    training:   training.json, the measurements of TransferMonitor; None without it
    ablation:   ablation.json, the effects of zeroing features; None without it
    prompts:    by set, the training set as '', what was sent; empty without prompts.parquet
    warnings:   sentences about files that belong to another run
    """

    scores: Scores
    importance: Doubles | None
    firings: dict[int, list[Firing]]
    signed_firings: dict[int, list[Firing]]
    validation: Document | None
    training: Document | None
    ablation: Document | None
    prompts: dict[str, list[Sent]]
    warnings: list[str]


def read_material(folder: Path) -> Material:
    """Reads all files of a run; raises InputError where scores.json is missing or a file is damaged."""
    run = Run.load(folder)
    scores: Scores = _clean(run.scores)
    top = [feature["index"] for feature in scores["shifted_features"]]
    warnings: list[str] = []
    importance = _read_importance(folder / SHIFT_FILE, top, warnings)
    carriers = [feature["index"] for feature in (scores["signed"]["top_features"] if scores["signed"] else [])]
    firings = _read_firings(folder / FEATURES_FILE, {"score": top, "signed": carriers})
    validation = _beside(folder, VALIDATION_FILE, warnings)
    training = _beside(folder, TRAINING_FILE, warnings)
    ablation = _read_ablation(folder, warnings)
    prompts = _read_prompts(run)
    return Material(
        scores, importance, firings["score"], firings["signed"], validation, training, ablation, prompts, warnings
    )  # fmt: skip


def _beside(folder: Path, name: str, warnings: list[str]) -> Document | None:
    """A further file of the run; None where there is none, or that of another run, which a warning tells."""
    if not (folder / name).is_file():
        return None
    document: Document = files.read_json(folder / name)
    if not belongs(folder, document):
        warnings.append(f"{name} belongs to another run than {SCORES_FILE}, and is left out: make it again")
        return None
    cleaned: Document = _clean(document)
    return cleaned


def _read_ablation(folder: Path, warnings: list[str]) -> Document | None:
    import jsonschema

    ablation = _beside(folder, ABLATION_FILE, warnings)
    for error in () if ablation is None else jsonschema.Draft202012Validator(ablation_schema()).iter_errors(ablation):
        where = one_line(error.json_path)
        raise InputError(f"{folder / ABLATION_FILE} is not an {ABLATION_FILE}: {where}: {one_line(error.message)}")
    return ablation


def _clean(value: Any) -> Any:
    """The document with all text valid in HTML."""
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, dict):
        return {_clean_text(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _clean_text(text: str) -> str:
    """The text without lone surrogates, and with pictures of control characters."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return CONTROL_CHARACTER.sub(lambda match: chr(0x2400 + ord(match[0])) if match[0] != "\x7f" else "\u2421", text)


def _read_importance(path: Path, top: list[int], warnings: list[str]) -> Doubles | None:
    if not path.is_file():
        return None
    means, arrays = FeatureMeans.load(path)
    if "shifted_features" in arrays and arrays["shifted_features"].tolist() != top:
        warnings.append(f"{path.name} belongs to another run than {SCORES_FILE}: the concentration curve is left out")
        return None
    importance: Doubles = means.importance
    return importance


def _read_prompts(run: Run) -> dict[str, list[Sent]]:
    if not (run.folder / PROMPTS_FILE).is_file():
        return {}
    sent: dict[str, list[Sent]] = {}
    try:
        table = run.table(PROMPTS_FILE)
        wanted = ["stage", "domain", "id", "question", "positions", "paired", "texts", "parts"]
        sums = {f"{name}_sum": name for name in SIZES}
        for row in table.select([name for name in (*wanted, *sums) if name in table.column_names]).to_pylist():
            if row["stage"] not in ("shift", "score"):
                continue
            sent.setdefault("" if row["stage"] == "shift" else _clean_text(row["domain"]), []).append(
                Sent(
                    _clean_text(row["id"]),
                    _clean_text(row["question"] or ""),
                    row["positions"],
                    row["paired"],
                    {of: row[name] for name, of in sums.items() if row.get(name) is not None},
                    [_clean_text(text) for text in row.get("texts") or ()],
                    [(part["feature"], part["sum"], part["position"]) for part in row.get("parts") or ()],
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run.folder / PROMPTS_FILE} lacks {one_line(error)}: make the run again") from error
    return sent


def _read_firings(path: Path, wanted: dict[str, list[int]]) -> dict[str, dict[int, list[Firing]]]:
    """Firings by stage and feature, strongest first; rows of another stage, or none, count as 'score'."""
    if not path.is_file():
        return {stage: {} for stage in wanted}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable parquet file: {one_line(error)}") from error
    firings_of: dict[str, dict[int, list[tuple[int, Firing]]]] = {
        stage: {feature: [] for feature in features} for stage, features in wanted.items()
    }
    for row in rows:
        try:
            feature, rank, value = int(row["feature"]), int(row["rank"]), float(row["value"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} has no numbers in feature, rank and value: make the run again") from error
        of_stage = firings_of[row["stage"] if row.get("stage") in firings_of else "score"]
        if feature in of_stage and math.isfinite(value):
            texts = {
                key: _clean_text("" if row.get(key) is None else str(row[key]))
                for key in ("before", "token", "after", "stage", "domain", "id")
            }
            of_stage[feature].append((rank, Firing(value=value, **texts)))
    return {
        stage: {
            feature: [firing for _, firing in sorted(ranked, key=lambda item: item[0])]
            for feature, ranked in features.items()
            if ranked
        }
        for stage, features in firings_of.items()
    }
