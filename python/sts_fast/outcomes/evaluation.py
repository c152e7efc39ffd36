"""The results of evaluating one model, regardless of their format, and functions that open their files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError

# The place in memory of a function, in the text that stands for it.
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# A whole number as text, such as a version.
WHOLE = re.compile(r"^(\d+)\.0+$")


@dataclass(frozen=True)
class Result:
    """Result of one metric in one task.

    metric:  its name, or 'name,extraction' where the answers are read from the model's text in a named way
    stderr:  standard error of value
    n:       number of questions
    correct: question -> its value, 1.0 or 0.0 for most metrics
    key:     question -> its right answer or a hash; prompt: question -> hash of the prompt as it was sent
    percent: True for numbers from 0 to 100, False for shares of 1; None where the format does not say
    higher_is_better: None where the format does not say
    """

    value: float
    metric: str
    stderr: float | None = None
    n: int | None = None
    correct: Mapping[str, float] = field(default_factory=dict)
    key: Mapping[str, str] = field(default_factory=dict)
    prompt: Mapping[str, str] = field(default_factory=dict)
    unparsed: float | None = None
    percent: bool | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that results name. adapter: of PEFT, or a delta of weights, on top of it."""

    name: str
    revision: str | None = None
    adapter: str | None = None

    def __str__(self) -> str:
        parts = [f"revision {self.revision}"] if self.revision else []
        parts += [f"with {self.adapter}"] if self.adapter else []
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


@dataclass(frozen=True)
class Task:
    """Results of one task.

    results:  by metric
    own_name: the name that the harness gives it, where another one is shown
    made:     how it was evaluated: setting -> value as text. Settings that the format does not tell are missing
    members:  own names of the tasks whose mean it is; empty for a task of its own
    """

    results: Mapping[str, Result]
    own_name: str | None = None
    made: Mapping[str, str] = field(default_factory=dict)
    model: EvaluatedModel | None = None
    members: tuple[str, ...] = ()


@dataclass
class Evaluation:
    """Results of evaluating one model, by task. time: when it was made, in a form that sorts; empty if not known."""

    tasks: dict[str, Task] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    time: str = ""

    @property
    def models(self) -> list[EvaluatedModel]:
        return list(dict.fromkeys(task.model for task in self.tasks.values() if task.model is not None))


def by_metric(results: Iterable[Result]) -> dict[str, Result]:
    return {result.metric: result for result in results}


def setting_text(value: Any) -> str:
    """A setting's value as text, the same for the same setting in every run."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(_whole(value), sort_keys=True, default=str)
    return ADDRESS.sub("", WHOLE.sub(r"\1", text))


def _whole(value: Any) -> Any:
    """With 1.0 as 1, and without keys that are null: versions of a harness write either."""
    if isinstance(value, dict):
        return {str(key): _whole(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"there is no file or folder {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from error


def read_json(path: Path) -> Any:
    return parse_json(path, read_text(path))


def parse_json(where: object, text: str | bytes) -> Any:
    try:
        return json.loads(text, parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not readable JSON: {error}") from error


def whole_number(text: str) -> int | float:
    """A JSON integer; infinity for one that no float can hold, and that no result has."""
    return int(text) if abs(float(text)) != math.inf else float(text)


def finite(value: Any) -> float | None:
    """A finite number, or None for 'N/A', NaN, text and the like."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: Any) -> int | None:
    """A number of questions; None where it is not a number."""
    number = finite(value)
    return None if number is None else int(number)
