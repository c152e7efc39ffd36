"""Plots as inline SVG that keeps its type size at any width: places are percentages of the drawing area.

Every function returns one <svg> with a title and a description; colours come from the page's style sheet. Parts with a
fixed width (labels that must not collide, names that must be cut) are drawn twice, for a wide and for a narrow page,
and the style sheet shows one of them. Rows are one em high, which the style sheet makes more on a narrow page, where
names stand above their dots and not beside them.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from sts_fast.statistics import Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Widths, in pixels, of the drawing area on a wide page and on a phone, at which labels are placed.
WIDTHS = {"wide": 560, "narrow": 290}
# Room for a row's name beside its dot, for a long one, for name and value above it, for the value beside it; see the
# style sheet.
NAME_WIDTH, LONG_WIDTH, LINE_WIDTH, TEXT_WIDTH = 165, 265, 350, 170
CHARACTER = 6.7
LINE = 15
HEIGHT, SMALL_HEIGHT = 320, 180
MOST_POINTS_ON_LINE = 240


@dataclass(frozen=True)
class Dot:
    """One row: a value and its interval; `text` is at the right.

    control: marked on the same axis, where it lies on it
    kind:    'other' is hollow, 'worse' has the colour of losses; both may be joined
    """

    name: str
    value: float
    interval: Interval | None
    text: str
    control: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Point:
    """One point of a scatter with its intervals; a falling one is drawn hollow."""

    name: str
    x: float
    y: float
    x_interval: Interval | None = None
    y_interval: Interval | None = None
    falling: bool = False


@dataclass(frozen=True)
class Scale:
    """A linear axis that ends on round numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float], *, most_ticks: int = 6) -> Scale:
        known = list(values) or [0.0]
        low, high = min(known), max(known)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = abs(high) / 2 or 1.0
            low, high = low - room, high + room
        step = 10.0 ** math.floor(math.log10((high - low) / most_ticks))
        step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most_ticks - 1)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    @classmethod
    def with_intervals(
        cls, values: Iterable[float], intervals: Iterable[Interval | None], *, most_ticks: int = 6
    ) -> Scale:
        """Over all values and, as far as they do not squash these, their intervals.

        The axis goes beyond the values by no more than these take up, or than a usual interval does.
        """
        known, bounds = list(values) or [0.0], [interval for interval in intervals if interval is not None]
        low, high = min(known), max(known)
        widths = sorted(end - start for start, end in bounds) or [0.0]
        room = max(high - low, min(widths[(len(widths) - 1) // 2], max(abs(low), abs(high))))
        ends = [min(max(end, low - room), high + room) for interval in bounds for end in interval]
        return cls.over([*known, *ends], most_ticks=most_ticks)

    @classmethod
    def of_dots(cls, rows: Sequence[Dot], *, most_ticks: int = 6) -> Scale:
        """Over the values of rows and their intervals, and their controls as far as these leave room for the values."""
        values = [row.value for row in rows]
        scale = cls.with_intervals(values, [row.interval for row in rows], most_ticks=most_ticks)
        room = (max(values) - min(values)) / 2
        controls = [row.control for row in rows if row.control is not None]
        near = [control for control in controls if min(values) - room <= control <= max(values) + room]
        return cls.over([scale.low, scale.high, *near], most_ticks=most_ticks) if near else scale

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high

    def at(self, value: float) -> float:
        """Percent of the axis, from its low end; a value beyond the axis is at its end."""
        return min(max(100 * (value - self.low) / (self.high - self.low), 0.0), 100.0)


def dots(
    name: str,
    rows: Sequence[Dot],
    scale: Scale,
    marks: Sequence[tuple[str, float]] = (),
    *,
    axis: tuple[str, str, str],
    title: str,
    description: str,
) -> Markup:
    """One dot per row, with a whisker for its interval and a mark for its control.

    marks: lines over all rows, as (class, value)
    axis:  words under the axis: at its left end, in the middle, at its right end
    """
    width = NAME_WIDTH if all(_width(row.name) <= NAME_WIDTH for row in rows) else LONG_WIDTH
    parts = [_grid(scale)]
    for kind, value in marks:
        x = _pc(scale.at(value))
        parts.append(_tag("line", x1=x, x2=x, y1=0, y2="100%", class_=f"mark {kind}"))
    for i, row in enumerate(rows):
        drawn = [_whisker(scale, row.interval)]
        if row.control is not None and scale.contains(row.control):
            x = _pc(scale.at(row.control))
            drawn.append(_tag("line", x1=x, x2=x, y1=-7, y2=7, class_="control"))
        drawn.append(_tag("circle", cx=_pc(scale.at(row.value)), cy=0, r=5, class_=f"dot {row.kind}".rstrip()))
        beside = shortened(row.name, width)
        above = shortened(row.name, LINE_WIDTH - _width(row.text) - 2 * CHARACTER)
        texts = [
            _tag("text", beside, x=0, dx=-14, dy=4, class_="end wide"),
            _tag("text", shortened(row.text, TEXT_WIDTH), x="100%", dx=14, dy=4, class_="wide"),
            _tag("text", above, x=0, dy=-5, class_="narrow"),
            _tag("text", row.text, x="100%", dy=-5, class_="end narrow"),
        ]
        parts.append(_tag("svg", _tag("g", *drawn, class_="row"), *texts, y=f"{i + 0.5}em"))
    under = zip(("0%", "50%", "100%"), axis, ("axis", "axis middle", "axis end"), strict=True)
    words = [_tag("text", text, x=x, y=54 if x == "50%" else 38, class_=anchor) for x, text, anchor in under if text]
    parts.append(_tag("svg", *words, y="100%"))
    return _svg(
        name, f"{len(rows)}em", title, description, parts, class_="rows" if width == NAME_WIDTH else "rows long"
    )


def scatter(
    name: str,
    points: Sequence[Point],
    *,
    x_label: str,
    y_label: str,
    title: str,
    description: str,
    height: int = HEIGHT,
    labelled: bool = True,
) -> Markup:
    """Points with whiskers both ways, named where a name fits if they are `labelled`."""
    ticks = 6 if labelled else 4
    x_scale = Scale.with_intervals([p.x for p in points], [p.x_interval for p in points], most_ticks=ticks)
    y_scale = Scale.with_intervals([p.y for p in points], [p.y_interval for p in points], most_ticks=ticks)
    placed = [(x_scale.at(point.x), 100 - y_scale.at(point.y)) for point in points]
    parts = [_grid(x_scale), _rules(y_scale), _axis_names(x_label, y_label)]
    for point, (x, y) in zip(points, placed, strict=True):
        if point.x_interval is not None:
            low, high = (_pc(x_scale.at(bound)) for bound in point.x_interval)
            parts.append(_tag("line", x1=low, x2=high, y1=_pc(y), y2=_pc(y), class_="spread"))
            parts += [_arrow(x_scale, end, "spread", y=_pc(y)) for end in _cut(x_scale, point.x_interval)]
        if point.y_interval is not None:
            low, high = (_pc(100 - y_scale.at(bound)) for bound in point.y_interval)
            parts.append(_tag("line", x1=_pc(x), x2=_pc(x), y1=low, y2=high, class_="spread"))
            parts += [_arrow(y_scale, end, "spread", x=_pc(x)) for end in _cut(y_scale, point.y_interval)]
    for point, (x, y) in zip(points, placed, strict=True):
        kind = "dot falling" if point.falling else "dot"
        r = 4.5 if labelled else 3
        parts.append(_tag("circle", _tag("title", point.name), cx=_pc(x), cy=_pc(y), r=r, class_=kind))
    for page, width in WIDTHS.items() if labelled else ():
        labels = _place_labels([point.name for point in points], placed, width - 60, height)
        parts.append(_tag("g", *labels, class_=page))
    return _svg(name, height, title, description, parts, class_="plot")


def curve(
    name: str,
    shares: NDArray[np.float64],
    marked: int,
    *,
    x_label: str,
    y_label: str,
    title: str,
    description: str,
) -> Markup:
    """Cumulative `shares` (0 to 1) over rank 1, 2, ... on a logarithmic axis; rank `marked` has a cross of lines."""
    last = len(shares)
    decades = math.log10(last) if last > 1 else 1.0

    def at(rank: float) -> float:
        return 100 * math.log10(rank) / decades

    ranks = sorted({round(last ** (i / MOST_POINTS_ON_LINE)) for i in range(MOST_POINTS_ON_LINE + 1)} | {marked})
    line = " ".join(f"{10 * at(rank):.1f},{1000 * (1 - float(shares[rank - 1])):.1f}" for rank in ranks)
    parts = []
    for power in range(int(decades + 1e-9) + 1):
        x = _pc(at(10**power))
        parts.append(_tag("line", x1=x, x2=x, y1=0, y2="100%", class_="grid"))
        parts.append(_tag("text", f"{10**power:,}", x=x, y="100%", dy=18, class_="tick middle"))
    if at(last) - at(10**power) > 12:
        parts.append(_tag("text", f"{last:,}", x="100%", y="100%", dy=18, class_="tick middle"))
    share = float(shares[marked - 1])
    x, y = _pc(at(marked)), _pc(100 * (1 - share))
    # The curve rises, so there is room above at the left of the mark, and below at its right.
    right = at(marked) < 30 or (share > 0.93 and at(marked) < 70)
    note = _tag(
        "text", f"top {marked:,}: {share:.0%}", x=x, y=y, dx=10 if right else -10, dy=20 if right else -10,
        class_="note" if right else "note end",
    )  # fmt: skip
    parts += [
        _rules(Scale(0, 100, (0, 20, 40, 60, 80, 100)), "%"),
        _axis_names(x_label, y_label),
        _tag("line", x1=x, x2=x, y1=y, y2="100%", class_="mark here"),
        _tag("line", x1="0%", x2=x, y1=y, y2=y, class_="mark here"),
        _line(line),
        _tag("circle", cx=x, cy=y, r=4.5, class_="dot"),
        note,
    ]  # fmt: skip
    return _svg(name, HEIGHT, title, description, parts, class_="plot")


def lines(
    name: str,
    steps: Sequence[int],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    description: str,
) -> Markup:
    """One line per name over `steps`, each with its name at its end where that fits."""
    across = Scale.over([0.0, *map(float, steps)])
    up = Scale.over([0.0, *(value for values in series.values() for value in values)])
    parts = [_grid(across), _rules(up), _axis_names(x_label, y_label)]
    ends = []
    for values in series.values():
        placed = [(across.at(step), 100 - up.at(value)) for step, value in zip(steps, values, strict=True)]
        parts.append(_line(" ".join(f"{10 * x:.1f},{10 * y:.1f}" for x, y in placed)))
        x, y = placed[-1]
        ends.append((x, y))
        parts.append(_tag("circle", cx=_pc(x), cy=_pc(y), r=4.5, class_="dot"))
    for page, width in WIDTHS.items():
        parts.append(_tag("g", *_place_labels(list(series), ends, width - 60, HEIGHT), class_=page))
    return _svg(name, HEIGHT, title, description, parts, class_="plot")


def shortened(text: str, width: float) -> str:
    """`text` cut to about `width` pixels, with an ellipsis where it was cut."""
    if _width(text) <= width:
        return text
    kept = ""
    for character in text:
        if _width(kept + character) > width - 2 * CHARACTER:
            break
        kept += character
    return kept.rstrip() + "…"


def tick_label(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _svg(
    name: str, height: int | str, title: str, description: str, parts: Sequence[Markup], *, class_: str
) -> Markup:  # fmt: skip
    heading = [_tag("title", title, id=f"{name}-title"), _tag("desc", description, id=f"{name}-desc")]
    return _tag(
        "svg", *heading, *parts,
        class_=class_, role="img", height=height, aria_labelledby=f"{name}-title {name}-desc",
    )  # fmt: skip


def _line(points: str) -> Markup:
    """A line through points "x,y" of a square of 1000, stretched over the drawing area."""
    return _tag(
        "svg", _tag("polyline", points=points, class_="line"),
        viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%",
    )  # fmt: skip


def _tag(tag: str, *content: str | Markup, **attributes: str | float) -> Markup:
    """One element; text and attributes are escaped. class_ is class, aria_x is aria-x."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("aria_", "aria-"), value) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), written, Markup("").join(content))


def _pc(percent: float) -> str:
    return f"{percent:.2f}%"


def _grid(scale: Scale) -> Markup:
    """Vertical lines at the ticks, their numbers under them, and a stronger line at zero."""
    parts, under = [], []
    for tick in scale.ticks:
        x = _pc(scale.at(tick))
        parts.append(_tag("line", x1=x, x2=x, y1=0, y2="100%", class_="grid zero" if tick == 0 else "grid"))
        under.append(_tag("text", tick_label(tick), x=x, y=18, class_="tick middle"))
    return Markup("").join([*parts, _tag("svg", *under, y="100%")])


def _rules(scale: Scale, unit: str = "") -> Markup:
    """Horizontal lines at the ticks of a plot, their numbers at the left."""
    parts = []
    for tick in scale.ticks:
        y = _pc(100 - scale.at(tick))
        parts.append(_tag("line", x1="0%", x2="100%", y1=y, y2=y, class_="grid zero" if tick == 0 else "grid"))
        parts.append(_tag("text", tick_label(tick) + unit, x=-8, y=y, dy=4, class_="tick end"))
    return Markup("").join(parts)


def _axis_names(x_label: str, y_label: str) -> Markup:
    return _tag("text", x_label, x="100%", y="100%", dy=38, class_="axis end") + _tag(
        "text", y_label, x=-44, y=-14, class_="axis"
    )


def _whisker(scale: Scale, interval: Interval | None) -> Markup:
    if interval is None:
        return Markup("")
    low, high = (_pc(scale.at(bound)) for bound in interval)
    parts = [_tag("line", x1=low, x2=high, y1=0, y2=0, class_="whisker")]
    for end in interval:
        x = _pc(scale.at(end))
        if scale.contains(end):
            parts.append(_tag("line", x1=x, x2=x, y1=-4, y2=4, class_="whisker"))
        else:
            parts.append(_arrow(scale, end, "whisker", y="0"))
    return Markup("").join(parts)


def _cut(scale: Scale, interval: Interval) -> list[float]:
    """The ends of an interval that are beyond the axis."""
    return [end for end in interval if not scale.contains(end)]


def _arrow(scale: Scale, end: float, class_: str, *, x: str | None = None, y: str | None = None) -> Markup:
    """Where an interval leaves the axis: across at the height y, or upright at the place x."""
    across = x is None
    place = {"x": _pc(scale.at(end)), "y": y} if across else {"x": x, "y": _pc(100 - scale.at(end))}
    # It points to the right, and is turned where the interval goes on to the left, up or down.
    turn = (0 if end > scale.high else 180) if across else (-90 if end > scale.high else 90)
    head = _tag("path", d="M-7 -5L0 0L-7 5", transform=f"rotate({turn})", fill="none", class_=class_)
    return _tag("svg", head, **{key: str(value) for key, value in place.items()})


def _place_labels(
    names: Sequence[str], points: Sequence[tuple[float, float]], width: float, height: float
) -> list[Markup]:  # fmt: skip
    """Names beside their points, leaving out those that would cover another name or point.

    points: (percent across, percent down)
    """
    centres = [(width * x / 100, height * y / 100) for x, y in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    labels = []
    for name, (across, down), (x, y) in zip(names, points, centres, strict=True):
        text = shortened(name, 130)
        long = _width(text)
        for dx, dy, anchor, left in (
            (7, -7, "", x + 7), (-7, -7, " end", x - 7 - long), (7, 16, "", x + 7), (-7, 16, " end", x - 7 - long),
            (10, 4, "", x + 10), (-10, 4, " end", x - 10 - long),
            (0, -10, " middle", x - long / 2), (0, 20, " middle", x - long / 2),
        ):  # fmt: skip
            box = (left, y + dy - LINE + 4, left + long, y + dy + 3)
            inside = box[0] >= 0 and box[2] <= width and box[1] >= -8 and box[3] <= height
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                labels.append(_tag("text", text, x=_pc(across), y=_pc(down), dx=dx, dy=dy, class_=f"label{anchor}"))
                break
    return labels


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _width(text: str) -> float:
    """Approximate width of a text in pixels."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return CHARACTER * (len(text) + wide)
