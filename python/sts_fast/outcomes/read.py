"""Reads one evaluation from a file or a folder of any known format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from sts_fast.errors import InputError, listed
from sts_fast.outcomes.evaluation import Evaluation, Task, read_json
from sts_fast.outcomes.formats import helm, inspect_log, lighteval, lm_eval, mmlu_pro, opencompass, table


class DocumentFormat(Protocol):
    """A module of `formats` that reads a JSON document."""

    def recognises(self, document: Any) -> bool: ...

    def read(self, path: Path, document: Any) -> Evaluation: ...


# The first that recognises a document reads it.
DOCUMENTS: tuple[DocumentFormat, ...] = (inspect_log, lighteval, lm_eval, mmlu_pro, helm)
KNOWN = "lm-evaluation-harness, lighteval, inspect, HELM, OpenCompass or MMLU-Pro"
SUMMARIES = "summary_*.csv"
# Names of files in a folder, by the harness that writes them.
NAMES = {
    "results*.json": "lm-evaluation-harness or lighteval",
    helm.STATS_FILE: "HELM",
    f"*{inspect_log.SUFFIX}": "inspect",
    SUMMARIES: "OpenCompass",
}


def read_evaluation(path: Path) -> Evaluation:
    """path: a file or a folder; of OpenCompass, which writes several models into a file, also PATH:MODEL.

    Raises InputError for a place that contains no results, or those of several models.
    """
    place, _, model = str(path).rpartition(":")
    if place and model and not path.exists() and Path(place).exists():
        evaluation = _of_opencompass(Path(place), model)
    else:
        evaluation = _read_folder(path) if path.is_dir() else _read_file(path)
    if not evaluation.tasks:
        raise InputError(f"{path} contains no results ({'; '.join(evaluation.warnings)}): evaluate the model again")
    return evaluation


def _of_opencompass(place: Path, model: str) -> Evaluation:
    paths = _summaries(place) if place.is_dir() else [place]
    if not paths or not opencompass.recognises(paths[-1]):
        raise InputError(f"{place} is no summary of OpenCompass: a model is named only in one, as {place}:{model}")
    return _merged(place, paths, lambda path: opencompass.read(path, model))


def _read_file(path: Path) -> Evaluation:
    suffix = path.suffix.lower()
    if suffix == inspect_log.SUFFIX:
        return inspect_log.read_archive(path)
    if opencompass.recognises(path):
        return opencompass.read(path)
    if table.recognises(path):
        return table.read(path)
    if suffix == ".txt":
        return mmlu_pro.read_text_summary(path)
    return _read_document(path, read_json(path))


def _read_folder(folder: Path) -> Evaluation:
    """One evaluation of all files in and below a folder, of the harness that wrote them."""
    found = {name: sorted(folder.rglob(name)) for name in NAMES}
    found[SUMMARIES] = _summaries(folder)
    kinds = [name for name, paths in found.items() if paths]
    if len(kinds) > 1:
        raise InputError(
            f"{folder} contains results of several harnesses ({listed(NAMES[name] for name in kinds)}): give the "
            "folder of one"
        )
    if kinds:
        return _merged(folder, found[kinds[0]], _read_file)
    documents = sorted(path for path in folder.glob("*.json") if not path.name.endswith("summary.json"))
    documents = documents or sorted(path for path in folder.rglob("*.json") if not path.name.endswith("summary.json"))
    if documents:
        return _read_documents(folder, documents)
    summaries = sorted(folder.glob("*summary.json"))
    if not summaries:
        raise InputError(f"{folder} contains no results: give results of {KNOWN}")
    return _merged(folder, summaries, _read_file)


def _summaries(folder: Path) -> list[Path]:
    """OpenCompass' summaries as CSV, else in another form: it writes all three."""
    for name in (SUMMARIES, "summary_*.md", "summary_*.txt"):
        if paths := [path for path in sorted(folder.rglob(name)) if opencompass.recognises(path)]:
            return paths
    return []


def _read_documents(folder: Path, paths: list[Path]) -> Evaluation:
    """Documents with other names: MMLU-Pro's answers, which are one evaluation in several files, or results."""
    if len(paths) == 1:
        return _read_file(paths[0])
    documents = {path: read_json(path) for path in paths}
    if all(mmlu_pro.has_rows(document) for document in documents.values()):
        return mmlu_pro.read_rows(folder, [row for document in documents.values() for row in document])
    for path, document in documents.items():
        if mmlu_pro.has_rows(document) or not any(known.recognises(document) for known in DOCUMENTS):
            raise InputError(
                f"{path} is neither a results file of {KNOWN}, nor are all files of {folder} answers of MMLU-Pro: give "
                "the results file itself"
            )
    return _merged(folder, paths, lambda path: _read_document(path, documents[path]))


def _read_document(path: Path, document: Any) -> Evaluation:
    for known in DOCUMENTS:
        if known.recognises(document):
            return known.read(path, document)
    raise InputError(f"{path} contains no results of a known format: give those of {KNOWN}, or a CSV")


# ---- several files


def _merged(folder: Path, paths: Iterable[Path], read: Callable[[Path], Evaluation]) -> Evaluation:
    """One evaluation of several files: every task from the newest file that has it.

    Raises InputError for files of several models. Where files do not name their model, those of different folders are
    of several models if they share a task.
    """
    parts = [(path, read(path)) for path in paths]
    _check_one_model(folder, parts)
    merged = Evaluation()
    taken: dict[str, list[tuple[str, Path, Task]]] = {}
    for path, part in parts:
        merged.warnings += [warning for warning in part.warnings if warning not in merged.warnings]
        for name, task in part.tasks.items():
            taken.setdefault(name, []).append((part.time, path, task))
    taken = dict(_told_apart(taken))
    older: dict[int, list[str]] = {}
    for name, candidates in taken.items():
        candidates.sort(key=lambda candidate: (candidate[0], candidate[1].name))
        merged.tasks[name] = candidates[-1][2]
        if len(candidates) > 1:
            if candidates[-1][0] == candidates[-2][0]:
                files = " and ".join(str(path) for _, path, _ in candidates[-2:])
                raise InputError(f"{files} have results of '{name}' of the same time: remove one of them")
            older.setdefault(len(candidates), []).append(name)
    for n, names in older.items():
        merged.warnings.append(f"{folder}: the newest of {n} results is taken of {listed(names)}")
    return merged


def _told_apart(taken: dict[str, list[tuple[str, Path, Task]]]) -> Iterable[tuple[str, list[tuple[str, Path, Task]]]]:
    """Under one name each; different tasks that are shown by one name get their own."""
    for name, candidates in taken.items():
        own = dict.fromkeys(task.own_name for _, _, task in candidates)
        if len(own) == 1:
            yield name, candidates
        else:
            for own_name in own:
                yield own_name or name, [entry for entry in candidates if entry[2].own_name == own_name]


def _check_one_model(folder: Path, parts: list[tuple[Path, Evaluation]]) -> None:
    models = dict.fromkeys(str(model) for _, part in parts for model in part.models)
    if len(models) > 1:
        raise InputError(f"{folder} contains results of several models ({listed(models)}): give the folder of one")
    folder_of: dict[str, Path] = {}
    for path, part in parts:
        for name, task in part.tasks.items():
            other = folder_of.setdefault(task.own_name or name, path.parent)
            if other != path.parent and not models:
                names = listed(sorted(str(place.relative_to(folder)) for place in (other, path.parent)))
                raise InputError(f"{folder} contains results of several models ({names}): give the folder of one")
