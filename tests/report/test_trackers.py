"""A run's numbers in experiment trackers: read back from their own files where these install, else from a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from written_run import make_scores, write_scores

import sts_fast
from sts_fast.cli import main
from sts_fast.errors import InputError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    scores = make_scores(3)
    scores["domains"][1]["name"] = "law & order"
    return write_scores(tmp_path / "run1", scores)


def expected() -> dict[str, float]:
    """The numbers, by hand."""
    numbers: dict[str, float] = {}
    for domain, name in zip(make_scores(3)["domains"], ("domain 0", "law & order", "domain 2"), strict=True):
        for estimator, score in domain["scores"].items():
            numbers[f"{estimator}/{name}"] = score["value"]
            numbers[f"{estimator}_low/{name}"], numbers[f"{estimator}_high/{name}"] = score["ci"]
    return numbers


@pytest.mark.filterwarnings("default")
def test_tensorboard_shows_every_score_with_its_interval(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("sys.argv", ["sts-fast", "report", str(run), "--log-to", f"tensorboard:{tmp_path / 'tb'}"])
    main()
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    events = accumulator.EventAccumulator(str(tmp_path / "tb" / "run1"))
    events.Reload()
    shown = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert shown == {name: [pytest.approx(number)] for name, number in expected().items()}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "is forecast to move" in texts["conclusion/text_summary"]
    assert "- top_n: 30" in texts["settings/text_summary"]


@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_numbers_settings_and_report(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'store'}")
    sts_fast.log_run(run, "mlflow:forecasts")
    client = mlflow.MlflowClient(f"file://{tmp_path / 'store'}")
    [logged] = client.search_runs([client.get_experiment_by_name("forecasts").experiment_id])
    assert logged.data.metrics == {name.replace("&", "_"): number for name, number in expected().items()}
    assert logged.data.params["top_n"] == "30"
    assert [file.path for file in client.list_artifacts(logged.info.run_id)] == ["report.html"]


class StandIn(ModuleType):
    """The functions that wandb and trackio have in common."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[Any] = []
        self.Html = lambda text: ("html", text)

    def init(self, **options: Any) -> Any:
        self.calls.append(options)
        return SimpleNamespace(
            log=lambda numbers, step: self.calls.append((numbers, step)), finish=lambda: self.calls.append("finished")
        )


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_numbers_settings_and_report(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, standing_in := StandIn(name))
    sts_fast.log_run(run, name)
    opened, (numbers, step), last = standing_in.calls
    assert (opened["project"], opened["name"], opened["config"]["top_n"]) == ("sts-fast", "run1", 30)
    assert numbers.pop("report") == ("html", (run / "report.html").read_text(encoding="utf-8"))
    assert (numbers, step, last) == (expected(), 0, "finished")


def test_what_a_tracker_refuses_is_one_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="names no tracker: give tensorboard, wandb, trackio, mlflow"):
        sts_fast.log_run(run, "comet:x")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        sts_fast.log_run(run, "wandb")
    monkeypatch.setitem(sys.modules, "trackio", refusing := StandIn("trackio"))
    monkeypatch.setattr(refusing, "Html", lambda text: 1 / 0)
    with pytest.raises(InputError, match=r"trackio did not take the run \(division by zero\)"):
        sts_fast.log_run(run, "trackio:p")
