from __future__ import annotations

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
