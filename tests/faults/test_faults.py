"""A command that is killed, or finds no room, leaves earlier results whole. `make faults` does it to all commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import Tiny

pytest.importorskip("fcntl")  # as where processes can be forked

from accidents import Place, torn
from commands import Command
from process import State

BEFORE = {"out/a": "1", "out/b": "1", "out/sub/c": "1"}
AFTER = {"out/a": "2", "out/b": "2", "out/sub/c": "2"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("faults.py", ("--only", "score", "--kills", 5, "--disks", 2, "--others", 1)),
        ("machines.py", ("--executor", "local", "--kills", 1, "--others", 0)),
    ],
)
def test_a_part_of_the_faults(tiny: Tiny, name: str, words: tuple[object, ...]) -> None:
    """Earlier results stay whole, and the same command goes on."""
    program = Path(__file__).with_name(name)
    words = ("--material", tiny.model.parent, *words)
    ran = subprocess.run(
        [sys.executable, program, *map(str, words)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(program.parents[1]), *sys.path])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith("\n0 faults\n")


@pytest.mark.parametrize(
    ("kind", "left", "is_torn"),
    [
        ("whole", BEFORE, False),
        ("whole", AFTER, False),
        ("whole", {**BEFORE, "out/a": "2"}, True),
        ("whole", {}, True),
        ("sets", {**BEFORE, "out/sub/c": "2"}, False),
        ("sets", {**BEFORE, "out/b": "2"}, True),
        ("parts", {**BEFORE, "out/b": "2"}, False),
        ("parts", {**BEFORE, "out/b": "3"}, True),
        ("parts", {"out/b": "2", "out/sub/c": "2"}, True),
        ("parts", {**BEFORE, "out/d": "1"}, True),
    ],
)
def test_results_that_are_torn_are_found(kind: str, left: State, is_torn: bool) -> None:
    place = Place(Command((), kind=kind), Path(), (), BEFORE, AFTER, 0, 0)
    assert bool(torn(place, left)) == is_torn
