"""Reads the measured change of each domain from evaluation results before and after training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sts_fast.errors import InputError, listed
from sts_fast.forecast.run import TRAINING_FILE
from sts_fast.outcomes.evaluation import METRICS, Evaluation, Task, finite, read_json
from sts_fast.outcomes.formats import table
from sts_fast.outcomes.read import read_evaluation

# Answer extractions of lm-evaluation-harness, best first; the first that a task has is read.
FILTERS = ("custom-extract", "none", "strict-match", "flexible-extract")
# Words before a domain's name that name its benchmark.
BENCHMARK = re.compile(r"^(leaderboard )?(mmlu pro|mmlu|hendryckstest) ")
# Two evaluations are paired only if they share at least this part of their questions.
MIN_COMMON = 0.5


@dataclass(frozen=True)
class Outcome:
    """Measured change of one domain.

    before, after: accuracy (or another metric) of the model before and after training; None where only the change
                   is known
    change:        after - before, in the metric's own unit
    stderr:        standard error of the change; None where the evaluation does not give it
                   paired:   sd_q(correct_after[q] - correct_before[q]) / sqrt(n), ddof 1, over the n common questions
                   unpaired: sqrt(stderr_before^2 + stderr_after^2), too large where the two models agree on questions
    n:             number of questions; None where not given
    paired:        how stderr was computed; None where it was given, or is not known
    unparsed:      (before, after) share of the answers in which no choice could be read, which count as wrong;
                   None where not given
    """

    change: float
    before: float | None = None
    after: float | None = None
    stderr: float | None = None
    n: int | None = None
    unparsed: tuple[float, float] | None = None
    paired: bool | None = None
    metric: str = "given"


@dataclass(frozen=True)
class Outcomes:
    """Outcomes by the evaluation's names of the domains, and warnings about how they were read."""

    domains: dict[str, Outcome]
    warnings: list[str] = field(default_factory=list)


def read_outcomes(before: str | Path, after: str | Path | None = None, *, metric: str | None = None) -> Outcomes:
    """Reads the measured change of every domain from two evaluations, or from one table of changes.

    before, after: of the model before and after training, each a file or a folder:
        lm-evaluation-harness   results_*.json of any version (the newest in a folder); with the samples_*.jsonl of
                                --log_samples beside it, the change is paired by question
        MMLU-Pro's own scripts  their JSON per question, one file or a folder of them: answers are read again with the
                                first match of `answer is \\(?([A-J])\\)?`, and paired; or their summaries
        CSV                     columns domain, accuracy, and if known stderr and n
      With `after` left out, `before` is a CSV with the columns domain, before, after or domain, change, and if known
      stderr (of the change) and n; or the training.json that TransferMonitor wrote: the exposures at its end.
    metric: such as 'acc', 'exact_match,strict-match'; by default the first accuracy that each task has

    Raises InputError, in one sentence, for files that cannot be read or do not belong together.
    """
    before = Path(before)
    if after is None or (Path(after) == before and table.recognises(before)):
        return _read_changes(before)
    evaluations = read_evaluation(before), read_evaluation(Path(after))
    warnings = [warning for evaluation in evaluations for warning in evaluation.warnings]
    names = _common_names(evaluations, before, Path(after))
    chosen = {
        (name, other): _choose_metric(evaluations[0].metrics[name], evaluations[1].metrics[other], metric)
        for name, other in names
    }
    if not any(chosen.values()):
        known = sorted({key for name, _ in names for key in evaluations[0].metrics[name]})
        wanted = f"the metric {metric}" if metric else f"an accuracy ({', '.join(METRICS)})"
        raise InputError(f"{before} and {after} share no domain with {wanted}: name one of {', '.join(known)}")
    outcomes = {
        name: _change_of(name, evaluations[0].metrics[name][key], evaluations[1].metrics[other][key], warnings)
        for (name, other), key in chosen.items()
        if key is not None
    }
    return Outcomes(outcomes, warnings)


def match_domains(wanted: Sequence[str], known: Iterable[str]) -> dict[str, str]:
    """The outcome of each domain of the forecast: wanted name -> known name, without domains that have none.

    Names match if they are the same in lower case, with everything except letters and digits read as a space. Where no
    name matches, the benchmark's name in front is dropped (mmlu_pro_law, hendrycksTest-law and law).

    Raises InputError where two outcomes fit one domain, or two domains one outcome.
    """
    known = list(known)
    matches: dict[str, str] = {}
    for name in wanted:
        fitting = [other for other in known if _plain(other) == _plain(name)]
        fitting = fitting or [other for other in known if _short(other) == _short(name)]
        if len(fitting) > 1:
            raise InputError(f"the domain '{name}' could be {' or '.join(fitting)}: give it the name of one of them")
        if fitting:
            taken = next((other for other, outcome in matches.items() if outcome == fitting[0]), None)
            if taken is not None:
                raise InputError(f"the domains '{taken}' and '{name}' both match outcome '{fitting[0]}': rename one")
            matches[name] = fitting[0]
    return matches


