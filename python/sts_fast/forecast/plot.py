"""A forecast as a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sts_fast.errors import InputError, listed
from sts_fast.forecast.estimators import BY_NAME, IN_ORDER, Estimator
from sts_fast.statistics import Z_95, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points of more domains have no names beside them.
MOST_NAMED = 40
WIDTH, HEIGHT, HEIGHT_OF_ROW, HEIGHT_BESIDE = 6.4, 4.8, 0.3, 1.2  # inches
COLOUR, FAINT = "C0", "0.6"


class Change(Protocol):
    """The measured change of one domain, as an Outcome has it."""

    @property
    def change(self) -> float: ...
    @property
    def stderr(self) -> float | None: ...


class Changes(Protocol):
    """Measured changes by domain, as read_outcomes gives them."""

    @property
    def domains(self) -> Mapping[str, Change]: ...


@dataclass(frozen=True)
class Plotted:
    """One domain: its value, interval, and the score of random features, None where there is none; in points."""

    name: str
    value: float
    interval: Interval
    random: float | None


def plot(
    scores: Mapping[str, Sequence[Plotted]],
    estimator: str | None,
    outcome: Mapping[str, float] | Changes | None,
    ax: Axes | None,
) -> Axes:
    """Draws a forecast; see Forecast.plot.

    scores: by estimator, each domain that it scores, in the units of Estimator.text
    """
    known = [name for name in IN_ORDER if scores.get(name)]
    if not known:
        raise InputError("the forecast has no scores to plot: it was made without domains")
    if estimator is not None and estimator not in known:
        raise InputError(f"the forecast has no '{estimator}' to plot: it has {', '.join(known)}")
    of = BY_NAME[estimator or known[0]]
    rows = sorted(scores[of.name], key=lambda row: row.value)
    changes = None if outcome is None else _changes(outcome, [row.name for row in rows])
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError("a plot needs matplotlib: pip install 'sts-fast[plot]'") from error
    size = (WIDTH, HEIGHT if changes else HEIGHT_OF_ROW * len(rows) + HEIGHT_BESIDE)
    ax = ax or plt.subplots(figsize=size, layout="constrained")[1]
    if changes is None:
        _dots(of, rows, ax)
    else:
        _scatter(of, rows, changes, ax)
    return ax


def _changes(outcome: Mapping[str, float] | Changes, names: Sequence[str]) -> dict[str, tuple[float, float | None]]:
    """By domain that has both, the change and its standard error."""
    if isinstance(outcome, Mapping):
        changes: dict[str, tuple[float, float | None]] = {name: (change, None) for name, change in outcome.items()}
    else:
        changes = {name: (of.change, of.stderr) for name, of in outcome.domains.items()}
    found = {name: changes[name] for name in names if name in changes}
    if not found:
        raise InputError(f"no outcome is of a domain of the forecast: name them as {listed(names)}")
    return found


def _dots(of: Estimator, rows: Sequence[Plotted], ax: Axes) -> None:
    for at, row in enumerate(rows):
        ax.plot(row.interval, [at, at], color=COLOUR, linewidth=1.5)
        ax.plot(row.value, at, "o", color=COLOUR)
        if row.random is not None:
            ax.plot(row.random, at, "|", color=FAINT, markersize=10)
    if of.signed:
        ax.axvline(0, color=FAINT, linewidth=0.8)
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel(f"{of.label}: {of.title}, 95% intervals")


def _scatter(
    of: Estimator, rows: Sequence[Plotted], changes: Mapping[str, tuple[float, float | None]], ax: Axes
) -> None:
    for row in (row for row in rows if row.name in changes):
        change, stderr = changes[row.name]
        y = change if of.signed else abs(change)
        ax.plot(row.interval, [y, y], color=FAINT, linewidth=1)
        if stderr is not None:
            ax.plot([row.value, row.value], [y - Z_95 * stderr, y + Z_95 * stderr], color=FAINT, linewidth=1)
        ax.plot(row.value, y, "o", color=COLOUR)
        if len(changes) <= MOST_NAMED:
            ax.annotate(row.name, (row.value, y), xytext=(4, 4), textcoords="offset points", fontsize="small")
    if of.signed:
        ax.axhline(0, color=FAINT, linewidth=0.8)
        ax.axvline(0, color=FAINT, linewidth=0.8)
    ax.set_xlabel(f"forecast, {of.label}: {of.title}")
    ax.set_ylabel("measured change" if of.signed else "size of the measured change")
