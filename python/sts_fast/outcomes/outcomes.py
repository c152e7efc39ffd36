"""Reads the measured change of each domain from evaluation results before and after training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sts_fast.errors import InputError, listed
from sts_fast.forecast.run import TRAINING_FILE
from sts_fast.outcomes.differences import made_differently
from sts_fast.outcomes.evaluation import EvaluatedModel, Evaluation, Result, Task, finite, read_json
from sts_fast.outcomes.formats import opencompass, table
from sts_fast.outcomes.metrics import (
    METRICS,
    PARTED,
    Wanted,
    choose_metric,
    forgiving_metric,
    is_accuracy,
    lower_is_better,
    on_one_scale,
    unit_of,
    with_plausible_stderr,
)
from sts_fast.outcomes.names import find_task, forms_of
from sts_fast.outcomes.read import read_evaluation
from sts_fast.statistics import Z_95

# Two evaluations are paired only if they share at least this part of their questions.
MIN_COMMON = 0.5


@dataclass(frozen=True)
class Outcome:
    """Measured change of one domain.

    before, after: accuracy (or another metric) of the model before and after training; None where only the change
                   is known. Percentages of accuracies are read as shares of 1
    change:        after - before, in the metric's own unit; before - after where lower is better, so that a gain is
                   positive
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
    """Outcomes by the evaluation's names of the domains, and how they were read.

    warnings:   sentences about how they were read, mismatches among them
    mismatches: what differs between the evaluations before and after, beside the model
    own_names:  outcome -> the harness's own name of its task, where another one is shown
    members:    outcome -> the outcomes whose mean it is, for groups of tasks
    models:     the models that the evaluations before and after name
    """

    domains: dict[str, Outcome]
    warnings: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    own_names: dict[str, str] = field(default_factory=dict)
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    models: tuple[EvaluatedModel | None, EvaluatedModel | None] = (None, None)


def read_outcomes(
    before: str | Path, after: str | Path | None = None, *, metric: str | Sequence[str] | None = None
) -> Outcomes:
    """Reads the measured change of every domain from two evaluations, or from one table of changes.

    before, after: of the model before and after training, each a file or a folder, in and below which every task is
      read from the newest file that has it:
        lm-evaluation-harness   results_*.json of any version; with the samples_*.jsonl of --log_samples beside it, the
                                change is paired by question
        lighteval               results_*.json; paired by question with the details of --save-details
        inspect-ai              logs, .eval or .json; paired by question if they have samples
        HELM                    the folder of a suite or of a run; paired by question with per_instance_stats.json
        OpenCompass             summary_*.csv, .md or .txt; of several models, PATH:MODEL
        MMLU-Pro's own scripts  their JSON per question, one file or a folder of them: answers are read again with the
                                first match of `answer is \\(?([A-J])\\)?`, and paired; or their summaries
        CSV                     columns domain, accuracy, and if known stderr and n
      With `after` left out, `before` is a CSV with the columns domain, before, after or domain, change, and if known
      stderr (of the change) and n; or the training.json that TransferMonitor wrote: the exposures at its end.
    metric: such as 'acc', 'exact_match,strict-match', or 'TASK=METRIC' for one task, or several of these; by default
      the first accuracy that each task has

    Accuracies are read as shares of 1: percentages are divided by 100, and a warning says so where only the numbers
    tell that they are percentages.

    Raises InputError, in one sentence, for files that cannot be read or do not belong together.
    """
    before = Path(before)
    if after is None or (Path(after) == before and _is_table_of_changes(before)):
        return _read_changes(before)
    after = Path(after)
    evaluations = read_evaluation(before), read_evaluation(after)
    pairs = _common_tasks(evaluations, before, after)
    offered = {name: [key for key in of_first.results if key in second.results] for name, of_first, second in pairs}
    texts = (metric,) if isinstance(metric, str) else tuple(metric or ())
    tasks, own = {name: first for name, first, _ in pairs}, {name: f.own_name or name for name, f, _ in pairs}
    wanted = Wanted(texts, offered, lambda name: find_task(name, tasks, own))
    notes = _Notes(_wanted_text(texts))
    outcomes = {
        name: outcome
        for name, first, second in pairs
        if (outcome := _outcome_of(name, first, second, wanted[name], notes)) is not None
    }
    if not outcomes:
        raise InputError(f"{before} and {after} share no domain with {notes.wanted}: {notes.without_outcome()}")
    compared = [pair for pair in pairs if pair[0] in outcomes]
    mismatches = [*made_differently(compared), *notes.mismatches()]
    warnings = dict.fromkeys(warning for evaluation in evaluations for warning in evaluation.warnings)
    own_names = {name: first.own_name for name, first, _ in compared if first.own_name not in (None, name)}
    models = [evaluation.models[0] if evaluation.models else None for evaluation in evaluations]
    return Outcomes(
        outcomes,
        [*warnings, *notes.warnings(), *mismatches],
        mismatches,
        {name: own for name, own in own_names.items() if own is not None},
        _members(evaluations[0], outcomes),
        (models[0], models[1]),
    )


