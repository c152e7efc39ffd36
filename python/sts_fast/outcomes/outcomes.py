"""Reads how much each domain really changed: evaluation results before and after training."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.forecast.run import TRAINING_FILE

# What counts as accuracy, best first; other metrics are read when asked for by name.
METRICS = ("accuracy", "acc", "exact_match", "pass@1", "acc_norm", "f1")
# Which answer extraction of lm-evaluation-harness is read where a task has several, best first.
FILTERS = ("custom-extract", "none", "strict-match", "flexible-extract")
# Words in front of a domain's name that say which benchmark it belongs to.
BENCHMARK = re.compile(r"^(leaderboard )?(mmlu pro|mmlu|hendryckstest) ")
# The time in the name of a results file of lm-evaluation-harness, which its samples files repeat.
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?")
# MMLU-Pro's first and strictest pattern (compute_accuracy.py, level l1); what it does not find counts as wrong.
ANSWER = re.compile(r"answer is \(?([A-J])\)?")
SUMMARY_LINE = re.compile(r"^Average accuracy (\S+) - (.+)$", re.MULTILINE)
NAME_COLUMNS = ("domain", "task", "category", "subject", "name")
ACCURACY_COLUMNS = ("accuracy", "acc", "value")
# Two evaluations are paired only if at least this share of their questions is the same.
MIN_COMMON = 0.5
MEAN_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """What one domain really did.

    before, after: accuracy (or another metric) of the model before and after training; None where only the change
                   is known
    change:        after - before, in the metric's own unit
    stderr:        standard error of the change; None where the evaluation does not tell
                   paired:   sd_q(correct_after[q] - correct_before[q]) / sqrt(n), ddof 1, over the n common questions
                   unpaired: sqrt(stderr_before^2 + stderr_after^2), too large where the two models agree on questions
    n:             questions behind it, None where not said
    paired:        how stderr was computed; None where it was given, or is not known
    unparsed:      (before, after) share of the answers in which no choice could be read, None where not said;
                   they count as wrong
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
    """Outcomes by the names that the evaluation gives its domains, and what to know about how they were read."""

    domains: dict[str, Outcome]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Task:
    """One task of one evaluation. correct: question -> 1.0 or 0.0; key: question -> its right answer or a hash."""

    value: float
    metric: str
    stderr: float | None = None
    n: int | None = None
    correct: Mapping[str, float] = field(default_factory=dict)
    key: Mapping[str, str] = field(default_factory=dict)
    unparsed: float | None = None


@dataclass
class _Evaluation:
    """One evaluation of one model. metrics: task -> metric -> its result."""

    metrics: dict[str, dict[str, _Task]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_outcomes(before: str | Path, after: str | Path | None = None, *, metric: str | None = None) -> Outcomes:
    """Reads the measured change of every domain from two evaluations, or from one table that holds the change.

    before, after: of the model before and after training, each a file or a folder:
        lm-evaluation-harness   results_*.json of any version (the newest in a folder); with the samples_*.jsonl of
                                --log_samples beside it, the change is paired by question
        MMLU-Pro's own scripts  their JSON per question, one file or a folder of them: answers are read again with the
                                first match of `answer is \\(?([A-J])\\)?`, and paired; or their summaries
        CSV                     columns domain, accuracy, and if known stderr and n
      With `after` left out, `before` is a CSV with the columns domain, before, after or domain, change, and if known
      stderr (of the change) and n; or the training.json that TransferMonitor wrote: the exposures at its end.
    metric: such as 'acc', 'exact_match,strict-match'; by default what counts as accuracy in each task

    Raises InputError, in one sentence, for what cannot be read or does not belong together.
    """
    before = Path(before)
    if after is None or (Path(after) == before and _is_table(before)):
        return _read_changes(before)
    evaluations = _read_evaluation(before), _read_evaluation(Path(after))
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
    """Which outcome belongs to which domain of the forecast: wanted name -> known name, without those not found.

    Names are the same if they are so in lower case, with anything but letters and digits read as a space; and, where
    none is, without the benchmark's name in front (mmlu_pro_law, hendrycksTest-law and law).

    Raises InputError where two outcomes fit one domain, or two domains one outcome.
    """
    known = list(known)
    found: dict[str, str] = {}
    for name in wanted:
        fitting = [other for other in known if _plain(other) == _plain(name)]
        fitting = fitting or [other for other in known if _short(other) == _short(name)]
        if len(fitting) > 1:
            raise InputError(f"the domain '{name}' could be {' or '.join(fitting)}: name the domain as one of them")
        if fitting:
            taken = next((other for other, outcome in found.items() if outcome == fitting[0]), None)
            if taken is not None:
                raise InputError(f"the domains '{taken}' and '{name}' are both called '{fitting[0]}' in the outcomes")
            found[name] = fitting[0]
    return found


def cautions(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """What a reader should know about these outcomes, one sentence each."""
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
            f"counted as wrong, most in {worst} ({shares[worst]:.1%}): part of the change may be one of format"
        )


def listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.lower()))


