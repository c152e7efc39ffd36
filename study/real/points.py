"""Forecasts in nats, with intervals: what `validate --fit` makes of the forecasts of one part and their outcomes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from study.real import harness, runs
from study.real.forecasts import FORECASTS
from study.real.runs import Tell
from study.real.sets import DEMONSTRATIONS, N_DOMAIN, own_domains, read_rows

# By forecast, the estimators that are calibrated.
CALIBRATED = {
    "trial": ("trial_loss",),
    "trial, 8 steps and prompts": ("trial_loss",),
    "ntk": ("ntk_loss",),
    "step": ("step_loss",),
    "adapter": ("adapter_loss",),
    "paper without template": ("act", "icl"),
}


def points(work: Path, part: str, way: str, tell: Tell) -> None:
    """Writes results/points/PART WAY.json: by forecast, what `validate --fit` says of it, one training set held out.

    Domains of a training set's own kind are left out of its outcomes.
    """
    import sts_fast

    outcomes = runs.outcomes()
    sets = runs.read_json(runs.RESULTS / "split.json")[part]
    found: dict[str, Any] = {}
    for asked in FORECASTS:
        made = work / "forecasts" / part / asked.name
        for estimator in CALIBRATED.get(asked.name, ()) if made.is_dir() else ():
            folders = []
            for train in sets["trains"]:
                record = outcomes.get(f"{way} {train} 0")
                run = [path.parent for path in sorted(made.rglob("scores.json")) if path.parent.name == train]
                if record is None or not run:
                    continue
                folder = work / "points" / part / way / f"{asked.name} {estimator}" / train
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(run[len(run) // 2], folder)  # of several SAEs, the one in the middle
                others = [domain for domain in sets["domains"] if domain not in own_domains(train)]
                for name, of in (("before", outcomes[runs.BASE]), ("after", record)):
                    answers = {
                        domain: (_asked_rows(work, domain), np.asarray(of["domains"][domain]["loss"]))
                        for domain in others
                    }
                    harness.write(folder / name, answers, model=name)
                result = sts_fast.validate(
                    folder, before=folder / "before", after=folder / "after", metric=["loss"], estimator=estimator
                )
                result.save(folder)
                folders.append(folder)
            if len(folders) >= 9:
                calibration = sts_fast.fit_calibration(folders, estimator=estimator)
                name = f"{asked.name}, {estimator}"
                found[name] = calibration.to_dict()["assessment"]
                tell(f"{part} {way}: {name} {found[name]}")
    runs.write_json(runs.RESULTS / "points" / f"{part} {way}.json", found)


def _asked_rows(work: Path, domain: str) -> list[dict[str, Any]]:
    return read_rows(work / "domains" / f"{domain}.jsonl")[DEMONSTRATIONS:][:N_DOMAIN]
