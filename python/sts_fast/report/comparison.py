"""The page that compares several training sets, with links to their reports."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.estimators import BY_NAME, IN_ORDER, SIZES, Estimator
from sts_fast.forecast.run import COMPARISON_FILE, REPORT_FILE, VALIDATION_FILE, belongs
from sts_fast.outcomes.calibration.change_text import shown_change, shown_interval, unit_name
from sts_fast.report.numbers import (
    MIN_DOMAINS,
    MOST_NAMED,
    SAME,
    SIMILAR,
    correlation,
    counted,
    percent,
    signed_together,
    significant,
)
from sts_fast.report.outcome import measured, measured_r, scatter
from sts_fast.report.page import render
from sts_fast.report.signed import number_text
from sts_fast.statistics import defined, spearman

TEMPLATE = "comparison.html.j2"
N_SHADES = 3
# Training sets that the first sentence names.
MOST_IN_WORDS = 4


@dataclass(frozen=True)
class Cell:
    """A domain's forecast for one training set.

    shade: its colour, such as 'better2', by its size relative to the largest on its scale
    """

    value: float
    text: str
    interval: str
    shade: str


@dataclass(frozen=True)
class Grid:
    """One estimator: domains down, training sets across; a cell is None where a domain has no answers.

    shared_scale: whether the training sets have one scale, or each has its own colours
    """

    id: str
    title: str
    meaning: str
    signed: bool
    shared_scale: bool
    rows: list[tuple[str, list[Cell | None]]]
    level: str = "95%"


def build_comparison_report(folder: str | Path) -> Path:
    """Writes report.html beside the compare.json of several training sets, and returns its path.

    Raises InputError where compare.json cannot be read, or nothing can be written.
    """
    folder = Path(folder)
    path = folder / COMPARISON_FILE
    try:
        compared = json.loads(path.read_text(encoding="utf-8"))
        trains = [train["name"] for train in compared["trains"]]
        content = {
            "trains": [(name, f"{quote(name)}/{REPORT_FILE}") for name in trains],
            "domains": compared["domains"],
            "grids": [
                *_change_grids(compared, trains),
                *_score_grids(compared, trains),
            ],
            "shared": [
                (name, [percent(share) for share in row])
                for name, row in zip(trains, compared["shared_features"], strict=True)
            ],
            "sentence": f"{counted(len(trains), 'training set')} over {counted(len(compared['domains']), 'domain')}",
            "conclusions": _conclusions(compared, trains),
            "outcomes": _outcomes(folder, trains),
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not a readable {COMPARISON_FILE}: run sts-fast compare again") from error
    page = render(TEMPLATE, **content)
    with files.atomic_path(folder / REPORT_FILE) as written:
        written.write_text(page, encoding="utf-8", newline="\n")
    return folder / REPORT_FILE


def has_comparison(folder: Path) -> bool:
    """True for a folder with the page of several training sets."""
    return all((folder / name).is_file() for name in (COMPARISON_FILE, REPORT_FILE))


def conclusion(compared: Document) -> Markup:
    """What the terminal begins with: the page's conclusions in one line."""
    return Markup(" ").join(_conclusions(compared, [train["name"] for train in compared["trains"]]))


def _conclusions(compared: Document, trains: Sequence[str]) -> list[Markup]:
    """What the comparison says, by its first estimator, and by the first one without a sign."""
    first = next(name for name in IN_ORDER if name in compared["scores"])
    sentences = [_best_and_worst(compared["scores"][first], trains, BY_NAME[first])] if BY_NAME[first].unit else []
    of_own_scale = next((name for name in SIZES if name in compared["scores"]), None if sentences else first)
    if of_own_scale is not None:
        scores = compared["scores"][of_own_scale]
        sentences.append(_most_moved(scores, trains, compared["domains"], BY_NAME[of_own_scale]))
        sentences += _alike([scores[name]["value"] for name in trains])
    return sentences


def _best_and_worst(scores: Document, trains: Sequence[str], estimator: Estimator) -> Markup:
    """The training sets with the best and the worst forecasts in the mean; their scores have one unit."""
    columns = [scores[name]["value"] for name in trains]
    known = [i for i, values in enumerate(zip(*columns, strict=True)) if None not in values]
    if not known:
        return Markup("By {} no domain is forecast for every training set.").format(estimator.label)
    means = {name: sum(scores[name]["value"][i] for i in known) / len(known) for name in trains}

    def shown(name: str) -> Markup:
        bounds = [scores[name]["ci"][i] for i in known]
        return Markup("{} {} in the mean, {} better and {} worse with the whole interval").format(
            number_text(estimator.name, estimator.factor * means[name]), estimator.unit,
            sum(low > 0 for low, _ in bounds), sum(high < 0 for _, high in bounds),
        )  # fmt: skip

    ordered = sorted(trains, key=lambda name: -means[name])
    return Markup(
        "Over {}, <strong><bdi>{}</bdi></strong> has the best forecast by {} ({}), <strong><bdi>{}</bdi></strong> the "
        "worst ({})."
    ).format(
        counted(len(known), "domain"), ordered[0], estimator.label, shown(ordered[0]), ordered[-1], shown(ordered[-1])
    )


