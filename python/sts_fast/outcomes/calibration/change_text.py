"""Changes and their intervals as text, in the unit of the outcome."""

from __future__ import annotations

from sts_fast.statistics import Interval


def unit_name(unit: str) -> str:
    """'points of accuracy' for shares of 1, which are shown in hundredths; otherwise the unit itself."""
    return {"accuracy": "points of accuracy", "given": "the unit of the outcomes' table"}.get(unit, unit)


def shown_change(change: float, unit: str, *, signed: bool = True) -> str:
    """One number: points with one digit for accuracy, else three significant digits."""
    plus = "+" if signed else ""
    return f"{100 * change:{plus}.1f}" if unit == "accuracy" else f"{change:{plus}.3g}"


def shown_interval(interval: Interval | None, unit: str, *, signed: bool = True) -> str:
    if interval is None:
        return "no interval"
    return "[{}, {}]".format(*(shown_change(bound, unit, signed=signed) for bound in interval))
