"""Past runs: forecasts of trainings that have been done since, with the outcome of each domain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast import files
from sts_fast.errors import InputError, listed
from sts_fast.forecast.blocks import Scores
from sts_fast.forecast.estimators import BY_NAME, SIGNED, SIGNED_OPTIONS, SIZES
from sts_fast.forecast.run import SCORES_FILE, VALIDATION_FILE, Run
from sts_fast.outcomes import metrics
from sts_fast.outcomes.calibration.conformal import Points
from sts_fast.outcomes.outcomes import Outcome
from sts_fast.outcomes.validate import load_outcomes

# Estimators to learn from where none is named: the first of these that all runs have.
PREFERRED = (*SIGNED_OPTIONS, *SIZES)
# Suffixes of the hashed files that identify a local model or SAE.
WEIGHTS = (".safetensors", ".npz", ".pt", ".bin")
SHOWN_DIGITS = 12


# What scores depend on beside the training set, by name: the model, the SAE and options.
Conditions = dict[str, str | int | None]


@dataclass(frozen=True)
class LearnedRun:
    """A run that a calibration was learned from. train: number of its training set, the same for the same files."""

    train: int
    name: str
    n_domains: int
    scores_sha256: str
    outcomes_sha256: str


@dataclass(frozen=True)
class PastRun:
    """One run's folder. scores: scores.json; outcomes by domain and mismatches: as sts-fast validate wrote them."""

    folder: Path
    scores: Scores
    outcomes: dict[str, Outcome]
    mismatches: list[str]

    def forecasts(self, estimator: str) -> dict[str, float]:
        return forecasts_of(self.scores, estimator)


def read_past(sources: Iterable[str | Path]) -> tuple[list[PastRun], list[Path]]:
    """The runs in and below the given folders, and those of them that lack an outcome.

    Raises InputError where a folder contains no run, no run has an outcome, or a file is damaged.
    """
    folders: list[Path] = []
    for source in map(Path, sources):
        if not source.is_dir():
            raise InputError(f"there is no folder {source}: give folders of past runs, each as sts-fast score wrote it")
        depths = "", "[!.]*/", "[!.]*/[!.]*/"  # what killed runs left has a dot in front
        below = sorted({path.parent for depth in depths for path in source.glob(f"{depth}{SCORES_FILE}")})
        if not below:
            raise InputError(f"{source} contains no past run: give folders that sts-fast score wrote")
        folders += [folder for folder in below if folder not in folders]
    if not folders:
        raise InputError("there are no past runs to learn from: give their folders")
    having = [folder for folder in folders if (folder / VALIDATION_FILE).is_file()]
    if not having:
        raise InputError(
            f"none of {len(folders)} past runs has an outcome: first compare each with its evaluations, with "
            f"sts-fast validate {folders[0]} --before ... --after ..."
        )
    scores = {folder: Run.load(folder).scores for folder in having}
    measured = {folder: load_outcomes(folder) for folder in having}
    runs = [PastRun(folder, scores[folder], of_run.domains, of_run.mismatches) for folder, of_run in measured.items()]
    return runs, [folder for folder in folders if folder not in having]


def forecasts_of(scores: Scores, estimator: str) -> dict[str, float]:
    """Scores by domain, of domains that have one; empty where the run was made without the estimator."""
    return {
        domain["name"]: domain["scores"][estimator]["value"]
        for domain in scores["domains"]
        if estimator in domain["scores"]
    }


def choose_estimator(runs: Sequence[PastRun], chosen: str | None) -> str:
    """The given estimator, or the first of PREFERRED that all runs have. Raises InputError where a run lacks it."""
    if chosen is not None and chosen not in BY_NAME:
        raise InputError(f"--estimator must be one of {', '.join(BY_NAME)}, not '{chosen}'")
    for estimator in [chosen] if chosen else PREFERRED:
        lacking = [run for run in runs if not run.forecasts(estimator)]
        if not lacking:
            return estimator
    if chosen:
        raise InputError(
            f"{lacking[0].folder} holds no scores by '{chosen}': score it with --estimators {BY_NAME[chosen].option}"
        )
    raise InputError("the past runs have no estimator in common: score them with the same --estimators")


