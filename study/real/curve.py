"""What a forecast costs and how well it agrees with the outcomes, drawn: `results/cost.svg`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import log10

import numpy as np

from study.real import runs
from study.real.agreement import Agreement, costs
from study.real.changes import Doubles, Training

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 230, 30, 50
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LOWEST, HIGHEST = -0.6, 1.0


@dataclass(frozen=True)
class Point:
    """A number of a forecast: its share of the cost of training and evaluating, and r of each training."""

    label: str
    cost: float
    r: Doubles


def draw(found: Sequence[Agreement], some: Sequence[Training], part: str, ceiling: float) -> None:
    """Writes the picture; found: agreement of the numbers to show with the outcomes of `some` trainings of a part."""
    of_forecast = costs(some, part)
    points = [
        Point(label(of), of_forecast[of.number.forecast][1], of.r["signed"])
        for of in found
        if of.number.forecast in of_forecast and not np.isnan(of.r["signed"]).all()
    ]
    path = runs.RESULTS / "cost.svg"
    path.write_text(svg(sorted(points, key=lambda point: -np.nanmean(point.r)), ceiling), encoding="utf-8")


def label(of: Agreement) -> str:
    forecast, layer, name = of.number.key
    if forecast in ("trial", "ntk", "step", "embedding"):
        return name
    return f"{name}, layer {layer}" if forecast.startswith("paper") else f"{name}, {forecast.split(', ')[-1]}"


def svg(points: Sequence[Point], ceiling: float) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#333"><rect width="100%" height="100%" fill="#fff"/>'
    ]
    right = WIDTH - RIGHT
    for r in np.arange(-0.5, 1.01, 0.25):
        parts.append(f'<path d="M{LEFT} {_y(r):.1f}H{right}" stroke="{"#999" if r == 0 else "#e4e4e4"}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{_y(r) + 4:.1f}" text-anchor="end">{r:+.2f}</text>')
    for tick in TICKS:
        parts.append(f'<text x="{_x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.0%}</text>')
    parts.append(f'<path d="M{LEFT} {_y(ceiling):.1f}H{right}" stroke="#b33" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{LEFT + 6}" y="{_y(ceiling) - 5:.1f}" fill="#b33">what the outcomes’ noise allows</text>')
    at = float(TOP)
    for point in points:
        x, mean = _x(point.cost), float(np.nanmean(point.r))
        low, high = float(np.nanmin(point.r)), float(np.nanmax(point.r))
        at = max(at + 15, _y(mean))
        parts.append(f'<path d="M{x:.1f} {_y(low):.1f}V{_y(high):.1f}" stroke="#2a62b8" stroke-opacity=".35"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{_y(mean):.1f}" r="4" fill="#2a62b8"/>')
        parts.append(f'<path d="M{x + 5:.1f} {_y(mean):.1f}L{right + 8} {at - 4:.1f}" stroke="#ccc"/>')
        parts.append(f'<text x="{right + 12}" y="{at:.1f}">{escape(point.label)} {mean:+.2f}</text>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">processor time, as a share of training on the sets '
        "and evaluating the domains</text>"
    )
    parts.append(f'<text x="{LEFT}" y="16">r with the fall of loss, mean and range over training sets</text></svg>\n')
    return "\n".join(parts)


def _x(cost: float) -> float:
    low, high = log10(TICKS[0]), log10(TICKS[-1])
    return LEFT + (WIDTH - LEFT - RIGHT) * (min(max(log10(cost), low), high) - low) / (high - low)


def _y(r: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (HIGHEST - max(r, LOWEST)) / (HIGHEST - LOWEST)
