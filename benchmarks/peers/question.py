"""A question that sts_fast and other packages answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from benchmarks.cases import Contestant

# Contestant, up to a comma in its name: the distribution that it is.
PACKAGES = {
    "sts_fast": "sts-fast",
    "SAELens": "sae-lens",
    "sparsify": "eai-sparsify",
    "delphi": "eai-delphi",
    "bergson": "bergson",
    "dattri": "dattri",
}


@dataclass(frozen=True)
class Question:
    """One question, and who answers it, ours first.

    asked:    the question and its sizes, in words
    inputs:   what every contestant is given; warm_up: fewer of these, for a run before
    check:    (contestant's name, result, inputs) -> largest relative error; raises oracle.WrongResult
    r:        of a result, its correlation with what really happened, where that is known
    lacking:  peers that cannot answer it, and why
    """

    asked: str
    inputs: tuple[Any, ...]
    warm_up: tuple[Any, ...]
    contestants: list[Contestant]
    check: Callable[[str, Any, tuple[Any, ...]], float]
    r: Callable[[Any], float] | None = None
    lacking: dict[str, str] = field(default_factory=dict)


def package(contestant: str) -> str:
    return PACKAGES[contestant.split(",")[0]]


def release(contestant: str) -> str:
    """Version of the contestant's package. Raises PackageNotFoundError, an ImportError, where it is not installed."""
    return version(package(contestant))


def peer(name: str, make: Callable[[], Callable[..., Any]]) -> Contestant:
    """A contestant that imports its package only when it is prepared: make() returns what is then run."""
    made = Made(make)
    return Contestant(name, made, made.prepare)


class Made:
    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self.make = make

    def prepare(self) -> None:
        self.run = self.make()

    def __call__(self, *inputs: Any, lap: Callable[[str], None]) -> Any:
        return self.run(*inputs, lap=lap)