def _most_moved(scores: Document, trains: Sequence[str], domains: Sequence[str], estimator: Estimator) -> Markup:
    """The domain that each training set moves most, on its own scale."""
    most = {}
    for name in trains:
        sizes = [-1.0 if value is None else abs(value) for value in scores[name]["value"]]
        most[name] = domains[sizes.index(max(sizes))]
    if len(set(most.values())) == 1:
        return Markup("By {}, every training set would move <strong><bdi>{}</bdi></strong> most.").format(
            estimator.label, most[trains[0]]
        )
    parts = [
        Markup("<bdi>{}</bdi> would move <strong><bdi>{}</bdi></strong> most").format(name, most[name])
        for name in trains[:MOST_NAMED]
    ]
    if len(trains) > MOST_NAMED:
        parts.append(Markup("and so on"))
    return Markup("By {}, {}.").format(estimator.label, Markup(", ").join(parts))


def _alike(columns: Sequence[Sequence[float | None]]) -> list[Markup]:
    """Whether the training sets put the domains in the same order."""
    known = [values for values in zip(*columns, strict=True) if None not in values]
    if len(known) < MIN_DOMAINS:
        return []
    pairs = itertools.combinations(zip(*known, strict=True), 2)
    rhos = [rho for x, y in pairs if (rho := defined(spearman(x, y))) is not None]
    if not rhos:
        return []
    low, high = min(rhos), max(rhos)
    shown = f"Spearman {correlation(low)}" + (f" to {correlation(high)}" if len(rhos) > 1 else "")
    if low >= SAME:
        words = "All put the domains in nearly the same order ({}): it tells domains apart, and training sets little."
    elif high < SIMILAR:
        words = "Each puts the domains in an order of its own ({})."
    else:
        words = "Their orders of the domains are alike in part ({})."
    return [Markup(words).format(shown)]


def _outcomes(folder: Path, trains: Sequence[str]) -> list[tuple[str, str, Markup]]:
    """(training set, its r, forecast against measured change) of the runs that have been validated."""
    found = []
    for i, name in enumerate(trains):
        path = folder / name / VALIDATION_FILE
        validation = files.read_json(path) if path.is_file() else {}
        if not path.is_file() or not belongs(path.parent, validation):
            continue
        estimator = str(validation.get("estimator", ""))
        figure = scatter(f"outcome-{i}", estimator, measured(validation), small=f"{name}: measured change")
        if figure is not None:
            found.append((name, f"r = {correlation(measured_r(validation))}", figure))
    return found


def _change_grids(compared: Document, trains: list[str]) -> list[Grid]:
    """The grid of changes that a calibration forecasts; empty without a calibration."""
    changes = compared.get("changes")
    if changes is None:
        return []
    unit, signed = changes["unit"], changes["signed"]
    known = [abs(value) for name in trains for value in changes["trains"][name]["value"] if value is not None]
    largest = max(known, default=0.0) or 1.0
    rows = []
    for i, domain in enumerate(compared["domains"]):
        cells: list[Cell | None] = []
        for name in trains:
            value, interval = (changes["trains"][name][key][i] for key in ("value", "interval"))
            if value is None:
                cells.append(None)
                continue
            text = shown_change(value, unit, signed=signed).replace("-", "−")
            interval_text = shown_interval(interval, unit, signed=signed).replace("-", "−")
            shade = _shade(value, largest, "better" if value > 0 else "worse") if signed else _shade(value, largest)
            cells.append(Cell(value, text, interval_text, shade))
        rows.append((domain, cells))
    quantity = "change" if signed else "size of change"
    meaning = "learned from past trainings, and holds for trainings like them"
    title = f"Forecast {quantity}, in {unit_name(unit)}"
    return [Grid("changes", title, meaning, signed, True, rows, f"{changes['level']:.0%}")]


def _shade(value: float, largest: float, kind: str = "size") -> str:
    size = min(N_SHADES, int((N_SHADES + 1) * abs(value) / largest))
    return f"{kind}{size}" if size else ""


def _score_grids(compared: Document, trains: list[str]) -> list[Grid]:
    return [_grid(compared, trains, BY_NAME[name]) for name in IN_ORDER if name in compared["scores"]]


def _grid(compared: Document, trains: list[str], estimator: Estimator) -> Grid:
    """The grid of one estimator; signed scores have a colour for each direction, sizes have one colour."""
    scores, shared_scale = compared["scores"][estimator.name], bool(estimator.unit)
    sizes = {name: [abs(value) for value in scores[name]["value"] if value is not None] for name in trains}
    largest = {name: max(sizes[name], default=0.0) or 1.0 for name in trains}
    if shared_scale:
        largest = dict.fromkeys(trains, max(largest.values()))

    text: Callable[[float], str] = significant
    if estimator.unit == "points":
        text = functools.partial(number_text, estimator.name)
    elif estimator.signed:
        text = signed_together(largest.values(), digits=3)
    rows = []
    for i, domain in enumerate(compared["domains"]):
        cells: list[Cell | None] = []
        for name in trains:
            value, ci = scores[name]["value"][i], scores[name]["ci"][i]
            if value is None:
                cells.append(None)
                continue
            kind = "size" if not estimator.signed else "better" if value > 0 else "worse"
            shade = _shade(value, largest[name], kind)
            shown, low, high = (text(estimator.factor * number) for number in (value, *ci))
            cells.append(Cell(estimator.factor * value, shown, f"{low} to {high}", shade))
        rows.append((domain, cells))
    title = estimator.title if estimator.signed else estimator.axis
    return Grid(
        estimator.name, f"{estimator.label}: {title}", estimator.meaning, estimator.signed, shared_scale, rows
    )  # fmt: skip
