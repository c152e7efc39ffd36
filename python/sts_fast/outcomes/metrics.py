"""Metrics of evaluations: which count as accuracy, their scale, and which fall where a model gets better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from sts_fast.errors import InputError, listed
from sts_fast.outcomes.evaluation import Result, Task

# Metrics that count as accuracy, best first; others are read only where they are named.
METRICS = (
    "accuracy", "acc", "exact_match", "pass@1", "pass_at_1", "acc_norm", "prompt_level_strict_acc",
    "ifeval_strict_accuracy", "extractive_match", "math_equiv_chain_of_thought", "math_equiv",
    "final_number_exact_match", "quasi_exact_match", "em", "qem", "pem", "math_verify", "prompt_level_loose_acc",
    "f1", "f1_score", "weighted_average", "naive_average",
)  # fmt: skip
# Other names of pass@1: of lighteval (pass@k:k=1&n=1, pass@1:1_samples), of OpenCompass (humaneval_pass@1).
PASS_AT_1 = re.compile(r"^(\w+_)?pass@(1|k:k=1)(:\w+|&[\w=&]+)?$")
# Answer extractions of lm-evaluation-harness, best first; the first that a task has is read.
FILTERS = ("custom-extract", "none", "strict-match", "flexible-extract")
# Metrics of one and the same answers: one wants a form, the other forgives it.
FORGIVING = {
    "exact_match,strict-match": ("exact_match,flexible-extract",),
    "exact_match,none": ("math_verify,none", "exact_match,flexible-extract"),
    "prompt_level_strict_acc,none": ("prompt_level_loose_acc,none",),
    "em": ("qem", "pem"),
    "exact_match": ("quasi_exact_match",),
}
# Two extractions part where their changes differ by more than this, and by more than their noise.
PARTED = 0.05
LOWER_IS_BETTER = re.compile(
    r"perplexity|^ppl|bits_per_byte|bpb$|(^|_)loss|^nll|brier|^[wct]er$|toxicity|(^|_)error|_bias$|bias_score|^ece$"
    r"|edit_distance|stereotype|pct_invalid|hallucinat"
)
# The largest standard error of a share.
LARGEST_STDERR = 0.5
# A standard error that only more questions than this could give is not on the scale of its value.
MOST_QUESTIONS = 1e6


def is_accuracy(metric: str) -> bool:
    """True for a share of right answers, or a number like it, with or without ',extraction'."""
    return _rank(metric.partition(",")[0]) < len(METRICS)


def unit_of(metric: str) -> str:
    """'accuracy', in shares of 1, for all kinds of it; else the metric's name, without ',extraction'."""
    return "accuracy" if is_accuracy(metric) else metric.partition(",")[0]


def _rank(name: str) -> int:
    """Place in METRICS, or behind them."""
    name = "pass@1" if PASS_AT_1.match(name) else name
    return METRICS.index(name) if name in METRICS else len(METRICS)


def lower_is_better(result: Result) -> bool:
    if result.higher_is_better is not None:
        return not result.higher_is_better
    return LOWER_IS_BETTER.search(result.metric.partition(",")[0].lower()) is not None


def choose_metric(before: Task, after: Task, wanted: str | None) -> str | None:
    """The metric, as 'name,extraction', that both tasks have: the wanted one, or the best known accuracy."""
    common = [key for key in before.results if key in after.results]

    def rank(key: str) -> tuple[int, int]:
        name, _, extraction = key.partition(",")
        return _rank(name), FILTERS.index(extraction) if extraction in FILTERS else len(FILTERS)

    if wanted is None:
        common = [key for key in common if is_accuracy(key)]
    else:
        common = [key for key in common if wanted in (key, key.partition(",")[0])]
    return min(common, key=rank, default=None)


def forgiving_metric(before: Task, after: Task, metric: str) -> str | None:
    """A metric that reads the same answers and forgives their form, if both tasks have one."""
    return next((key for key in FORGIVING.get(metric, ()) if key in before.results and key in after.results), None)


# ---- which metric was asked for


class Wanted:
    """Metrics that were asked for: METRIC for every task, or TASK=METRIC.

    texts:   as they were typed
    offered: the metrics of every task
    find:    from a name that was typed to the task; None where there is none, or several

    Raises InputError for a task or a task's metric that is not there, and for two metrics of the same.
    """

    def __init__(
        self, texts: tuple[str, ...], offered: Mapping[str, list[str]], find: Callable[[str], str | None]
    ) -> None:
        self.of_task: dict[str, str] = {}
        self.of_all: str | None = None
        everywhere = {key for metrics in offered.values() for key in metrics}
        everywhere |= {key.partition(",")[0] for key in everywhere}
        for text in texts:
            name, equals, metric = text.partition("=")
            if not equals or text in everywhere:  # names such as pass@k:k=1 contain the sign
                if self.of_all is not None:
                    raise InputError(
                        f"--metric {self.of_all} and --metric {text} are both for all tasks: give one, or TASK=METRIC"
                    )
                self.of_all = text
                continue
            task = find(name)
            if task is None:
                raise InputError(
                    f"--metric {text}: there is no task '{name}' in both evaluations, only {listed(offered)}"
                )
            if task in self.of_task:
                raise InputError(f"--metric is given twice for '{name}': give it once")
            if metric not in {form for key in offered[task] for form in (key, key.partition(",")[0])}:
                raise InputError(f"--metric {text}: '{name}' has no {metric}, only {listed(offered[task])}")
            self.of_task[task] = metric

    def __getitem__(self, task: str) -> str | None:
        return self.of_task.get(task, self.of_all)


# ---- scale


def on_one_scale(before: Result, after: Result) -> tuple[Result, Result] | None:
    """Two accuracies as shares of 1, with percentages divided by 100; None where their scale is not certain.

    A number above 1 is a percentage. Where the format does not say, a share beside a percentage may be one of both.
    """
    shares = _share_of(before), _share_of(after)
    unsaid = before.percent is None and after.percent is None
    low, high = sorted((before.value, after.value))
    if shares[0] is None or shares[1] is None or (unsaid and 0 < low <= 1 < high):
        return None
    return shares[0], shares[1]


def _share_of(result: Result) -> Result | None:
    if not 0 <= result.value <= 100 or (result.percent is False and result.value > 1):
        return None
    percent = result.value > 1 if result.percent is None else result.percent
    if not percent:
        return result
    return replace(
        result,
        value=result.value / 100,
        stderr=None if result.stderr is None else result.stderr / 100,
        correct={question: value / 100 for question, value in result.correct.items()},
        percent=False,
    )


def with_plausible_stderr(share: Result) -> Result:
    """With a standard error in percent divided by 100, and without one that fits neither scale."""
    stderr = share.stderr
    if stderr is None or stderr == 0:
        return share
    if stderr > LARGEST_STDERR:
        stderr = stderr / 100 if stderr <= 100 * LARGEST_STDERR else None
    elif share.value * (1 - share.value) / stderr**2 > MOST_QUESTIONS:
        stderr = None
    return share if stderr == share.stderr else replace(share, stderr=stderr)