def _short(name: str) -> str:
    return BENCHMARK.sub("", _plain(name))


# ---- putting two evaluations together


def _common_names(evaluations: tuple[_Evaluation, _Evaluation], before: Path, after: Path) -> list[tuple[str, str]]:
    first, second = (evaluation.metrics for evaluation in evaluations)
    others = {_plain(name): name for name in second}
    names = [(name, others[_plain(name)]) for name in first if _plain(name) in others]
    if not names:
        raise InputError(
            f"{before} and {after} have no domain in common: the one holds {listed(first)}, the other {listed(second)}"
        )
    return names


def _choose_metric(before: dict[str, _Task], after: dict[str, _Task], asked: str | None) -> str | None:
    """The metric, as 'name,filter', that both tasks have: the one asked for, or the best known accuracy."""
    common = [key for key in before if key in after]

    def rank(key: str) -> tuple[int, int]:
        name, _, extraction = key.partition(",")
        return (
            METRICS.index(name) if name in METRICS else len(METRICS),
            FILTERS.index(extraction) if extraction in FILTERS else len(FILTERS),
        )

    if asked is None:
        common = [key for key in common if key.partition(",")[0] in METRICS]
    else:
        common = [key for key in common if asked in (key, key.partition(",")[0])]
    return min(common, key=rank, default=None)


def _change_of(name: str, before: _Task, after: _Task, warnings: list[str]) -> Outcome:
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


# ---- one evaluation


def _read_evaluation(path: Path) -> _Evaluation:
    if path.is_dir():
        return _read_folder(path)
    if _is_table(path):
        return _read_accuracies(path)
    if path.suffix.lower() == ".txt":
        return _read_mmlu_pro_text(path)
    return _read_document(path, _read_json(path))


def _read_folder(folder: Path) -> _Evaluation:
    results = sorted(folder.glob("results*.json"))
    if not results:
        inside = sorted({path.parent for path in folder.glob("*/results*.json")})
        if len(inside) > 1:
            names = listed(path.name for path in inside)
            raise InputError(f"{folder} holds results of several models ({names}): give the folder of one")
        results = sorted(inside[0].glob("results*.json")) if inside else []
    if results:
        newest = max(results, key=lambda path: (_time_of(path), path.name))
        evaluation = _read_document(newest, _read_json(newest))
        if len(results) > 1:
            evaluation.warnings.append(f"{newest} is the newest of {len(results)} results; the others are not read")
        return evaluation
    documents = sorted(path for path in folder.glob("*.json") if not path.name.endswith("summary.json"))
    if len(documents) == 1:
        return _read_document(documents[0], _read_json(documents[0]))
    if documents:
        rows = []
        for path in documents:
            document = _read_json(path)
            if not _is_mmlu_pro_rows(document):
                raise InputError(
                    f"{path} is neither a results file of lm-evaluation-harness nor answers of MMLU-Pro: give the "
                    "results file itself"
                )
            rows += document
        return _read_mmlu_pro_rows(folder, rows)
    summaries = sorted(folder.glob("*summary.json"))
    if not summaries:
        raise InputError(f"{folder} holds no results: expected results_*.json, or MMLU-Pro's JSON per question")
    merged = _Evaluation()
    for path in summaries:
        evaluation = _read_document(path, _read_json(path))
        merged.metrics |= evaluation.metrics
        merged.warnings = evaluation.warnings
    return merged


