from __future__ import annotations

import re

import numpy as np
import pytest

from sts_fast.report import figures


@pytest.mark.parametrize("seed", range(30))
def test_scales_cover_their_values_with_round_ticks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=rng.integers(1, 6)) * 10.0 ** rng.integers(-8, 9) + rng.integers(-3, 3)).tolist()
    scale = figures.Scale.over(values)
    assert scale.low <= min(values)
    assert scale.high >= max(values)
    assert 2 <= len(scale.ticks) <= 7
    assert np.diff(scale.ticks) == pytest.approx(scale.ticks[1] - scale.ticks[0])
    assert all(0 <= scale.at(value) <= 100 for value in values)


def test_names_are_cut_to_their_room() -> None:
    assert figures.shortened("short", 100) == "short"
    cut = figures.shortened("x" * 200, 100)
    assert cut.endswith("…")
    assert len(cut) * figures.CHARACTER <= 100
    assert len(figures.shortened("数" * 200, 100)) < len(cut)


def test_axes_of_dots_are_as_long_as_the_dots_need() -> None:
    rows = [figures.Dot(str(i), value, (value - 0.1, value + 0.1), "", control=1.2) for i, value in enumerate((5.2, 4))]
    scale = figures.Scale.of_dots(rows)
    assert scale.low > 3  # neither from zero nor from controls that are far away
    assert not scale.contains(1.2)
    near = figures.Scale.of_dots([*rows, figures.Dot("law", 5.0, (4.9, 5.1), "", control=3.45)])
    assert near.contains(3.45)
    # Intervals that are longer than the values' spread are shown whole.
    alike = figures.Scale.of_dots([figures.Dot("", value, (value - 1, value + 1), "") for value in (5.0, 5.2)])
    assert alike.low <= 4
    assert alike.high >= 6.2


def test_long_intervals_do_not_squash_the_values() -> None:
    scale = figures.Scale.with_intervals([0.0, 1.0, 2.0], [(0.9, 1.2), (0.01, 300.0)])
    assert (scale.low, scale.high) == (0.0, 4.0)  # as far again as the values reach
    assert scale.contains(1.2)
    assert not scale.contains(300.0)
    both_ways = figures.Scale.with_intervals([-1.0, 3.0], [(-90.0, 2.0), (1.0, 80.0), None])
    assert (both_ways.low, both_ways.high) == (-5.0, 10.0)  # -5 to 7, in steps of 5
    assert figures.Scale.with_intervals([0.0, 2.0], [(1.5, 2.5)]) == figures.Scale.over([0.0, 1.5, 2.0, 2.5])


@pytest.mark.parametrize(
    ("interval", "turns"), [((0.5, 1.5), []), ((0.5, 99.0), [0]), ((-99.0, 1.5), [180]), ((-99.0, 99.0), [180, 0])]
)
def test_whiskers_that_leave_the_axis_end_in_an_arrow(interval: tuple[float, float], turns: list[int]) -> None:
    rows = [figures.Dot("law", 1.0, interval, ""), figures.Dot("math", 2.0, (1.9, 2.1), "")]
    scale = figures.Scale.with_intervals([0.0, 1.0, 2.0], [row.interval for row in rows])
    drawn = figures.dots("x", rows, scale, axis=("", "", ""), title="", description="")
    assert [int(turn) for turn in re.findall(r'rotate\((-?\d+)\)"[^>]*class="whisker"', drawn)] == turns
    # A cap at every other end, and a line for each of the two.
    assert len(re.findall(r'<line [^>]*class="whisker"', drawn)) == 2 + 4 - len(turns)

    points = [figures.Point(row.name, row.value, row.value, None, row.interval) for row in rows]
    plot = figures.scatter("x", points, x_label="", y_label="", title="", description="")
    upright = {0: -90, 180: 90}  # the upper end, and the lower one
    drawn_turns = [int(turn) for turn in re.findall(r'rotate\((-?\d+)\)"[^>]*class="spread"', plot)]
    assert drawn_turns == [upright[turn] for turn in turns]
