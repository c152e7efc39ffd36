"""The README's picture: signed forecasts of the demo's trainings against what they changed.

python -m study.world.picture DEMO    # the --output of sts-fast demo; writes docs/forecast.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from sts_fast import compare
from sts_fast.demo import organism
from sts_fast.demo.demo import N_PROMPTS, SHOTS, TOP_N, TRAINS
from sts_fast.files import atomic_path

PICTURE = Path(__file__).parents[2] / "docs" / "forecast.svg"
ESTIMATOR = "adapter"
SIZE, MARGIN, LIMIT = 420, 56, 0.85
CENTRED = 'text-anchor="middle" font-size="12"'


def points(demo: Path) -> dict[str, list[tuple[float, float]]]:
    """By training set, (forecast, measured change of P(correct)) of each other domain."""
    domains = {name: organism.examples(name, N_PROMPTS + SHOTS, seed=1) for name in organism.DOMAINS}
    forecasts = compare(
        model=organism.model_folder(),
        sae=str(organism.sae_folder()),
        trains={f"train on {name}": domains[name] for name in TRAINS},
        domains=domains,
        estimators=["act", ESTIMATOR],
        shots=SHOTS,
        domain_shots=SHOTS,
        top_n=TOP_N,
        limit=N_PROMPTS,
    )
    of_trains = {}
    for name in TRAINS:
        measured = json.loads((demo / name / "validation.json").read_text(encoding="utf-8"))["domains"]
        changes = {domain["name"]: domain["outcome"]["change"] for domain in measured}
        scored = {domain.name: domain.scores for domain in forecasts[f"train on {name}"].domains}
        of_trains[name] = [
            (scored[domain][ESTIMATOR].value, change)
            for domain, change in changes.items()
            if ESTIMATOR in scored[domain]
        ]
    return of_trains


def svg(of_trains: dict[str, list[tuple[float, float]]]) -> str:
    r = [float(np.corrcoef(*zip(*pairs, strict=True))[0, 1]) for pairs in of_trains.values()]
    n = sum(map(len, of_trains.values()))

    def at(value: float) -> float:
        return MARGIN + (np.clip(value, -LIMIT, LIMIT) + LIMIT) / (2 * LIMIT) * (SIZE - 2 * MARGIN)

    def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'

    low, high, middle = at(-LIMIT), at(LIMIT), at(0)
    marks = [
        line(low, SIZE - middle, high, SIZE - middle, 'stroke="#999"'),
        line(middle, SIZE - low, middle, SIZE - high, 'stroke="#999"'),
        line(low, SIZE - low, high, SIZE - high, 'stroke="#999" stroke-dasharray="4 4"'),
    ]
    for tick in (-0.8, -0.4, 0.4, 0.8):
        marks.append(text(at(tick), SIZE - middle + 16, f"{tick:+.1f}", 'text-anchor="middle" font-size="11"'))
        marks.append(text(middle - 6, SIZE - at(tick) + 4, f"{tick:+.1f}", 'text-anchor="end" font-size="11"'))
    for i, pairs in enumerate(of_trains.values()):
        color = f"hsl({i * 360 // len(of_trains)} 65% 45%)"
        marks += [
            f'<circle cx="{at(x):.1f}" cy="{SIZE - at(y):.1f}" r="2.6" fill="{color}" fill-opacity="0.65"/>'
            for x, y in pairs
        ]
    title = f"{len(of_trains)} fine-tunings, {n // len(of_trains)} other abilities each"
    facts = f"r = {np.mean(r):.2f} on average, from {min(r):.2f} to {max(r):.2f}"
    marks += [
        text(SIZE / 2, 20, title, 'text-anchor="middle" font-size="14" font-weight="bold"'),
        text(SIZE / 2, 38, facts, CENTRED),
        text(SIZE / 2, SIZE - 12, "forecast change of P(correct), before training", CENTRED),
        text(0, 0, "measured change, after training",
             f'{CENTRED} transform="translate(16 {SIZE / 2:.0f}) rotate(-90)"'),
    ]  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}" '
        'font-family="system-ui, sans-serif" fill="#333"><rect width="100%" height="100%" fill="white"/>'
        + "\n".join(marks)
        + "</svg>\n"
    )


if __name__ == "__main__":
    with atomic_path(PICTURE) as path:
        path.write_text(svg(points(Path(sys.argv[1]))), encoding="utf-8")
