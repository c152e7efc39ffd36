"""A forecast drawn with matplotlib, whose figures are read back."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from sts_fast.errors import InputError
from sts_fast.forecast.plot import Plotted, plot
from sts_fast.forecast.run import DomainScore, Forecast, Score
from sts_fast.outcomes.outcomes import Outcome, Outcomes

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


def row(name: str, value: float, below: float, above: float, random: float | None = None) -> Plotted:
    return Plotted(name, value, (value - below, value + above), random)


SCORES = {
    "act": [row("law", 4.0, 1, 2, 0.5), row("art", 8.0, 1, 2, 1.0), row("music", 2.0, 1, 2, 0.25)],
    "adapter": [row("law", -50.0, 12.5, 25), row("art", 25.0, 12.5, 25)],
}


def drawn(ax: Any) -> dict[str, list[tuple[list[float], list[float]]]]:
    """By marker, the (x, y) of what was drawn; '' for lines."""
    found: dict[str, list[tuple[list[float], list[float]]]] = {}
    for line in ax.lines:
        marker = str(line.get_marker()).replace("None", "")
        found.setdefault(marker, []).append((list(line.get_xdata()), list(line.get_ydata())))
    return found


def test_the_highest_domain_is_on_top_and_random_features_are_beside_it() -> None:
    ax = plot(SCORES, "act", None, None)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["music", "law", "art"]
    lines = drawn(ax)
    assert lines["o"] == [([2.0], [0]), ([4.0], [1]), ([8.0], [2])]
    assert lines["|"] == [([0.25], [0]), ([0.5], [1]), ([1.0], [2])]
    assert lines[""] == [([1.0, 4.0], [0, 0]), ([3.0, 6.0], [1, 1]), ([7.0, 10.0], [2, 2])]


def test_what_has_a_sign_comes_first_in_points_with_a_line_at_zero() -> None:
    ax = plot(SCORES, None, None, None)
    assert ax.get_xlabel() == "adapter: change of P(answer), points, 95% intervals"
    lines = drawn(ax)
    assert lines["o"] == [([-50.0], [0]), ([25.0], [1])]
    assert lines[""][-1][0] == [0, 0]


def test_outcomes_make_a_scatter() -> None:
    outcome = {"law": -0.25, "music": 0.5, "other": 1.0}
    signed = plot(SCORES, "adapter", outcome, None)
    assert drawn(signed)["o"] == [([-50.0], [-0.25])]
    sizes = plot(SCORES, "act", outcome, None)
    assert drawn(sizes)["o"] == [([2.0], [0.5]), ([4.0], [0.25])]
    assert [text.get_text() for text in sizes.texts] == ["music", "law"]
    measured = Outcomes({"art": Outcome(change=-0.5, stderr=0.1)})
    ax = matplotlib.pyplot.figure().subplots()
    assert plot(SCORES, "act", measured, ax) is ax
    assert drawn(ax)["o"] == [([8.0], [0.5])]
    assert drawn(ax)[""][1] == ([8.0, 8.0], pytest.approx([0.5 - 0.196, 0.5 + 0.196], abs=1e-3))


def test_a_forecast_plots_its_scores_in_their_unit() -> None:
    scores = {"act": Score(4.0, (3.0, 6.0)), "trial_loss": Score(0.5, (0.25, 0.75)), "trial": Score(0.5, (0.25, 0.75))}
    counts = dict.fromkeys([field.name for field in fields(DomainScore) if field.name.startswith("n_")], 9)
    law = DomainScore("law", scores, demonstrations=[], controls={"random": {"act": 0.5}}, **counts)
    rest: dict[str, Any] = dict.fromkeys([field.name for field in fields(Forecast)])
    forecast = Forecast(**{**rest, "domains": [law]})
    assert drawn(forecast.plot("act")) == {"": [([3.0, 6.0], [0, 0])], "o": [([4.0], [0])], "|": [([0.5], [0])]}
    assert drawn(forecast.plot("trial"))["o"] == [([50.0], [0])]
    assert drawn(forecast.plot(outcome={"law": -0.25}))["o"] == [([0.5], [-0.25])]


def test_what_cannot_be_plotted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the forecast has no 'icl' to plot: it has adapter, act"):
        plot(SCORES, "icl", None, None)
    with pytest.raises(InputError, match="it was made without domains"):
        plot({}, None, None, None)
    with pytest.raises(InputError, match=r"no outcome is of a domain of the forecast: name them as .*law"):
        plot(SCORES, None, {"Law": 1.0}, None)
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"a plot needs matplotlib: pip install 'sts-fast\[plot\]'"):
        plot(SCORES, None, None, None)
