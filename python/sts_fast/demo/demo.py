"""The demo: forecasts on the embedded world, real fine-tuning, and the correlation between the two."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast import files
from sts_fast._version import __version__
from sts_fast.data.prompts import Progress
from sts_fast.demo import organism
from sts_fast.demo.organism import Abilities, one_thread
from sts_fast.errors import InputError
from sts_fast.files import Document
from sts_fast.forecast.blocks import DomainBlock
from sts_fast.forecast.run import SCHEMA_VERSION, Forecast
from sts_fast.forecast.score import compare
from sts_fast.outcomes.outcomes import Outcome
from sts_fast.outcomes.validate import Validation, validate
from sts_fast.report import build_demo_report, build_report
from sts_fast.report.demo import DEMO_FILE
from sts_fast.statistics import defined, pearson, percentile_interval

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles

# Chosen before any outcome was known: one of each kind of skill, over tags and alphabets.
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

# Numbers compared with the outcome: name shown -> keys in a domain of scores.json.
PREDICTORS: dict[str, tuple[str, ...]] = {
    "STS_act": ("scores", "act", "value"),
    "STS_icl": ("scores", "icl", "value"),
    "most active features": ("controls", "most_active", "act"),
    "cosine of means": ("controls", "cosine_of_means", "cosine"),
    "raw activations": ("controls", "raw", "act"),
    "least shifted features": ("controls", "low_shift", "act"),
    "random features": ("controls", "random", "act"),
    "base loss": ("controls", "base_loss", "nll"),
    "base accuracy": ("controls", "base_accuracy", "accuracy"),
}
SCORE = "STS_act"
CONTROLS = tuple(name for name in PREDICTORS if not name.startswith("STS_"))
OUTCOMES = tuple(
    f"{shots}, {change}"
    for shots, change in itertools.product(
        ("zero-shot", "few-shot"),
        ("|change of P(correct)|", "|change of loss|", "|change of accuracy|", "change of P(correct), signed"),
    )
)
PRIMARY, SIGNED, FEW_SHOT = OUTCOMES[0], OUTCOMES[3], OUTCOMES[4]
# Correlations as close as this are called equal.
CLOSE = 0.05
# Domains in a small study of one training set, and number of such studies drawn, for one of the findings.
FEW_DOMAINS, N_STUDIES = 12, 2000


@dataclass(frozen=True)
class Trial:
    """A real fine-tuning on one training set, with every other domain measured before and after.

    own_change: change of P(correct), zero-shot, in the domain of the training set
    validation: STS_act beside the zero-shot change of P(correct) in each other domain
    changes:    by outcome, [n_domains] in the order of validation.domains
    r:          by outcome and predictor, Pearson correlation over the domains; None where one of them is constant
    """

    train: str
    seed: int
    own_change: float
    validation: Validation
    changes: dict[str, Doubles]
    r: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Spread:
    """Correlations of one predictor with one outcome over all trials; NaN where there are none."""

    mean: float
    low: float
    high: float
    n_above_zero: int
    n: int


@dataclass(frozen=True)
class Demo:
    """Forecasts by training set, and the trials that test them.

    steps, lr: of each fine-tuning
    figures:   accuracies of the embedded language model and quality of its SAE, measured when they were trained
    """

    forecasts: dict[str, Forecast]
    trials: list[Trial]
    steps: int
    lr: float
    figures: Document

    def spread(self, outcome: str, predictor: str) -> Spread:
        values = [r for trial in self.trials if (r := trial.r[outcome][predictor]) is not None]
        if not values:
            return Spread(float("nan"), float("nan"), float("nan"), 0, 0)
        return Spread(float(np.mean(values)), min(values), max(values), sum(r > 0 for r in values), len(values))

    def n_ahead(self, control: str) -> int:
        """Number of trials in which STS_act correlates more with the primary outcome than the control does."""
        pairs = [(trial.r[PRIMARY][SCORE], trial.r[PRIMARY][control]) for trial in self.trials]
        return sum(r is not None and (other is None or r > other) for r, other in pairs)

    def findings(self) -> list[str]:
        """Results of the trials, in sentences."""
        n, score = len(self.trials), self.spread(PRIMARY, SCORE)
        reliable = score.mean > 0.2 and score.n_above_zero >= 0.75 * n
        sentences = [
            f"{SCORE} {'goes' if reliable else 'does not reliably go'} with how much P(correct) changes: r = "
            f"{_r(score.mean)} on average over {n} trainings, from {_r(score.low)} to {_r(score.high)}, above zero in "
            f"{score.n_above_zero} of {score.n}."
        ]
        spreads = {control: self.spread(PRIMARY, control) for control in CONTROLS}
        rivals = [name for name in CONTROLS if spreads[name].mean > score.mean - CLOSE]
        beaten = [name for name in CONTROLS if name not in rivals and spreads[name].n]
        ahead = f"in brackets: in how many of {n} trainings {SCORE} is ahead"
        if rivals:
            sentences.append(
                f"As good, and cheaper ({ahead}): {self._beside(rivals)}. Where that holds, {SCORE} adds little to "
                "what the training questions alone say."
            )
        if beaten:
            sentences.append(f"Behind it ({ahead}): {self._beside(beaten)}.")
        low, high = self._few_domains()
        sentences.append(
            f"One training set is no test. A study of one of them and {FEW_DOMAINS} of these domains would have "
            f"reported anything from r = {_r(low)} to {_r(high)} (95% of such studies)."
        )
        signed = self.spread(SIGNED, SCORE)
        falls = float(np.mean([(trial.changes[SIGNED] < 0).mean() for trial in self.trials]))
        sentences.append(
            f"It forecasts size, not direction: {falls:.0%} of the changes were losses, and r with the signed change "
            f"is {_r(signed.mean)} on average, {_r(signed.low)} to {_r(signed.high)}."
        )
        few = self.spread(FEW_SHOT, SCORE)
        sentences.append(
            f"Where the questions come with demonstrations, r with the change of P(correct) is {_r(few.mean)} on "
            f"average, {_r(few.low)} to {_r(few.high)}."
        )
        sentences.append(
            "This is one tiny world and one way of training: it shows how the tool works and how to doubt it, not that "
            "it holds for your model."
        )
        return sentences

    def _beside(self, controls: Sequence[str]) -> str:
        return "; ".join(
            f"{name}, r = {_r(self.spread(PRIMARY, name).mean)} ({self.n_ahead(name)})" for name in controls
        )

    def _few_domains(self) -> tuple[float, float]:
        """Middle 95% of r over studies of one training and FEW_DOMAINS domains, drawn without replacement."""
        rng = np.random.default_rng(0)
        correlations = []
        for drawn in rng.integers(len(self.trials), size=N_STUDIES):
            rows = self.trials[drawn].validation.domains
            chosen = [rows[i] for i in rng.choice(len(rows), FEW_DOMAINS, replace=False)]
            r = defined(
                pearson(
                    np.asarray([row.score for row in chosen]), np.asarray([abs(row.outcome.change) for row in chosen])
                )
            )
            correlations += [r] if r is not None else []
        return percentile_interval(np.asarray(correlations))

    def to_dict(self) -> Document:
        """Contents of demo.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "versions": {"sts_fast": __version__},
            "organism": self.figures,
            "training": {"steps": self.steps, "lr": self.lr},
            "n_questions": N_QUESTIONS,
            "primary": PRIMARY,
            "score": SCORE,
            "findings": self.findings(),
            "summary": {
                outcome: {predictor: _summary(self.spread(outcome, predictor)) for predictor in PREDICTORS}
                for outcome in OUTCOMES
            },
            "trials": [
                {
                    "train": trial.train,
                    "seed": trial.seed,
                    "own_change": trial.own_change,
                    "r": trial.r,
                    "r_ci_domains": _listed(trial.validation.size.pearson.ci_domains),
                    "n_distinguishable": trial.validation.limits.n_distinguishable,
                    "domains": [row.name for row in trial.validation.domains],
                    "changes": {outcome: values.tolist() for outcome, values in trial.changes.items()},
                }
                for trial in self.trials
            ],
        }

    def save(self, folder: str | Path) -> None:
        """Writes a run with its validation and report for each training set, and demo.json and report.html for all.

        With several seeds, a training set's validation is that of the first one. Raises InputError where the folder is
        not writable.
        """
        folder = Path(folder)
        files.prepare_folder(folder)
        for train, forecast in self.forecasts.items():
            trial = next(trial for trial in self.trials if trial.train == train)
            forecast.save(folder / train)
            trial.validation.save(folder / train)
            build_report(folder / train)
        with files.atomic_path(folder / DEMO_FILE) as path:
            path.write_text(files.to_json(self.to_dict()), encoding="utf-8")
        build_demo_report(folder)