def _time_of(path: Path) -> str:
    found = TIME.search(path.name)
    return found[0] if found else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"there is no file or folder {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable JSON: {error}") from error


def _read_document(path: Path, document: Any) -> _Evaluation:
    if isinstance(document, dict) and isinstance(document.get("results"), dict):
        return _read_lm_eval(path, document)
    if _is_mmlu_pro_rows(document):
        return _read_mmlu_pro_rows(path, document)
    if isinstance(document, dict) and any(isinstance(entry, dict) and "corr" in entry for entry in document.values()):
        return _read_mmlu_pro_summary(path, document)
    raise InputError(
        f"{path} holds no results that sts-fast knows: expected those of lm-evaluation-harness, MMLU-Pro's, or a CSV"
    )


def _number(value: Any) -> float | None:
    """A finite number, or None for 'N/A', NaN, text and the like."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


# ---- lm-evaluation-harness


def _read_lm_eval(path: Path, document: dict[str, Any]) -> _Evaluation:
    """Results of versions 0.2 ('acc'), 0.4.0 to 0.4.5 ('acc,none', alias ' - law') and later (alias 'law')."""
    entries = {name: entry for name, entry in document["results"].items() if isinstance(entry, dict)}
    counts: Any = document.get("n-samples")
    counts = counts if isinstance(counts, dict) else {}
    evaluation = _Evaluation()
    incomplete: list[str] = []
    for name, alias in _aliases(entries).items():
        entry, tasks = entries[name], {}
        samples = list(_read_samples(path, name))
        count = counts.get(name)
        n = _number(count.get("effective")) if isinstance(count, dict) else _number(entry.get("sample_len"))
        for key, value in entry.items():
            metric, _, extraction = key.partition(",")
            if key in ("alias", "name", "sample_len", "sample_count") or metric.endswith("_stderr"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            stderr = _number(entry.get(f"{metric}_stderr,{extraction}" if extraction else f"{metric}_stderr"))
            task = _Task(float(value), f"{metric},{extraction or 'none'}", stderr, None if n is None else int(n))
            tasks[task.metric] = _with_samples(task, samples, metric, extraction)
            if samples and metric in METRICS and not tasks[task.metric].correct:
                incomplete.append(f"{name} ({len(samples)} of {task.n or 'unknown'})")
        if tasks:
            evaluation.metrics[alias] = tasks
    if not evaluation.metrics:
        raise InputError(f"{path} holds no metric of any task")
    if incomplete:
        evaluation.warnings.append(
            f"{path}: the samples are not those that the results were computed from, and are not used: "
            f"{listed(dict.fromkeys(incomplete))}"
        )
    return evaluation


def _aliases(entries: dict[str, Any]) -> dict[str, str]:
    """Task -> the name it is shown by, or its own name where two tasks are shown by the same."""
    shown = {name: str(entry.get("alias") or name).strip(" -") or name for name, entry in entries.items()}
    taken = list(shown.values())
    return {name: alias if taken.count(alias) == 1 else name for name, alias in shown.items()}


def _read_samples(results: Path, task: str) -> Iterator[dict[str, Any]]:
    path = results.with_name(f"samples_{task}_{_time_of(results)}.jsonl")
    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    sample = json.loads(line)
                    if not isinstance(sample, dict) or "doc_id" not in sample:
                        raise InputError(f"{path}, line {number}: not a sample of lm-evaluation-harness")
                    # The prompts are most of the file, and nobody reads them here.
                    yield {key: sample[key] for key in sample if key not in ("doc", "arguments", "resps")}
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable JSON lines: {error}") from error


def _with_samples(task: _Task, samples: list[dict[str, Any]], metric: str, extraction: str) -> _Task:
    """The task with its answers question by question, if these are all of them and average to its value."""
    samples = [sample for sample in samples if sample.get("filter", extraction or "none") == (extraction or "none")]
    correct = {}
    for sample in samples:
        value = sample.get(metric)
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            correct[str(sample["doc_id"])] = float(value)
    whole = len(correct) == len(samples) > 0 and task.n in (None, len(correct))
    if not whole or abs(sum(correct.values()) / len(correct) - task.value) > MEAN_TOLERANCE:
        return task
    responses = [sample.get("filtered_resps") for sample in samples]
    invalid = [response in (["[invalid]"], "[invalid]") for response in responses]
    return replace(
        task,
        n=len(correct),
        correct=correct,
        key={str(sample["doc_id"]): str(sample.get("doc_hash", "")) for sample in samples},
        unparsed=sum(invalid) / len(invalid) if metric == "exact_match" else None,
    )


# ---- MMLU-Pro's own scripts


def _is_mmlu_pro_rows(document: Any) -> bool:
    return (
        isinstance(document, list)
        and len(document) > 0
        and all(isinstance(row, dict) and {"question_id", "answer", "category"} <= set(row) for row in document)
    )


def _read_mmlu_pro_rows(path: Path, rows: list[dict[str, Any]]) -> _Evaluation:
    """Answers per question. The scripts themselves guess where no answer can be read; here that is wrong."""
    correct: dict[str, dict[str, float]] = {}
    key: dict[str, dict[str, str]] = {}
    unparsed: dict[str, int] = {}
    for row in rows:
        category, question = str(row["category"]), str(row["question_id"])
        text = row.get("model_outputs", row.get("generated_text"))
        if isinstance(text, list):
            text = text[0] if text else None
        if "model_outputs" not in row and "generated_text" not in row:
            raise InputError(f"{path}: question {question} has neither model_outputs nor generated_text to read again")
        found = ANSWER.search(text) if isinstance(text, str) else None
        if question in correct.setdefault(category, {}):
            raise InputError(f"{path} holds question {question} twice: give one evaluation")
        correct[category][question] = float(found is not None and found[1] == row["answer"])
        key.setdefault(category, {})[question] = f"{row['answer']} {row.get('question', '')}"
        unparsed[category] = unparsed.get(category, 0) + (found is None)
    evaluation = _Evaluation()
    for category, answers in correct.items():
        n, value = len(answers), sum(answers.values()) / len(answers)
        task = _Task(value, "accuracy", _stderr(value, n), n, answers, key[category], unparsed[category] / n)
        evaluation.metrics[category] = {"accuracy": task}
    return evaluation


def _read_mmlu_pro_summary(path: Path, document: dict[str, Any]) -> _Evaluation:
    evaluation = _Evaluation(warnings=[_guessed(path)])
    for name, entry in document.items():
        right, wrong = (_number(entry.get(k)) if isinstance(entry, dict) else None for k in ("corr", "wrong"))
        if right is None or wrong is None or right < 0 or wrong < 0 or right + wrong == 0:
            raise InputError(f"{path}: {name} does not say how many answers are right and wrong")
        if name != "total":
            n = round(right + wrong)
            evaluation.metrics[name] = {"accuracy": _Task(right / n, "accuracy", _stderr(right / n, n), n)}
    return evaluation


def _read_mmlu_pro_text(path: Path) -> _Evaluation:
    evaluation = _Evaluation(warnings=[_guessed(path)])
    for value, name in SUMMARY_LINE.findall(_read_text(path)):
        try:
            accuracy = _number(float(value))
        except ValueError:
            accuracy = None
        if accuracy is None:
            raise InputError(f"{path}: the accuracy of {name} is '{value}', not a number")
        evaluation.metrics[name.strip()] = {"accuracy": _Task(accuracy, "accuracy")}
    if not evaluation.metrics:
        raise InputError(f"{path} has no line 'Average accuracy 0.1234 - domain' of an MMLU-Pro summary")
    return evaluation


def _guessed(path: Path) -> str:
    return (
        f"{path} is a summary, in which MMLU-Pro's scripts count a random guess where they cannot read an answer: "
        "give their JSON per question"
    )


def _stderr(share: float, n: int) -> float | None:
    """sd / sqrt(n) of n zeros and ones, with ddof 1 as in lm-evaluation-harness."""
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None


# ---- tables


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv")


def _read_table(path: Path) -> list[tuple[int, str, dict[str, float]]]:
    """(line, domain, numbers by column) of a CSV or TSV with a header; empty cells are left out."""
    lines = _read_text(path).splitlines()
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise InputError(f"{path} is not a readable table: {error}") from error
    header = [cell.lower() for cell in cells[0][1]] if cells else []
    column = next((header.index(name) for name in NAME_COLUMNS if name in header), None)
    if column is None:
        raise InputError(f"{path} has no column 'domain' in its first line")
    table: list[tuple[int, str, dict[str, float]]] = []
    known = {"before", "after", "change", "stderr", "n", *ACCURACY_COLUMNS}
    for line, row in cells[1:]:
        numbers = {}
        for name, cell in zip(header, row, strict=False):
            if name in known and cell:
                numbers[name] = _cell(path, line, name, cell)
        if len(row) <= column or not row[column]:
            raise InputError(f"{path}, line {line}: no domain")
        if any(row[column] == other for _, other, _ in table):
            raise InputError(f"{path}, line {line}: the domain '{row[column]}' comes twice")
        if numbers.get("stderr", 0.0) < 0:
            raise InputError(f"{path}, line {line}: the standard error is negative")
        table.append((line, row[column], numbers))
    if not table:
        raise InputError(f"{path} has no rows")
    return table


def _cell(path: Path, line: int, name: str, cell: str) -> float:
    try:
        number = _number(float(cell))
    except ValueError:
        number = None
    if number is None:
        raise InputError(f"{path}, line {line}: {name} is '{cell}', not a number")
    return number


def _read_changes(path: Path) -> Outcomes:
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    if path.name == TRAINING_FILE:
        return _read_exposures(path)
    if not _is_table(path):
        raise InputError(f"{path} alone tells no change: give the evaluations before and after, or a CSV with both")
    outcomes = {}
    for line, name, numbers in _read_table(path):
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
    document = _read_json(path)
    history = document.get("history") if isinstance(document, dict) else None
    last = history[-1] if isinstance(history, list) and history else None
    exposures = last.get("exposure") if isinstance(last, dict) else None
    if not isinstance(exposures, dict) or any(_number(value) is None for value in exposures.values()):
        raise InputError(f"{path} holds no measurement of TransferMonitor: train again, or give evaluations")
    outcomes = {name: Outcome(float(value)) for name, value in exposures.items()}
    return Outcomes(outcomes, [f"{path} holds how far features moved in training, not changes of accuracy"])


def _read_accuracies(path: Path) -> _Evaluation:
    evaluation = _Evaluation()
    for line, name, numbers in _read_table(path):
        value = next((numbers[column] for column in ACCURACY_COLUMNS if column in numbers), None)
        if value is None:
            raise InputError(f"{path}, line {line}: '{name}' has no accuracy; columns: domain,accuracy[,stderr][,n]")
        n = numbers.get("n")
        task = _Task(value, "accuracy", numbers.get("stderr"), None if n is None else int(n))
        evaluation.metrics[name] = {"accuracy": task}
    return evaluation
