"""Damaged files of every kind that is read: read, or refused in one sentence. `make fuzz` damages many more."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
import pytest


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_read_or_refused_in_one_sentence(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "FOUND", tmp_path)
    assert fuzz.fuzz(60, seed=part) == []


@pytest.mark.parametrize("name", fuzz.kinds())
def test_material_that_is_not_damaged_is_read(name: str, tmp_path: Path) -> None:
    kind = fuzz.kinds()[name]
    kind.read(kind.make(tmp_path))


def test_what_is_wrong_is_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> None:
        if not path.read_bytes():
            raise ZeroDivisionError("empty")

    monkeypatch.setattr(fuzz, "FOUND", tmp_path)
    monkeypatch.setattr(fuzz, "kinds", lambda: {"csv": fuzz.Kind(fuzz._csv, read)})
    found = fuzz.fuzz(60, seed=0)
    assert found
    assert all("ZeroDivisionError at test_fuzz.py" in line for line in found)
    assert all((kept / "rows.csv").read_bytes() == b"" for kept in tmp_path.iterdir())
    assert all("ZeroDivisionError" in (kept / "traceback.txt").read_text() for kept in tmp_path.iterdir())


def test_a_value_of_json_becomes_another() -> None:
    rng = random.Random(0)
    changed = {fuzz._changed_json(rng, b'{"a": [1, {"b": 2}]}') for _ in range(200)}
    assert len(changed) > 30
    assert all(text.startswith(b"{") for text in changed)