def points_of(runs: Sequence[PastRun], estimator: str) -> tuple[Points, list[str]]:
    """All domains with a score and an outcome; and the key of each training set, in the order of their numbers.

    Raises InputError where a run has none.
    """
    signed = estimator in SIGNED
    keys = list(dict.fromkeys(train_key(run.scores) for run in runs))
    score, change, train = [], [], []
    for run in runs:
        forecasts = run.forecasts(estimator)
        both = [name for name in run.outcomes if name in forecasts]
        if not both:
            raise InputError(
                f"{run.folder} forecasts none of the domains with an outcome in {VALIDATION_FILE} "
                f"({listed(run.outcomes) or 'none'}): validate it again"
            )
        score += [forecasts[name] for name in both]
        change += [run.outcomes[name].change for name in both]
        train += [keys.index(train_key(run.scores))] * len(both)
    changes = np.asarray(change, np.float64)
    points = Points(np.asarray(score, np.float64), changes if signed else np.abs(changes), np.asarray(train), signed)
    return points, keys


def train_key(scores: Scores) -> str:
    """Identity of a training set: the hashes of its files; of examples in memory, the shift that they cause."""
    hashes = [entry["sha256"] for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
    shifts = [[feature["index"], feature["mean_activation"]] for feature in scores["shifted_features"]]
    return _digest(sorted(hashes) or shifts)


def unit_of(runs: Sequence[PastRun]) -> str:
    """The unit of all outcomes, as of `metrics.unit_of`. Raises InputError where runs differ."""
    units: dict[str, Path] = {}
    for run in runs:
        for outcome in run.outcomes.values():
            units.setdefault(metrics.unit_of(outcome.metric), run.folder)
    if len(units) > 1:
        shown = ", ".join(f"{unit} in {folder}" for unit, folder in units.items())
        raise InputError(f"the outcomes are of different kinds ({shown}): learn from runs with the same evaluation")
    return next(iter(units))


def conditions(scores: Scores, estimator: str) -> Conditions:
    """Settings that scores depend on beside the training set; past runs and new ones must have the same."""
    model, sae, settings = scores["model"], scores["sae"], scores["settings"]
    shared: Conditions = {
        "model": _identity(scores, "model", model["name"], model["revision"]),
        "SAE": _identity(scores, "sae", sae["source"], None),
        "place": f"{model['side']} of {model['module']}",
        "forecast of": "RL" if scores.get("rollouts") else "fine-tuning",
    }
    if estimator in SIGNED:
        signed = scores["signed"]
        if BY_NAME[estimator].option == "trial":
            trial = None if signed is None else signed["trial"]
            n_steps, n_prompts = (None, None) if trial is None else (trial["n_steps"], trial["n_prompts"])
            return shared | {"--trial-steps": n_steps, "--trial-prompts": n_prompts}
        return shared | {"--signed-features": None if signed is None else signed["features"]}
    shared |= {"--dims": settings["dims"], "--top-n": settings["top_n"], "--tokens": settings["tokens"]}
    if settings["dims"] in ("icl", "verified"):
        shared["--shots"] = settings["shots"]
    if estimator == "icl":
        shared["--domain-shots"] = settings["domain_shots"]
    if "--shots" in shared or "--domain-shots" in shared:
        shared["--demo-draws"] = settings["demo_draws"]
    return shared


def _identity(scores: Scores, role: str, name: str, revision: str | None) -> str:
    """Name with the digest of local weights, so that a folder may move; or with the revision on the hub."""
    hashes = sorted(
        entry["sha256"]
        for entry in scores["provenance"]["inputs"]
        if entry["role"] == role and entry["path"].endswith(WEIGHTS)
    )
    if hashes:
        return f"{Path(name).name} ({_digest(hashes)[:SHOWN_DIGITS]})"
    return name + (f" ({revision[:SHOWN_DIGITS]})" if revision else "")


def differences(past: Conditions, new: Conditions) -> list[str]:
    """Differences between the conditions of two runs, in words; a folder's name does not count if its weights agree."""
    return [
        f"{name} {new.get(name)} instead of {value}"
        for name, value in past.items()
        if _comparable(value) != _comparable(new.get(name))
    ]


def _comparable(value: Any) -> Any:
    return value[value.rindex("(") :] if isinstance(value, str) and value.endswith(")") else value


def check_alike(runs: Sequence[PastRun], estimator: str) -> Conditions:
    """The conditions that all runs share. Raises InputError where one differs."""
    first = conditions(runs[0].scores, estimator)
    for run in runs[1:]:
        if differ := differences(first, conditions(run.scores, estimator)):
            raise InputError(
                f"{run.folder} differs from {runs[0].folder}: {', '.join(differ)}; learn from runs with the same "
                "settings"
            )
    return first


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def described(run: PastRun, number: int) -> LearnedRun:
    """The calibration's record of a run that it was learned from."""
    return LearnedRun(
        train=number,
        name=run.scores["train"]["name"],
        n_domains=len(run.outcomes),
        scores_sha256=files.sha256(run.folder / SCORES_FILE),
        outcomes_sha256=files.sha256(run.folder / VALIDATION_FILE),
    )
