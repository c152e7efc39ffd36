"""A calibration in lines of text, and changes in their unit."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sts_fast.calibration import Calibration
    from sts_fast.forecast.run import Interval

LINE = 79


def unit_name(unit: str) -> str:
    """'points of accuracy' for shares of 1, which are shown in hundredths; else what is known of the unit."""
    return {"accuracy": "points of accuracy", "given": "the unit of the outcomes' table"}.get(unit, unit)


def shown_change(change: float, unit: str, *, signed: bool = True) -> str:
    """One number: points with one digit for accuracy, else three significant digits."""
    plus = "+" if signed else ""
    return f"{100 * change:{plus}.1f}" if unit == "accuracy" else f"{change:{plus}.3g}"


def shown_interval(interval: Interval | None, unit: str, *, signed: bool = True) -> str:
    if interval is None:
        return "no interval"
    return "[{}, {}]".format(*(shown_change(bound, unit, signed=signed) for bound in interval))


def text_of(calibration: Calibration) -> str:
    """What was learned, and how its intervals do on training sets held out."""
    unit, line = calibration.unit, calibration.line

    def number(value: float) -> str:
        return shown_change(value, unit, signed=False)

    factor = 100 if unit == "accuracy" else 1
    what = "change" if calibration.signed else "size of change"
    start = f"{factor * line.intercept:.3g} + " if line.intercept else ""
    half = f"{factor * calibration.multiplier * line.floor:.3g}"
    if line.per_score:
        half += f" + {factor * calibration.multiplier * line.per_score:.3g} |score|"
    n_changes = sum(run["n_domains"] for run in calibration.runs)
    lines = [
        f"Learned from {len(calibration.runs)} runs on {calibration.n_trains} training sets: {n_changes} changes, "
        f"in {unit_name(unit)}",
        "",
        f"{what} = {start}{factor * line.slope:.3g} score    by '{calibration.estimator}', |score| up to "
        f"{calibration.largest:.3g}",
        f"{calibration.level:.0%} interval: that ± ({half})",
    ]
    if (found := calibration.assessment) is not None:
        lines += [
            "",
            f"{'Training sets held out in turn':<32}{'inside':>8}{'mean width':>13}{'interval score':>17}{'error':>8}",
            f"{'by the score':<32}{found.coverage:>8.0%}{number(found.width):>13}"
            f"{number(found.interval_score):>17}{number(found.error):>8}",
            f"{'the mean change, always':<32}{found.constant_coverage:>8.0%}{number(found.constant_width):>13}"
            f"{number(found.constant_interval_score):>17}{number(found.constant_error):>8}",
            "",
            *textwrap.wrap(
                f"Of single training sets, {found.coverage_range[0]:.0%} to {found.coverage_range[1]:.0%} of the "
                f"changes lie inside. The interval score is the width, and {2 / (1 - calibration.level):.0f} times how "
                "far outside a change lies: smaller is better.",
                LINE,
            ),
        ]
    return "\n".join(lines)
