"""How far runs agree on the shifted features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Tiny

import sts_fast
from sts_fast.cli import main
from sts_fast.errors import InputError

TOP_N = 12


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training set: demonstrated, really trained on, its most active features; and with another SAE."""
    folder = tmp_path_factory.mktemp("runs")
    for name, sae, tuned in (("icl", "topk", None), ("tuned", "topk", tiny.tuned), ("active", "topk", None),
                             ("gated", "gated", None)):  # fmt: skip
        dims = name if name in ("tuned", "active") else "icl"
        forecast = sts_fast.score(
            model=tiny.model, sae=tiny.saes[sae], train=tiny.train, domains={}, dims=dims, tuned=tuned,
            shots=1, limit=10, top_n=TOP_N,
        )  # fmt: skip
        forecast.save(folder / name)
    return {path.name: path for path in folder.iterdir()}


def features(run: Path) -> set[int]:
    return {one["index"] for one in json.loads((run / "scores.json").read_text())["shifted_features"]}


def test_shares_are_those_of_the_feature_lists(runs: dict[str, Path]) -> None:
    found = sts_fast.overlap(runs["tuned"], [runs["icl"], runs["active"], runs["tuned"]])
    d_sae = json.loads((runs["icl"] / "scores.json").read_text())["sae"]["d_sae"]
    assert (found.dims, found.top_n) == ("tuned", TOP_N)
    shares = {(Path(one.run).name, one.features): one.share for one in found.found}
    truth = features(runs["tuned"])
    for name in ("icl", "active", "tuned"):
        assert shares[name, "shifted"] == len(features(runs[name]) & truth) / TOP_N
    assert shares["tuned", "shifted"] == 1
    assert {one.chance for one in found.found} == {TOP_N / d_sae}
    # The run of --dims active has nothing but its most active features.
    assert shares["active", "shifted"] == shares["active", "most active"]


def test_command_line_prints_a_row_for_each(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sts-fast", "overlap", str(runs["tuned"]), str(runs["icl"])])
    main()
    printed = capsys.readouterr().out
    assert f"Of the {TOP_N} features" in printed
    assert "most active" in printed
    monkeypatch.setattr("sys.argv", ["sts-fast", "overlap", str(runs["tuned"]), str(runs["icl"]), "--json"])
    main()
    expected = sts_fast.overlap(runs["tuned"], [runs["icl"]]).to_dict()
    assert json.loads(capsys.readouterr().out) == expected


def test_what_does_not_compare_is_told(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different SAEs"):
        sts_fast.overlap(runs["tuned"], [runs["gated"]])
    with pytest.raises(InputError, match=r"no scores\.json"):
        sts_fast.overlap(tmp_path, [runs["icl"]])
