"""Reads a run's folder for its report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_fast import files
from sts_fast.ablate.record import ABLATION_FILE, ablation_schema
from sts_fast.errors import InputError
from sts_fast.forecast.run import (
    BY_NAME,
    DIMS_OF_ACTIVITY,
    FEATURES_FILE,
    SCHEMA_VERSION,
    SCORES_FILE,
    SHIFT_FILE,
    TRAINING_FILE,
    VALIDATION_FILE,
    check_has_scores,
    scores_schema,
)

if TYPE_CHECKING:
    from jsonschema import ValidationError

    from sts_fast.statistics import Doubles

# Beyond this no score or count is meant, and plots would overflow.
LARGEST = 1e100
CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
LONGEST_MESSAGE = 200


@dataclass(frozen=True)
class Firing:
    """One token on which a feature fires, in its context; what the file does not say is ''."""

    value: float
    before: str
    token: str
    after: str
    stage: str
    domain: str
    id: str


@dataclass(frozen=True)
class Run:
    """A run's files as plain values.

    scores:     scores.json
    importance: [d_sae] what D_N is ranked by, in any unit; None without shift.safetensors
    firings:    feature of D_N -> where it fires, strongest first; empty without features.parquet
    signed_firings: the same of the features that carry signed forecasts
    validation: validation.json; None without it
    training:   training.json, what TransferMonitor measured; None without it
    ablation:   ablation.json, what zeroing features did; None without it
    warnings:   files that belong to another run, and were left aside
    """

    scores: dict[str, Any]
    importance: Doubles | None
    firings: dict[int, list[Firing]]
    signed_firings: dict[int, list[Firing]]
    validation: dict[str, Any] | None
    training: dict[str, Any] | None
    ablation: dict[str, Any] | None
    warnings: list[str]


def read_run(folder: Path) -> Run:
    """Raises InputError where scores.json is missing or a file is damaged or of another kind."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: give the --output folder of sts-fast score")
    path = folder / SCORES_FILE
    check_has_scores(folder)
    scores = _read_json(path)
    _check_scores(scores, path)
    top = [feature["index"] for feature in scores["shifted_features"]]
    warnings: list[str] = []
    importance = _read_importance(folder / SHIFT_FILE, scores["settings"]["dims"], top, warnings)
    carriers = [feature["index"] for feature in (scores["signed"] or {}).get("top_features", [])]
    firings = _read_firings(folder / FEATURES_FILE, {"score": top, "signed": carriers})
    validation = None
    if (folder / VALIDATION_FILE).is_file():
        validation = _read_json(folder / VALIDATION_FILE)
        if _is_stale(validation, scores):
            warnings.append(
                f"{VALIDATION_FILE} holds other scores than {SCORES_FILE}, so it was made from an earlier forecast: "
                "run sts-fast validate again"
            )
    training = _read_json(folder / TRAINING_FILE) if (folder / TRAINING_FILE).is_file() else None
    ablation = _read_ablation(folder / ABLATION_FILE, top, warnings)
    return Run(scores, importance, firings["score"], firings["signed"], validation, training, ablation, warnings)


