"""The worlds that forecasts are tried in, and the sets trained on in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.demo import demo, organism
from sts_fast.demo.organism.world import N_SYMBOLS, World

if TYPE_CHECKING:
    from sts_fast.demo.organism.world import Ints, Skill


@dataclass(frozen=True)
class Ground:
    """A world, and the domains of it that are trained on; all the others are targets."""

    world: World
    trains: tuple[str, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.world.domains)


# Chosen before any outcome of this study: the demo's eight, and one more of each frequent kind of skill.
SHORT = Ground(
    organism.WORLD,
    (
        *demo.TRAINS,
        "T4.rotate.b",
        "T6.sort.a",
        "T0.copy.c",
        "T9.copy.d",
    ),
)


def both(first: Ints, second: Ints) -> Ints:
    return np.concatenate([first, second], axis=1)


def woven(first: Ints, second: Ints) -> Ints:
    return np.stack([first, second], axis=2).reshape(len(first), -1)


# Of four symbols, a b c d, to eight.
LONG_SKILLS: dict[str, Skill] = {
    "double": lambda x: woven(x, x),  # a a b b c c d d
    "twice": lambda x: both(x, x),
    "mirror": lambda x: both(x, x[:, ::-1]),
    "back-twice": lambda x: both(x[:, ::-1], x[:, ::-1]),
    "climb": lambda x: woven(x, (x + 1) % N_SYMBOLS),
    "fall": lambda x: woven(x, (x - 1) % N_SYMBOLS),
    "then-next": lambda x: both(x, (x + 1) % N_SYMBOLS),
    "turn": lambda x: both(np.roll(x, -1, axis=1), np.roll(x, -2, axis=1)),
    "weave": lambda x: both(x[:, [0, 3, 1, 2]], x[:, ::-1]),
    "sort-both": lambda x: both(np.sort(x, axis=1), np.sort(x, axis=1)[:, ::-1]),
    "transcribe": lambda x: both(x, x),
}

# Other skills, answers of eight tokens; its training sets were chosen by name, before any model of it was trained.
LONG = Ground(
    World(
        LONG_SKILLS,
        (
            ("double", "twice"),
            ("mirror", "double"),
            ("climb", "fall"),
            ("twice", "then-next"),
            ("turn", "weave"),
            ("sort-both",),
            ("back-twice", "mirror"),
            ("then-next", "fall"),
            ("weave",),
            ("transcribe", "twice"),
        ),
        n_shown=4,
        n_answer=8,
    ),
    (
        "T0.twice.a",
        "T1.double.b",
        "T2.fall.a",
        "T3.then-next.c",
        "T4.weave.a",
        "T5.sort-both.d",
        "T6.mirror.b",
        "T7.then-next.a",
        "T8.weave.b",
        "T9.transcribe.b",
        "T2.climb.c",
        "T9.twice.d",
    ),
)
