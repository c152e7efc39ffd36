"""Sends a run's numbers and its report to an experiment tracker.

| place               | where they go                                                          |
|---------------------|------------------------------------------------------------------------|
| `tensorboard:DIR`   | event files in a folder of DIR that is called after the run            |
| `wandb:PROJECT`     | a run of Weights & Biases                                              |
| `trackio:PROJECT`   | a run of trackio                                                       |
| `mlflow:EXPERIMENT` | a run of MLflow, at its tracking URI                                   |

Without a name, the project or experiment is `sts-fast`, and DIR is `runs`. Accounts, servers and offline modes are the
tracker's own settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError, listed, one_line
from sts_fast.forecast.run import Run
from sts_fast.report.report import build_report, conclusion

PROJECT = "sts-fast"


@dataclass(frozen=True)
class Logged:
    """What is sent of a run.

    name:     of its folder
    settings: model, SAE, training set and options, by name
    numbers:  by estimator and domain, as `act/law`; ends of the 95% interval as `act_low/law` and `act_high/law`
    text:     the conclusion in words
    report:   path of report.html
    """

    name: str
    settings: dict[str, Any]
    numbers: dict[str, float]
    text: str
    report: Path

    @classmethod
    def of(cls, folder: str | Path) -> Logged:
        run = Run.load(folder)
        scores = run.scores
        numbers: dict[str, float] = {}
        for domain in scores["domains"]:
            for estimator, score in domain["scores"].items():
                low, high = score["ci"]
                of_domain = {estimator: score["value"], f"{estimator}_low": low, f"{estimator}_high": high}
                numbers |= {f"{name}/{domain['name']}": float(number) for name, number in of_domain.items()}
        settings = {
            "model": scores["model"]["name"],
            "sae": scores["sae"]["source"],
            "hook": scores["sae"]["hook_name"],
            "train": listed(entry["path"] for entry in scores["provenance"]["inputs"] if entry["role"] == "train"),
            **scores["settings"],
        }
        return cls(run.folder.resolve().name, settings, numbers, conclusion(scores), build_report(run.folder))


def log_run(run: str | Path, to: str) -> None:
    """Sends the numbers of a run, its settings and its report to a tracker, once.

    run: folder of `score`; to: a place as in the table of this module

    Raises InputError where the folder is no run, the tracker is unknown or not installed, or refuses.
    """
    tracker, _, target = to.partition(":")
    if tracker not in TRACKERS:
        raise InputError(f"--log-to {to} names no tracker: give {', '.join(TRACKERS)}, as in tensorboard:DIR")
    logged = Logged.of(run)
    module, send = TRACKERS[tracker]
    try:
        imported = import_module(module)
    except ImportError as error:
        raise InputError(
            f"{tracker} cannot be imported ({one_line(error)}): pip install {tracker}, or choose another --log-to"
        ) from error
    try:
        send(imported, target, logged)
    except Exception as error:  # of its server, its files or its settings
        raise InputError(
            f"{tracker} did not take the run ({one_line(error)}): set it up, or choose another --log-to"
        ) from error


def _to_tensorboard(tensorboard: Any, target: str, run: Logged) -> None:
    with tensorboard.SummaryWriter(log_dir=str(Path(target or "runs") / run.name)) as writer:
        for name, number in run.numbers.items():
            writer.add_scalar(name, number, global_step=0)
        writer.add_text("conclusion", run.text, global_step=0)
        writer.add_text("settings", "\n".join(f"- {name}: {value}" for name, value in run.settings.items()), 0)


def _to_wandb(wandb: Any, target: str, run: Logged) -> None:
    """Also trackio's, which has the same functions."""
    opened = wandb.init(project=target or PROJECT, name=run.name, config={**run.settings, "conclusion": run.text})
    opened.log({**run.numbers, "report": wandb.Html(run.report.read_text(encoding="utf-8"))}, step=0)
    opened.finish()


def _to_mlflow(mlflow: Any, target: str, run: Logged) -> None:
    # MLflow takes few signs in a name.
    numbers = {re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII): number for name, number in run.numbers.items()}
    if len(numbers) < len(run.numbers):
        raise ValueError("names of domains differ only in signs that it does not allow")
    mlflow.set_experiment(target or PROJECT)
    with mlflow.start_run(run_name=run.name):
        mlflow.log_params({**run.settings, "conclusion": run.text})
        mlflow.log_metrics(numbers, step=0)
        mlflow.log_artifact(str(run.report))


# By name, the module that is imported and the function that sends.
TRACKERS: dict[str, tuple[str, Callable[[Any, str, Logged], None]]] = {
    "tensorboard": ("torch.utils.tensorboard", _to_tensorboard),
    "wandb": ("wandb", _to_wandb),
    "trackio": ("trackio", _to_wandb),
    "mlflow": ("mlflow", _to_mlflow),
}