def cautions(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Warnings about these outcomes, one sentence each."""
    unpaired = [name for name, outcome in outcomes.items() if outcome.paired is False]
    if unpaired:
        yield (
            f"unpaired standard errors, sqrt(before^2 + after^2), for {listed(unpaired)}: results per question "
            "(--log_samples) give smaller ones"
        )
    if unknown := [name for name, outcome in outcomes.items() if outcome.stderr is None]:
        yield f"no standard error for {listed(unknown)}: the noise of the evaluation is not known"
    metrics = sorted({outcome.metric for outcome in outcomes.values()})
    if len(metrics) > 1:
        yield f"domains are measured by different metrics ({', '.join(metrics)}): choose one with --metric"
    shares = {name: max(outcome.unparsed) for name, outcome in outcomes.items() if outcome.unparsed}
    if shares and max(shares.values()) > 0:
        worst = max(shares, key=lambda name: shares[name])
        pairs = [outcome.unparsed for outcome in outcomes.values() if outcome.unparsed]
        first, second = (float(np.mean(column)) for column in zip(*pairs, strict=True))
        yield (
            f"no choice could be read in {first:.1%} of answers before and {second:.1%} after on average, "
            f"counted as wrong, most in {worst} ({shares[worst]:.1%}): part of the change may only be one of format"
        )


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.lower()))


def _short(name: str) -> str:
    return BENCHMARK.sub("", _plain(name))


# ---- two evaluations


def _common_names(evaluations: tuple[Evaluation, Evaluation], before: Path, after: Path) -> list[tuple[str, str]]:
    first, second = (evaluation.metrics for evaluation in evaluations)
    others = {_plain(name): name for name in second}
    names = [(name, others[_plain(name)]) for name in first if _plain(name) in others]
    if not names:
        raise InputError(
            f"{before} and {after} have no domain in common: one has {listed(first)}, the other {listed(second)}"
        )
    return names


def _choose_metric(before: dict[str, Task], after: dict[str, Task], metric: str | None) -> str | None:
    """The metric, as 'name,filter', that both tasks have: the given one, or the best known accuracy."""
    common = [key for key in before if key in after]

    def rank(key: str) -> tuple[int, int]:
        name, _, extraction = key.partition(",")
        return (
            METRICS.index(name) if name in METRICS else len(METRICS),
            FILTERS.index(extraction) if extraction in FILTERS else len(FILTERS),
        )

    if metric is None:
        common = [key for key in common if key.partition(",")[0] in METRICS]
    else:
        common = [key for key in common if metric in (key, key.partition(",")[0])]
    return min(common, key=rank, default=None)


def _change_of(name: str, before: Task, after: Task, warnings: list[str]) -> Outcome:
    unparsed = None
    if before.unparsed is not None and after.unparsed is not None:
        unparsed = before.unparsed, after.unparsed
    if before.correct and after.correct:
        common = [q for q in before.correct if q in after.correct and before.key.get(q) == after.key.get(q)]
        most = max(len(before.correct), len(after.correct))
        if len(common) < max(2, MIN_COMMON * most):
            raise InputError(
                f"the questions of '{name}' do not pair: only {len(common)} of {most} are the same before and after; "
                "evaluate both models on the same questions, or give results without samples"
            )
        if len(common) < most:
            warnings.append(
                f"{name}: {most - len(common)} of {most} questions differ between the two and were left out"
            )
        first = np.asarray([before.correct[q] for q in common])
        second = np.asarray([after.correct[q] for q in common])
        stderr = float(np.std(second - first, ddof=1) / math.sqrt(len(common)))
        value_before, value_after = float(first.mean()), float(second.mean())
        return Outcome(
            value_after - value_before, value_before, value_after, stderr, len(common), unparsed, True, before.metric
        )
    stderrs = None if before.stderr is None or after.stderr is None else math.hypot(before.stderr, after.stderr)
    n = before.n if before.n == after.n else None
    paired = None if stderrs is None else False
    return Outcome(after.value - before.value, before.value, after.value, stderrs, n, unparsed, paired, before.metric)


def _read_changes(path: Path) -> Outcomes:
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    if path.name == TRAINING_FILE:
        return _read_exposures(path)
    if not table.recognises(path):
        raise InputError(f"{path} alone contains no change: give the evaluations before and after, or a CSV with both")
    outcomes = {}
    for line, name, numbers in table.read_table(path):
        before, after = numbers.get("before"), numbers.get("after")
        change = numbers.get("change")
        if change is None and before is not None and after is not None:
            change = after - before
        if change is None:
            raise InputError(f"{path}, line {line}: '{name}' has neither a change nor values before and after")
        if before is not None and after is not None and abs(after - before - change) > 1e-3 * max(1.0, abs(change)):
            raise InputError(f"{path}, line {line}: the change of '{name}' is not after - before")
        n = numbers.get("n")
        outcomes[name] = Outcome(change, before, after, numbers.get("stderr"), None if n is None else int(n))
    return Outcomes(outcomes)


def _read_exposures(path: Path) -> Outcomes:
    document = read_json(path)
    history = document.get("history") if isinstance(document, dict) else None
    last = history[-1] if isinstance(history, list) and history else None
    exposures = last.get("exposure") if isinstance(last, dict) else None
    if not isinstance(exposures, dict) or any(finite(value) is None for value in exposures.values()):
        raise InputError(f"{path} contains no measurement of TransferMonitor: train again, or give evaluations")
    outcomes = {name: Outcome(float(value)) for name, value in exposures.items()}
    return Outcomes(outcomes, [f"{path} contains the movement of features in training, not changes of accuracy"])
