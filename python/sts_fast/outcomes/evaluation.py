"""The results of evaluating one model, regardless of their format, and functions that open their files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError

# Metrics that count as accuracy, best first; others are read only where they are named.
METRICS = ("accuracy", "acc", "exact_match", "pass@1", "acc_norm", "f1")


@dataclass(frozen=True)
class Task:
    """Results of one task. correct: question -> 1.0 or 0.0; key: question -> its right answer or a hash."""

    value: float
    metric: str
    stderr: float | None = None
    n: int | None = None
    correct: Mapping[str, float] = field(default_factory=dict)
    key: Mapping[str, str] = field(default_factory=dict)
    unparsed: float | None = None


@dataclass
class Evaluation:
    """Results of evaluating one model. metrics: task -> metric -> its result."""

    metrics: dict[str, dict[str, Task]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"there is no file or folder {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable JSON: {error}") from error


def finite(value: Any) -> float | None:
    """A finite number, or None for 'N/A', NaN, text and the like."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None