@one_thread()
def run_demo(
    *,
    trains: Sequence[str] = TRAINS,
    n_seeds: int = 1,
    seed: int = 0,
    heavy: bool = False,
    folder: str | Path | None = None,
    library: str | Path | None = None,
    progress: Progress | None = None,
) -> Demo:
    """Forecasts for each training set over all other domains, fine-tunes on each, and measures every domain.

    trains:   domains of the embedded world to train on
    n_seeds:  number of fine-tunings on each, which differ in the questions drawn and their order
    seed:     of the first of them
    heavy:    60 steps at a rate of 5e-4 instead of 12 at 2e-4
    folder:   model and SAE made by `organism.train`; by default those in the package
    library:  where the profiles of all sets are kept, as for `score`
    progress: called with (stage, done, total)

    Raises InputError for a domain that the world does not have, or a folder without model and SAE.
    """
    for train in trains:
        if train not in organism.DOMAINS:
            raise InputError(f"the embedded world has no domain '{train}'")
    report_progress = progress or (lambda stage, done, total: None)
    folder = organism.weights_folder() if folder is None else Path(folder)
    model, tokenizer = organism.load_model(folder / "model")
    domains = {name: organism.examples(name, N_PROMPTS + SHOTS, seed=1) for name in organism.DOMAINS}
    forecasts = compare(
        model=folder / "model",
        sae=folder / "sae",
        trains={f"train on {name}": domains[name] for name in trains},
        domains=domains,
        shots=SHOTS,
        domain_shots=SHOTS,
        top_n=TOP_N,
        limit=N_PROMPTS,
        controls="all",
        library=library,
        progress=progress,
    )
    steps, lr = HEAVY if heavy else LIGHT
    before = _abilities(model, tokenizer)

    def train_and_measure(train: str, offset: int) -> Trial:
        questions = organism.examples(train, N_TRAIN, seed=1000 + seed + offset)
        tuned = organism.fine_tune(model, tokenizer, questions, steps=steps, lr=lr, seed=seed + offset)
        return _trial(train, seed + offset, forecasts[f"train on {train}"], before, _abilities(tuned, tokenizer))

    trials: list[Trial] = []
    # Each training computes on one thread; running two at a time therefore changes no number.
    with ThreadPoolExecutor(2) as pool:
        for trial in pool.map(train_and_measure, *zip(*itertools.product(trains, range(n_seeds)), strict=True)):
            trials.append(trial)
            report_progress("fine-tuning, really", len(trials), len(trains) * n_seeds)
    figures = json.loads((folder / organism.FIGURES_FILE).read_text(encoding="utf-8"))
    return Demo({train: forecasts[f"train on {train}"] for train in trains}, trials, steps, lr, figures)