def without_groups(names: Mapping[str, str], outcomes: Outcomes) -> tuple[dict[str, str], dict[str, str]]:
    """The matches without groups of tasks that have a member among them; and by such a domain, why it is left out."""
    reasons: dict[str, str] = {}
    for domain, outcome in names.items():
        members = [other for other, of_other in names.items() if of_other in outcomes.members.get(outcome, ())]
        if members:
            what = f"a mean over {listed(members, 5)}, which would count twice"
            reasons[domain] = f"left out, because it is {what}: {domain}"
    return {domain: outcome for domain, outcome in names.items() if domain not in reasons}, reasons


def cautions(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Warnings about these outcomes, one sentence each."""

    def shown(names: list[str]) -> str:
        return "all domains" if len(names) == len(outcomes) else listed(names)

    unpaired = [name for name, outcome in outcomes.items() if outcome.paired is False]
    if unpaired:
        yield (
            f"unpaired standard errors, sqrt(before^2 + after^2), for {shown(unpaired)}: results per question "
            "(--log_samples) give smaller ones"
        )
    if unknown := [name for name, outcome in outcomes.items() if outcome.stderr is None]:
        yield f"no standard error for {shown(unknown)}: the noise of the evaluation is not known"
    units = {name: unit_of(outcome.metric) for name, outcome in outcomes.items()}
    if len({*units.values()}) > 1:
        others = listed(f"{name} ({unit})" for name, unit in units.items() if unit != "accuracy")
        yield (
            f"changes of {others} are no shares of right answers, and their sizes cannot be compared with those of "
            "other domains: choose metrics of one kind with --metric TASK=METRIC"
        )
    shares = {name: max(outcome.unparsed) for name, outcome in outcomes.items() if outcome.unparsed}
    if shares and max(shares.values()) > 0:
        worst = max(shares, key=lambda name: shares[name])
        pairs = [outcome.unparsed for outcome in outcomes.values() if outcome.unparsed]
        first, second = (float(np.mean(column)) for column in zip(*pairs, strict=True))
        yield (
            f"no choice could be read in {first:.1%} of answers before and {second:.1%} after on average, "
            f"counted as wrong, most in {worst} ({shares[worst]:.1%}): part of the change may only be one of format"
        )


def _is_table_of_changes(path: Path) -> bool:
    """True for a CSV or TSV with changes, or values before and after, instead of those of one model."""
    if not table.recognises(path) or opencompass.recognises(path):
        return False
    return any(
        column in numbers for _, _, numbers in table.read_table(path) for column in ("before", "after", "change")
    )


# ---- two evaluations


def _common_tasks(
    evaluations: tuple[Evaluation, Evaluation], before: Path, after: Path
) -> list[tuple[str, Task, Task]]:
    """(name before, task before, task after) of the tasks that both have."""
    first, second = (evaluation.tasks for evaluation in evaluations)
    own = {name: task.own_name for name, task in second.items() if task.own_name is not None}
    pairs = []
    taken: dict[str, str] = {}
    for name, task in first.items():
        matches = next(
            (found for text in sorted(forms_of(name, task)) if (found := find_task(text, second, own))), None
        )
        if matches is None:
            continue
        if matches in taken:
            raise InputError(
                f"'{taken[matches]}' and '{name}' in {before} both match '{matches}' in {after}: rename one of them"
            )
        taken[matches] = name
        pairs.append((name, task, second[matches]))
    if not pairs:
        raise InputError(
            f"{before} and {after} have no domain in common: one has {listed(first)}, the other {listed(second)}"
        )
    return pairs


def _members(evaluation: Evaluation, outcomes: Mapping[str, Outcome]) -> dict[str, tuple[str, ...]]:
    """Outcome -> the outcomes whose mean it is, over all levels of groups."""
    by_own_name = {task.own_name or name: name for name, task in evaluation.tasks.items()}

    def below(name: str, above: tuple[str, ...]) -> set[str]:
        task = evaluation.tasks.get(name)
        direct = {by_own_name.get(member, member) for member in task.members} if task is not None else set()
        direct -= {*above, name}
        return direct.union(*(below(member, (*above, name)) for member in direct))

    members = {name: tuple(sorted(below(name, ()) & {*outcomes})) for name in outcomes}
    return {name: of_group for name, of_group in members.items() if of_group}


@dataclass
class _Notes:
    """What is to be said about the reading of outcomes, mostly lists of domains.

    wanted: the metric
    parted: by what it says of two readings of the same answers: (domain, sentence) each
    """

    wanted: str
    divided: dict[str, list[str]] = field(default_factory=lambda: {"before": [], "after": []})
    unscaled: list[str] = field(default_factory=list)
    odd_stderr: list[str] = field(default_factory=list)
    falling: dict[str, list[str]] = field(default_factory=dict)
    without: dict[str, list[str]] = field(default_factory=dict)
    other_prompts: list[str] = field(default_factory=list)
    parted: dict[tuple[str, ...], list[tuple[str, str]]] = field(default_factory=dict)
    fewer_questions: list[str] = field(default_factory=list)

    def without_outcome(self) -> str:
        """The metrics of the domains that have none of those wanted, or a scale that is not certain."""
        known = sorted({metric for metrics in self.without.values() for metric in metrics})
        parts = [f"name one of {', '.join(known)}"] if known else []
        return "; ".join([*parts, *self._unscaled()])

    def _unscaled(self) -> Iterator[str]:
        if self.unscaled:
            yield (
                f"left out, because it is not certain which are percentages and which shares of 1: "
                f"{listed(self.unscaled)}"
            )

    def warnings(self) -> Iterator[str]:
        for (_, first), *others in self.parted.values():
            yield f"{first}; so in {listed((name for name, _ in others), 8)}" if others else first
        if self.fewer_questions:
            yield f"{listed(self.fewer_questions)} questions differ between the two and were left out"
        yield from self._unscaled()
        if self.without:
            shown = (f"{name} ({', '.join(metrics)})" for name, metrics in self.without.items())
            yield f"left out, without {self.wanted}: {listed(shown, 8)}; name one with --metric TASK=METRIC"
        for when, names in self.divided.items():
            if names:
                yield f"percentages {when} training were divided by 100: {listed(names)}"
        if self.odd_stderr:
            yield f"standard errors that do not fit the scale of their values: {listed(self.odd_stderr)}"
        for metric, names in self.falling.items():
            yield (
                f"lower is better for {metric}: the change is before - after, so that a gain is positive, in "
                f"{listed(names)}"
            )

    def mismatches(self) -> Iterator[str]:
        if self.other_prompts:
            yield (
                "the prompts before and after differ, so that the change is not paired by question: "
                f"{listed(self.other_prompts)}"
            )


def _wanted_text(texts: Sequence[str]) -> str:
    return f"the metric {' or '.join(texts)}" if texts else f"a known accuracy ({', '.join(METRICS[:6])}, ...)"


def _outcome_of(name: str, before: Task, after: Task, wanted: str | None, notes: _Notes) -> Outcome | None:
    """The change of one domain; None, and a note, where it cannot be told."""
    key = choose_metric(before, after, wanted)
    if key is None:
        common = [metric for metric in before.results if metric in after.results]
        alone = [f"{metric} before" for metric in before.results], [f"{metric} after" for metric in after.results]
        notes.without[name] = common or [*alone[0], *alone[1]]
        return None
    forgiving = forgiving_metric(before, after, key)
    if forgiving is not None:
        strict, free = (_unnoted(before.results[k], after.results[k]) for k in (key, forgiving))
        if strict is not None and free is not None and _part(strict, free):
            what, text = _parted_text(name, strict, free, chosen=wanted is not None)
            notes.parted.setdefault((key, forgiving, what), []).append((name, text))
            key = key if wanted is not None else forgiving
    return _change_of(name, before.results[key], after.results[key], notes)


def _unnoted(before: Result, after: Result) -> Outcome | None:
    return _change_of("", before, after, _Notes(""))


def _part(strict: Outcome, free: Outcome) -> bool:
    """True if two readings of the same answers changed differently, beyond their noise."""
    noise = Z_95 * math.hypot(strict.stderr or 0.0, free.stderr or 0.0)
    return abs(strict.change - free.change) > max(PARTED, noise)


def _parted_text(name: str, strict: Outcome, free: Outcome, *, chosen: bool) -> tuple[str, str]:
    """(what changed, the whole sentence)"""
    what = "what changed is the format of the answers, not the ability"
    if abs(free.change) > PARTED:
        what = "the format of the answers changed too, not the ability alone"
    text = (
        f"{name}: {strict.metric} went from {strict.before:.3g} to {strict.after:.3g}, but {free.metric}, which reads "
        f"the same answers in more formats, from {free.before:.3g} to {free.after:.3g}: {what}"
    )
    return what, text if chosen else f"{text}; the latter is compared (else give --metric '{name}={strict.metric}')"


def _change_of(name: str, before: Result, after: Result, notes: _Notes) -> Outcome | None:
    if is_accuracy(before.metric):
        scaled = on_one_scale(before, after)
        if scaled is None:
            notes.unscaled.append(f"{name} ({before.metric} {before.value:g} before, {after.value:g} after)")
            return None
        for when, result, share in zip(("before", "after"), (before, after), scaled, strict=True):
            if share is not result:
                notes.divided[when].append(name)
            if with_plausible_stderr(share).stderr != share.stderr:
                notes.odd_stderr.append(f"{name} ({share.value:g} ± {share.stderr:g})")
        before, after = (with_plausible_stderr(share) for share in scaled)
    sign = 1
    if lower_is_better(before):
        notes.falling.setdefault(before.metric.partition(",")[0], []).append(name)
        sign = -1
    unparsed = None
    if before.unparsed is not None and after.unparsed is not None:
        unparsed = before.unparsed, after.unparsed
    common = _common_questions(name, before, after, notes)
    if common:
        first = np.asarray([before.correct[q] for q in common])
        second = np.asarray([after.correct[q] for q in common])
        stderr = float(np.std(second - first, ddof=1) / math.sqrt(len(common)))
        values = float(first.mean()), float(second.mean())
        return Outcome(sign * (values[1] - values[0]), *values, stderr, len(common), unparsed, True, before.metric)
    stderrs = None if before.stderr is None or after.stderr is None else math.hypot(before.stderr, after.stderr)
    n = before.n if before.n == after.n else None
    paired = None if stderrs is None else False
    change = sign * (after.value - before.value)
    return Outcome(change, before.value, after.value, stderrs, n, unparsed, paired, before.metric)


def _common_questions(name: str, before: Result, after: Result, notes: _Notes) -> list[str]:
    """The questions by which a change is paired; none where an evaluation tells no answers, or the prompts differ."""
    if not before.correct or not after.correct:
        return []
    common = [q for q in before.correct if q in after.correct and before.key.get(q) == after.key.get(q)]
    most = max(len(before.correct), len(after.correct))
    if len(common) < max(2, MIN_COMMON * most):
        raise InputError(
            f"the questions of '{name}' do not pair: only {len(common)} of {most} are the same before and after; "
            "evaluate both models on the same questions, or give results without samples"
        )
    differ = [q for q in common if q in before.prompt and q in after.prompt and before.prompt[q] != after.prompt[q]]
    if differ:
        notes.other_prompts.append(f"{name} ({len(differ)} of {len(common)} questions)")
        return []
    if len(common) < most:
        notes.fewer_questions.append(f"{name}: {most - len(common)} of {most}")
    return common


# ---- one table


def _read_changes(path: Path) -> Outcomes:
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    if path.name == TRAINING_FILE:
        return _read_exposures(path)
    if not table.recognises(path) or opencompass.recognises(path):
        raise InputError(f"{path} alone contains no change: give the evaluations before and after, or a CSV with both")
    rows = table.read_table(path)
    levels = ("before", "after")
    table.check_scale(path, {f"{name} {when}": row[when] for _, name, row in rows for when in levels if when in row})
    outcomes = {}
    for line, name, numbers in rows:
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
