"""The demo: forecasts on the embedded world, real fine-tuning, and how far the one foretold the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast import files, organism, results
from sts_fast.errors import InputError
from sts_fast.organism import Abilities
from sts_fast.outcomes import Outcome
from sts_fast.results import Forecast
from sts_fast.score import compare
from sts_fast.validate import validate

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    Doubles = NDArray[np.float64]

Progress = Callable[[str, int, int], None]

DEMO_FILE = "demo.json"
# Chosen before any outcome was looked at: one of each kind of skill, over tags and alphabets.
TRAINS = (
    "T0.reverse.a",
    "T3.next.b",
    "T1.swap.a",
    "T2.previous.c",
    "T7.reverse-next.a",
    "T9.transcribe.b",
    "T5.sort.d",
    "T8.sums.a",
)
SHOTS = 4
TOP_N = 32
N_QUESTIONS = 64
N_PROMPTS = 48
N_TRAIN = 512
LIGHT, HEAVY = (12, 2e-4), (60, 5e-4)  # steps, learning rate

# What stands beside the forecast: (name shown, how to find it in a domain's scores).
PREDICTORS: dict[str, tuple[str, ...]] = {
    "STS_act": ("sts_act",),
    "STS_icl": ("sts_icl",),
    "random features": ("controls", "random", "sts_act"),
    "low-shift features": ("controls", "low_shift", "sts_act"),
    "most active features": ("controls", "most_active", "sts_act"),
    "raw activations": ("controls", "raw", "sts_act"),
    "cosine of means": ("controls", "cosine_of_means", "cosine"),
    "base loss": ("controls", "base_loss", "nll"),
    "base accuracy": ("controls", "base_accuracy", "accuracy"),
}


@dataclass(frozen=True)
class Trial:
    """One training set, really trained on. Arrays are over the other domains, in the order of `domains`.

    outcomes:   by outcome ('zero-shot |change of P(correct)|', ...), [n_domains] sizes of the change
    stderr:     [n_domains] paired standard error of the zero-shot change of P(correct)
    r:          by outcome and predictor, Pearson correlation over the domains; None where one of them is constant
    own_change: zero-shot change of P(correct) in the domain that was trained on
    """

    train: str
    seed: int
    domains: list[str]
    signed_change: Doubles
    stderr: Doubles
    outcomes: dict[str, Doubles]
    r: dict[str, dict[str, float | None]]
    own_change: float


@dataclass(frozen=True)
class Demo:
    """All trials, and the forecasts that they judge, by training set."""

    forecasts: dict[str, Forecast]
    trials: list[Trial]

    def spread(self, outcome: str, predictor: str) -> tuple[float, float, float, int, int]:
        """Mean, least and largest r over the trials, in how many it is above zero, and how many there are."""
        values = [r for trial in self.trials if (r := trial.r[outcome][predictor]) is not None]
        if not values:
            return (float("nan"), float("nan"), float("nan"), 0, 0)
        return (float(np.mean(values)), min(values), max(values), sum(r > 0 for r in values), len(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in demo.json."""
        outcomes = list(self.trials[0].outcomes)
        return {
            "schema_version": results.SCHEMA_VERSION,
            "trials": [
                {
                    "train": trial.train,
                    "seed": trial.seed,
                    "own_change": trial.own_change,
                    "domains": trial.domains,
                    "signed_change": trial.signed_change.tolist(),
                    "stderr": trial.stderr.tolist(),
                    "outcomes": {name: sizes.tolist() for name, sizes in trial.outcomes.items()},
                    "r": trial.r,
                }
                for trial in self.trials
            ],
            "summary": {
                outcome: {
                    predictor: dict(
                        zip(
                            ("mean_r", "min_r", "max_r", "n_above_zero", "n"),
                            (None if value != value else value for value in self.spread(outcome, predictor)),
                            strict=True,
                        )
                    )
                    for predictor in PREDICTORS
                }
                for outcome in outcomes
            },
        }