def _read_ablation(path: Path, top: list[int], warnings: list[str]) -> dict[str, Any] | None:
    import jsonschema

    if not path.is_file():
        return None
    ablation = _read_json(path)
    for error in jsonschema.Draft202012Validator(ablation_schema()).iter_errors(ablation):
        raise InputError(f"{path} is not an {ABLATION_FILE}: {_one_line(error.json_path)}: {_one_line(error.message)}")
    if not set(ablation["features"]["top"][0]) <= set(top):
        warnings.append(f"{path.name} belongs to another run than {SCORES_FILE}, and is left out")
        return None
    return ablation


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = _clean(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {_one_line(error)}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object")
    return document


def _clean(value: Any) -> Any:
    """The document with text that HTML can hold, and without numbers that nothing can draw."""
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, dict):
        return {_clean_text(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it holds a NaN or infinity")
    if isinstance(value, (int, float)) and abs(value) > LARGEST:
        raise ValueError("it holds a number beyond 1e100")
    return value


def _clean_text(text: str) -> str:
    """Without half characters; control characters as their pictures."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return CONTROL_CHARACTER.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] != "\x7f" else "\u2421", text)


def _check_scores(scores: dict[str, Any], path: Path) -> None:
    """A later minor version may add keys, and controls may be any numbers; all else is as in the schema."""
    import jsonschema

    version = scores.get("schema_version")
    if not isinstance(version, str) or version.partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        shown = f"of schema version {version}" if isinstance(version, (str, int, float)) else "without a schema version"
        raise InputError(
            f"{path} is a file {_one_line(shown)}, and this sts-fast reads {SCHEMA_VERSION}: make the run again"
        )
    for error in jsonschema.Draft202012Validator(scores_schema()).iter_errors(scores):
        if not _is_extension(error):
            where = _one_line(error.json_path)
            raise InputError(f"{path} is not a {SCORES_FILE}: {where}: {_one_line(error.message)}")


def _is_extension(error: ValidationError) -> bool:
    """Whether what breaks a rule of the schema is a new key, a control that is one number or none, or a version."""
    where = list(error.absolute_path)
    if error.validator == "additionalProperties" or "propertyNames" in error.absolute_schema_path:
        return True
    if where == ["schema_version"]:
        return True
    return "controls" in where[:-1] and (error.instance is None or isinstance(error.instance, (int, float)))


def _read_importance(path: Path, dims: str, top: list[int], warnings: list[str]) -> Doubles | None:
    if not path.is_file():
        return None
    kind, name = ("CorrelationStats", "sum_h") if dims in DIMS_OF_ACTIVITY else ("ShiftStats", "sum_sq_shift")
    arrays, _ = files.load_arrays(path, kind)
    name = "importance" if "importance" in arrays else name
    if name not in arrays or arrays[name].ndim != 1 or arrays[name].dtype.kind != "f":
        raise InputError(f"{path} has no '{name}': it is damaged, make the run again")
    if "shifted_features" in arrays and arrays["shifted_features"].tolist() != top:
        warnings.append(f"{path.name} belongs to another run than {SCORES_FILE}: the concentration curve is left out")
        return None
    return arrays[name].astype("float64")


def _read_firings(path: Path, wanted: dict[str, list[int]]) -> dict[str, dict[int, list[Firing]]]:
    """By stage and feature; what has another stage, or none, is of 'score'."""
    if not path.is_file():
        return {stage: {} for stage in wanted}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable parquet file: {_one_line(error)}") from error
    found: dict[str, dict[int, list[tuple[int, Firing]]]] = {
        stage: {feature: [] for feature in features} for stage, features in wanted.items()
    }
    for row in rows:
        try:
            feature, rank, value = int(row["feature"]), int(row["rank"]), float(row["value"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} has no numbers in feature, rank and value: make the run again") from error
        of_stage = found[row["stage"] if row.get("stage") in found else "score"]
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
        for stage, features in found.items()
    }


def _is_stale(validation: dict[str, Any], scores: dict[str, Any]) -> bool:
    """Whether any domain that both name has another score there."""
    estimator = str(validation.get("estimator"))
    known = {
        domain["name"]: domain["scores"][estimator]["value"]
        for domain in scores["domains"]
        if estimator in BY_NAME and estimator in domain["scores"]
    }
    domains = validation.get("domains")
    for domain in domains if isinstance(domains, list) else []:
        if isinstance(domain, dict) and isinstance(domain.get("name"), str) and domain["name"] in known:
            value, here = domain.get("score"), known[domain["name"]]
            if isinstance(value, (int, float)) and not math.isclose(value, here, rel_tol=1e-9):
                return True
    return False


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "…"
