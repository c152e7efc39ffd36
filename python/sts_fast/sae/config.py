"""A checkpoint's JSON, read strictly: a value of the wrong type is an error that names file and key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError

MOST_BYTES = 16 << 20


class Config:
    """The JSON object of one file, and the file's name for messages.

    Getters return the default where a key is missing or null. They raise InputError, naming file and key, where its
    value is of another type.
    """

    def __init__(self, where: str | Path, values: dict[str, Any]) -> None:
        self.where = str(where)
        self.values = values

    @classmethod
    def read(cls, path: Path) -> Config:
        if not path.is_file():
            raise InputError(f"{path.parent} has no {path.name}: copy or download the SAE's whole folder")
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, too many for an SAE's config: it was not read")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is not readable JSON ({error}): copy or download it again") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} does not hold a JSON object: copy or download it again")
        return cls(path, values)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def text(self, key: str, default: str = "") -> str:
        return str(self._checked(key, default, "a text", lambda value: isinstance(value, str)))

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self._checked(key, default, "true or false", lambda value: isinstance(value, bool)))

    def whole(self, key: str) -> int | None:
        """A whole number; None where it is missing."""
        value = self._checked(key, None, "a whole number", lambda n: isinstance(n, int) and not isinstance(n, bool))
        return None if value is None else int(value)

    def number(self, key: str) -> float | None:
        """A finite number; None where it is missing."""
        value = self._checked(key, None, "a finite number", _is_finite)
        return None if value is None else float(value)

    def part(self, key: str) -> Config:
        """The object under the key, empty where there is none."""
        value = self._checked(key, {}, "a JSON object", lambda value: isinstance(value, dict))
        return Config(f"{self.where}, {key}", dict(value))

    def k(self, d_sae: int, key: str = "k") -> int:
        """Number of features that a row keeps, 1 to d_sae; raises InputError where it is missing."""
        value = self.values.get(key)
        if not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= d_sae):
            raise InputError(
                f"{self.where}: {key} must be a whole number between 1 and d_sae = {d_sae}, but is {_short(value)}"
            )
        return value

    def check_widths(self, **widths: int) -> None:
        """Raises InputError where a key states a width that differs from the weights'."""
        for key, width in widths.items():
            stated = self.whole(key)
            if stated is not None and stated != width:
                raise InputError(f"{self.where} says {key} = {_short(stated)}, but the weights have {width}")

    def _checked(self, key: str, default: Any, kind: str, is_valid: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not is_valid(value):
            raise InputError(f"{self.where}: {key} must be {kind}, but is {_short(value)}")
        return value


def _is_finite(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