def run_demo(
    *,
    trains: Sequence[str] = TRAINS,
    seeds: Sequence[int] = (0,),
    heavy: bool = False,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Demo:
    """Forecasts for each training set over all other domains, really fine-tunes on each, and measures every domain.

    trains: domains of the embedded world to train on
    seeds:  of the fine-tuning; each gives a trial per training set
    heavy:  60 steps at a rate of 5e-4 instead of 12 at 2e-4
    folder: model and SAE made again by `organism.train`; by default those in the package

    Raises InputError for a domain that the world does not have, or a folder without model and SAE.
    """
    for train in trains:
        if train not in organism.DOMAINS:
            raise InputError(f"the embedded world has no domain '{train}'")
    tell = progress or (lambda stage, done, total: None)
    model_folder = organism.model_folder() if folder is None else Path(folder) / "model"
    sae_folder = organism.sae_folder() if folder is None else Path(folder) / "sae"
    model, tokenizer = organism.load_model(model_folder)
    domains = {name: organism.examples(name, N_PROMPTS + SHOTS, seed=1) for name in organism.DOMAINS}
    forecasts = compare(
        model=model_folder,
        sae=sae_folder,
        trains={f"train {name}": domains[name] for name in trains},
        domains=domains,
        shots=SHOTS,
        domain_shots=SHOTS,
        top_n=TOP_N,
        limit=N_PROMPTS,
        controls="all",
        progress=progress,
    )
    before = _abilities(model, tokenizer)
    trials = []
    for number, (train, seed) in enumerate((train, seed) for train in trains for seed in seeds):
        steps, lr = HEAVY if heavy else LIGHT
        questions = organism.examples(train, N_TRAIN, seed=1000 + seed)
        tuned = organism.fine_tune(model, tokenizer, questions, steps=steps, lr=lr, seed=seed)
        after = _abilities(tuned, tokenizer)
        trials.append(_trial(train, seed, forecasts[f"train {train}"], before, after))
        tell("fine-tuning", number + 1, len(trains) * len(seeds))
    return Demo(forecasts, trials)


def save_demo(demo: Demo, folder: str | Path) -> None:
    """Writes each forecast with its validation in a folder of its training set, and demo.json beside them."""
    folder = Path(folder)
    results.prepare_folder(folder)
    for name, forecast in demo.forecasts.items():
        train = name.removeprefix("train ")
        trial = next(trial for trial in demo.trials if trial.train == train)
        others = replace(forecast, domains=[domain for domain in forecast.domains if domain.name != train])
        others.save(folder / train)
        outcomes = {
            domain: Outcome(change=float(change), stderr=float(stderr), n=N_QUESTIONS, paired=True, metric="P(correct)")
            for domain, change, stderr in zip(trial.domains, trial.signed_change, trial.stderr, strict=True)
        }
        with files.atomic_path(folder / train / results.VALIDATION_FILE) as path:
            path.write_text(results.to_json(validate(others, outcomes).to_dict()), encoding="utf-8")
    with files.atomic_path(folder / DEMO_FILE) as path:
        path.write_text(json.dumps(demo.to_dict(), indent=1) + "\n", encoding="utf-8")


def _abilities(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Abilities]:
    names = list(organism.DOMAINS)
    return {
        "zero-shot": organism.measure(model, tokenizer, names, shots=0, n=N_QUESTIONS, seed=2),
        "few-shot": organism.measure(model, tokenizer, names, shots=SHOTS, n=N_QUESTIONS, seed=2),
    }


def _trial(
    train: str, seed: int, forecast: Forecast, before: dict[str, Abilities], after: dict[str, Abilities]
) -> Trial:
    names = before["zero-shot"].domains
    others = np.asarray([name != train for name in names])
    outcomes: dict[str, Doubles] = {}
    for shots in ("zero-shot", "few-shot"):
        old, new = before[shots], after[shots]
        outcomes |= {
            f"{shots} |change of P(correct)|": np.abs(new.p_correct - old.p_correct)[others],
            f"{shots} |change of loss|": np.abs(new.answer_nll - old.answer_nll)[others],
            f"{shots} |change of accuracy|": np.abs(new.accuracy - old.accuracy)[others],
        }
    difference = np.exp(after["zero-shot"].log_p) - np.exp(before["zero-shot"].log_p)
    change, stderr = difference.mean(axis=1), difference.std(axis=1, ddof=1) / np.sqrt(difference.shape[1])
    scores = {domain["name"]: domain for domain in forecast.to_dict()["domains"]}
    predictors = {
        predictor: np.asarray([_value(scores[name], keys) for name in np.asarray(names)[others]])
        for predictor, keys in PREDICTORS.items()
    }
    return Trial(
        train=train,
        seed=seed,
        domains=[name for name in names if name != train],
        signed_change=change[others],
        stderr=stderr[others],
        outcomes=outcomes,
        r={
            outcome: {predictor: _pearson(values, sizes) for predictor, values in predictors.items()}
            for outcome, sizes in outcomes.items()
        },
        own_change=float(change[~others][0]),
    )


def _value(domain: dict[str, Any], keys: Sequence[str]) -> float:
    value: Any = domain
    for key in keys:
        value = value[key]
    return float(value)


def _pearson(x: Doubles, y: Doubles) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / norm) if norm > 0 else None
