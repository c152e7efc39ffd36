"""A table of domains: bars and numbers of the first estimator, and as many of the others as there is room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.measure import Measurement

from sts_fast.cli.console import Table, out
from sts_fast.files import Document
from sts_fast.forecast.estimators import Estimator
from sts_fast.statistics import Interval

BAR_WIDTH = 12
# Of bars that go both ways.
SIDE_WIDTH = 8
NAME_WIDTH = 32
# Of a table before it is cut to the terminal.
ANY_WIDTH = 10_000
UNITS = {"nats per token": "nats"}


@dataclass(frozen=True)
class Number:
    """A value, as text without its interval and with it; no interval: short is long."""

    value: float
    short: str
    long: str


@dataclass(frozen=True)
class Column:
    """heading: over the numbers; of_interval: what is added to it where they are shown with intervals."""

    heading: str
    of_interval: str
    numbers: Mapping[str, Number]

    @classmethod
    def of(
        cls, estimator: Estimator, scores: Mapping[str, tuple[float, Interval]], heading: str | None = None
    ) -> Column:
        """The scores of one estimator by domain; heading: its name, if not the estimator's."""
        unit = UNITS.get(estimator.unit, estimator.unit)
        heading = heading or (f"{estimator.label}\n{unit}" if unit else estimator.label)
        numbers = {}
        for name, (value, ci) in scores.items():
            text = estimator.text(value, ci)
            numbers[name] = Number(value, text.partition(" ")[0], text)
        return cls(heading, " [95%]", numbers)

    @classmethod
    def compared(cls, comparison: Document, estimator: Estimator, train: str, heading: str) -> Column:
        """The scores of one estimator for one training set of compare.json."""
        of_train = comparison["scores"][estimator.name][train]
        rows = zip(comparison["domains"], of_train["value"], of_train["ci"], strict=True)
        return cls.of(estimator, {name: (value, ci) for name, value, ci in rows if value is not None}, heading)


def print_domains(
    title: str,
    domains: Sequence[str],
    groups: Sequence[Sequence[Column]],
    *,
    bars: str | None = None,
    random: Mapping[str, float] | None = None,
    first: str = "domain",
) -> None:
    """Prints one table.

    domains: in the order of the rows
    groups:  columns that are shown or left out together, the first ones always
    bars:    of the first column: 'one' for sizes, 'both' for numbers with a sign; None without
    random:  by domain, the number of random features that stands beside the first column
    first:   heading of the names
    """

    def made(n_groups: int, n_long: int) -> Table:
        table = Table(title=title, title_justify="left")
        table.add_column(first, max_width=NAME_WIDTH, overflow="fold", vertical="bottom")
        if bars == "both":
            table.add_column("worse", width=SIDE_WIDTH, justify="right")
            table.add_column("better", width=SIDE_WIDTH)
        elif bars is not None:
            table.add_column("", width=BAR_WIDTH)
        shown = [(column, i < n_long, i == 0) for i, group in enumerate(groups[:n_groups]) for column in group]
        for column, is_long, is_first in shown:
            heading = f"{column.heading}{column.of_interval * is_long}"
            table.add_column(escape(heading), justify="right", no_wrap=True)
            if is_first and random is not None:
                table.add_column("random", justify="right", no_wrap=True)
        largest = max((abs(number.value) for number in groups[0][0].numbers.values()), default=0.0) or 1.0
        for name in domains:
            cells = [escape(name)]
            if bars is not None:
                found = groups[0][0].numbers.get(name)
                cells += _bars(bars, 0.0 if found is None else found.value / largest)
            for column, is_long, is_first in shown:
                number = column.numbers.get(name)
                cells.append("no answers" if number is None else escape(number.long if is_long else number.short))
                if is_first and random is not None:
                    cells.append(f"{random[name]:.3g}")
            table.add_row(*cells)
        return table

    n = len(groups)
    ways = [(n, n), *((k, 1) for k in range(n, 0, -1)), *((k, 0) for k in range(n, 0, -1))]
    n_groups, n_long = next((way for way in ways if _fits(made(*way))), ways[-1])
    out.print(made(n_groups, n_long))
    if n_groups < n:
        left_out = [column.heading.replace("\n", ", ") for group in groups[n_groups:] for column in group]
        out.print(
            f"For want of room not shown: {'; '.join(left_out)}. A wider terminal, the report and --json have them.",
            highlight=False, markup=False,
        )  # fmt: skip


def _bars(kind: str, share: float) -> list[str]:
    bar = "█" * round((BAR_WIDTH if kind == "one" else SIDE_WIDTH) * abs(share))
    if kind == "one":
        return [bar]
    return [bar, ""] if share < 0 else ["", bar]


def _fits(table: Table) -> bool:
    return Measurement.get(out, out.options.update(width=ANY_WIDTH), table).maximum <= out.width
