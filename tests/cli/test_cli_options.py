"""Commands made from dataclasses of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from sts_fast.cli.options import Fixed, with_options
from sts_fast.data.options import Option
from sts_fast.errors import InputError


@dataclass(frozen=True)
class Shared:
    seed: Annotated[int, Option("Of the dice.", least=0)] = 3


@dataclass(frozen=True, kw_only=True)
class Meal(Shared):
    guests: Annotated[list[str], Option("Who comes; repeatable.", "--guest")]
    spices: Annotated[Sequence[Literal["salt", "pepper"]], Option("Comma-separated.")] = ("salt", "pepper")
    columns: Annotated[Mapping[str, str], Option("FIELD or SET=FIELD.", "--column")] = field(default_factory=dict)
    weights: Annotated[Mapping[str, float], Option("SET=NUMBER.", "--weight")] = field(default_factory=dict)
    limit: Annotated[int | None, Option("0 for all.", least=1)] = 8
    heat: Annotated[Literal["low", "high"] | None, Option("How hot.")] = None
    book: Annotated[str | Path | None, Option("A file.")] = None
    silent: Annotated[bool, Option("No talk.")] = False
    say: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Drink(Shared):
    n_glasses: Annotated[int, Option("How many.", "--glasses", least=1)] = 1


@dataclass(frozen=True)
class Table:
    meal: Meal
    drink: Drink
    place: str
    output: Path
    seats: int


Lay = Callable[..., Table]


@pytest.fixture
def lay() -> Lay:
    """Runs a command with some words, and returns what it got."""
    tables: list[Table] = []

    def command(
        place: Annotated[str, typer.Argument(help="Where.")],
        meal: Annotated[Meal, Fixed(silent=True)],
        drink: Drink,
        output: Annotated[Path, Option("A folder.")] = Path("here"),
        seats: Annotated[int, Option("Chairs.", least=2)] = 4,
    ) -> None:
        """Lay the table."""
        tables.append(Table(meal, drink, place, output, seats))

    app = typer.Typer(rich_markup_mode=None)
    app.command()(with_options(command))

    def run(*words: str) -> Any:
        ran = CliRunner().invoke(app, ["garden", "--guest", "ann", *words])
        if isinstance(ran.exception, InputError):
            raise ran.exception
        return tables[-1] if ran.exit_code == 0 and tables else ran

    return run


def test_fields_that_are_not_given_have_their_defaults(lay: Lay) -> None:
    expected = Meal(guests=["ann"], silent=True)
    assert lay() == Table(expected, Drink(), "garden", Path("here"), 4)


def test_what_was_typed_becomes_what_the_fields_hold(lay: Lay) -> None:
    words = "--guest bob --spices pepper --column text --column law=q --weight law=2 --heat high --book b.txt --seed 5"
    laid = lay(*words.split(), "--limit", "0", "--glasses", "2", "--output", "there", "--seats", "9")
    assert laid.meal == Meal(
        seed=5, guests=["ann", "bob"], spices=("pepper",), columns={"": "text", "law": "q"}, weights={"law": 2.0},
        limit=None, heat="high", book=Path("b.txt"), silent=True,
    )  # fmt: skip
    assert (laid.drink, laid.output, laid.seats) == (Drink(seed=5, n_glasses=2), Path("there"), 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--column", "law="], "--column takes FIELD or SET=FIELD, not 'law='"),
        (["--column", "=q"], "--column takes FIELD or SET=FIELD, not '=q'"),
        (["--weight", "2"], "--weight takes SET=NUMBER, not '2'"),
        (["--weight", "law=much"], "--weight takes SET=NUMBER, not 'law=much'"),
        (["--weight", "law=1", "--weight", "law=2"], "--weight is given twice for 'law': give it once"),
        (["--limit", "-1"], "--limit must be at least 1, or 0 for all, not -1"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--glasses", "0"], "--glasses must be at least 1, not 0"),
        (["--seats", "1"], "--seats must be at least 2, not 1"),
        (["--spices", "salt,sand"], "--spices must be among salt, pepper, not 'sand'"),
    ],
)
def test_what_cannot_be_used_is_refused(lay: Lay, words: list[str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        lay(*words)
    assert str(refused.value) == message


@pytest.mark.parametrize("words", [["--silent"], ["--say", "x"], ["--heat", "warm"], ["--seats", "some"]])
def test_what_is_not_offered_is_no_option(lay: Lay, words: list[str]) -> None:
    assert lay(*words).exit_code == 2


def test_help_names_every_option_once(lay: Lay) -> None:
    shown = lay("--help").output
    for word in ("--guest", "--spices", "--column", "--weight", "--limit", "--heat", "--book", "--seed", "--glasses"):
        assert shown.count(f"{word} ") == 1
    assert "Of the dice." in shown
    assert "[default: salt,pepper]" in " ".join(shown.split())
    assert "<low|high>" in shown
