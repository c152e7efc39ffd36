"""What makes two evaluations hard to compare: settings that differ, and models other than the forecast's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from sts_fast.errors import listed
from sts_fast.outcomes.evaluation import EvaluatedModel, Task

# Characters of a setting's value that a warning shows.
SHOWN = 48
SHOWN_DOMAINS = 5
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A folder of the hub's cache, models--ORG--NAME/snapshots/COMMIT.
CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[0-9a-f]+")
# Names of folders that many models have: the folder above tells which.
ANY_MODEL = re.compile(r"checkpoint-\d+|step-?\d+|epoch-?\d+|final|last|best|merged|model|output|hf")
COMMIT = re.compile(r"[0-9a-f]{7,40}")
NO_REVISION = (None, "", "main", "none", "None")


@dataclass(frozen=True)
class ForecastModel:
    """The model of a forecast, as scores.json names it. tuned: the model after training, where it was given."""

    name: str
    revision: str | None = None
    tuned: str | None = None

    @classmethod
    def of(cls, scores: Mapping[str, Any]) -> ForecastModel | None:
        """Of the content of scores.json; None where it names no model."""
        model, settings = scores.get("model"), scores.get("settings")
        if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
            return None
        tuned = settings.get("tuned") if isinstance(settings, Mapping) else None
        return cls(model["name"], model.get("revision"), tuned if isinstance(tuned, str) else None)


def made_differently(pairs: Iterable[tuple[str, Task, Task]]) -> list[str]:
    """A sentence with each setting that differs in any (domain, before, after), and both its values; or none.

    Only settings that both results tell are compared. Where the values are others in other domains, those of one are
    shown.
    """
    pairs = list(pairs)
    domains: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name, before, after in pairs:
        for setting, value in before.made.items():
            other = after.made.get(setting, value)
            if other != value:
                domains.setdefault(setting, {}).setdefault((value, other), []).append(name)
    parts = []
    for setting, values in domains.items():
        common = max(values, key=lambda of_both: len(values[of_both]))
        first, second = _shown(*common)
        names = values.pop(common)
        where = "" if len(names) == len(pairs) else f" in {listed(names, SHOWN_DOMAINS)}"
        others = [name for of_values in values.values() for name in of_values]
        where += f", and differs otherwise in {listed(others, SHOWN_DOMAINS)}" if others else ""
        parts.append(f"{setting} is {first} before and {second} after{where}")
    return [f"before and after were evaluated differently: {'; '.join(parts)}"] if parts else []


def _shown(first: str, second: str) -> tuple[str, str]:
    """Two texts that differ, cut to the place where they do."""
    if max(len(first), len(second)) <= SHOWN:
        return first or "empty", second or "empty"
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))
    start = max(0, same - SHOWN // 4)

    def cut(text: str) -> str:
        part = " ".join(text[start : start + SHOWN].split())
        return f"'{'…' if start else ''}{part}{'…' if len(text) > start + SHOWN else ''}'"

    return cut(first), cut(second)


def other_models(
    before: EvaluatedModel | None, after: EvaluatedModel | None, run: ForecastModel | None
) -> Iterator[str]:
    """A sentence for each evaluation of another model than the one that the forecast was made of."""
    if run is not None and before is not None and not _is_the_same(before, run):
        revision = "" if run.revision in NO_REVISION else f" (revision {run.revision})"
        swapped = after is not None and _is_the_same(after, run)
        hint = "; the one after training names it: are they swapped?" if swapped else ""
        yield f"the evaluation before training is of {before}, but the forecast is of {run.name}{revision}{hint}"
    tuned = None if run is None else run.tuned
    if tuned is not None and after is not None and not same_name(after.adapter or after.name, tuned):
        yield f"the evaluation after training is of {after}, but the forecast was made with --tuned {tuned}"
    if before is not None and before == after:
        yield f"the evaluations before and after training both name the model {before}"


def _is_the_same(model: EvaluatedModel, run: ForecastModel) -> bool:
    return model.adapter is None and same_name(model.name, run.name) and _same_revision(model.revision, run.revision)


def _same_revision(first: str | None, second: str | None) -> bool:
    """True where two revisions may be one: a commit, whole or cut, of any branch, or the same branch."""
    short, long = sorted(("" if revision in NO_REVISION else str(revision) for revision in (first, second)), key=len)
    if COMMIT.fullmatch(short) and COMMIT.fullmatch(long):
        return long.startswith(short)
    return short == long or any(COMMIT.fullmatch(text) for text in (short, long))


def same_name(first: str, second: str) -> bool:
    """True where two names may be of one model: a hub id, the same with __ for /, or a folder.

    Two hub ids are the same only as a whole. A folder is compared by its last part, or by more where many models have
    a folder of that name.
    """
    one, other = _parts(first), _parts(second)
    if one == other:
        return True
    if all(HUB_ID.fullmatch(_plain(name)) for name in (first, second)):
        return False
    n = 2 if ANY_MODEL.fullmatch(one[-1]) and min(len(one), len(other)) > 1 else 1
    return one[-n:] == other[-n:]


def _plain(name: str) -> str:
    name = name.strip().rstrip("/")
    if cached := CACHED.search(name):
        return f"{cached[1]}/{cached[2]}"
    return name.replace("__", "/") if "/" not in name else name


def _parts(name: str) -> list[str]:
    return [part for part in _plain(name).lower().replace("\\", "/").split("/") if part not in ("", ".")] or [""]