def _abilities(model: Any, tokenizer: Any) -> dict[str, Abilities]:
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
    changes: dict[str, Doubles] = {}
    for shots in ("zero-shot", "few-shot"):
        old, new = before[shots], after[shots]
        p, loss, accuracy = (
            getattr(new, quantity) - getattr(old, quantity) for quantity in ("p_correct", "answer_nll", "accuracy")
        )
        of_shots = [outcome for outcome in OUTCOMES if outcome.startswith(shots)]
        changes |= {
            outcome: values[others]
            for outcome, values in zip(of_shots, (np.abs(p), np.abs(loss), np.abs(accuracy), p), strict=True)
        }
    old_p, new_p = np.exp(before["zero-shot"].log_p), np.exp(after["zero-shot"].log_p)
    stderr = (new_p - old_p).std(axis=1, ddof=1) / np.sqrt(old_p.shape[1])
    outcomes = {
        name: Outcome(
            change=float(new_p[i].mean() - old_p[i].mean()),
            before=float(old_p[i].mean()),
            after=float(new_p[i].mean()),
            stderr=float(stderr[i]),
            n=old_p.shape[1],
            paired=True,
            metric="P(correct)",
        )
        for i, name in enumerate(names)
    }
    scores = forecast.to_dict()
    others_scored = [domain for domain in scores["domains"] if domain["name"] != train]
    own = outcomes.pop(train)
    predictors = {
        predictor: np.asarray([_value(domain, keys) for domain in others_scored])
        for predictor, keys in PREDICTORS.items()
    }
    return Trial(
        train=train,
        seed=seed,
        own_change=own.change,
        validation=validate({**scores, "domains": others_scored}, outcomes),
        changes=changes,
        r={
            outcome: {predictor: defined(pearson(values, sizes)) for predictor, values in predictors.items()}
            for outcome, sizes in changes.items()
        },
    )


def _value(domain: DomainBlock, keys: Sequence[str]) -> float:
    value: Any = domain
    for key in keys:
        value = value[key]
    return float(value)


def _summary(spread: Spread) -> dict[str, float | int | None]:
    names = {"mean_r": spread.mean, "min_r": spread.low, "max_r": spread.high}
    numbers: dict[str, float | int | None] = {name: value if spread.n else None for name, value in names.items()}
    return {**numbers, "n_above_zero": spread.n_above_zero, "n": spread.n}


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _r(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
