"""Reads one evaluation from a file or a folder of any known format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from sts_fast.errors import InputError, listed
from sts_fast.outcomes.evaluation import Evaluation, read_json
from sts_fast.outcomes.formats import lm_eval, mmlu_pro, table


class DocumentFormat(Protocol):
    """A module of `formats` that reads a JSON document."""

    def recognises(self, document: Any) -> bool: ...

    def read(self, path: Path, document: Any) -> Evaluation: ...


DOCUMENTS: tuple[DocumentFormat, ...] = (lm_eval, mmlu_pro)  # the first that recognises a document reads it


def read_evaluation(path: Path) -> Evaluation:
    if path.is_dir():
        return _read_folder(path)
    if table.recognises(path):
        return table.read(path)
    if path.suffix.lower() == ".txt":
        return mmlu_pro.read_text_summary(path)
    return _read_document(path, read_json(path))


def _read_folder(folder: Path) -> Evaluation:
    results = sorted(folder.glob("results*.json"))
    if not results:
        inside = sorted({path.parent for path in folder.glob("*/results*.json")})
        if len(inside) > 1:
            names = listed(path.name for path in inside)
            raise InputError(f"{folder} contains results of several models ({names}): give the folder of one")
        results = sorted(inside[0].glob("results*.json")) if inside else []
    if results:
        newest = max(results, key=lambda path: (lm_eval.time_of(path), path.name))
        evaluation = _read_document(newest, read_json(newest))
        if len(results) > 1:
            evaluation.warnings.append(f"{newest} is the newest of {len(results)} results; the others are not read")
        return evaluation
    documents = sorted(path for path in folder.glob("*.json") if not path.name.endswith("summary.json"))
    if len(documents) == 1:
        return _read_document(documents[0], read_json(documents[0]))
    if documents:
        rows = []
        for path in documents:
            document = read_json(path)
            if not mmlu_pro.has_rows(document):
                raise InputError(
                    f"{path} is neither a results file of lm-evaluation-harness nor answers of MMLU-Pro: give the "
                    "results file itself"
                )
            rows += document
        return mmlu_pro.read_rows(folder, rows)
    summaries = sorted(folder.glob("*summary.json"))
    if not summaries:
        raise InputError(f"{folder} contains no results: give results_*.json, or MMLU-Pro's JSON per question")
    merged = Evaluation()
    for path in summaries:
        evaluation = _read_document(path, read_json(path))
        merged.metrics |= evaluation.metrics
        merged.warnings = evaluation.warnings
    return merged


def _read_document(path: Path, document: Any) -> Evaluation:
    for known in DOCUMENTS:
        if known.recognises(document):
            return known.read(path, document)
    raise InputError(
        f"{path} contains no results of a known format: give those of lm-evaluation-harness or MMLU-Pro, or a CSV"
    )
