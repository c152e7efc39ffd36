"""Forecasts as tables in the terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.markup import escape

from sts_fast import files
from sts_fast.cli.calibration import change_bars, change_column, change_columns, change_title, changes_title, learned
from sts_fast.cli.console import Table, duration, note, out, say
from sts_fast.cli.domain_table import Column, print_domains
from sts_fast.data.columns import ReadColumns
from sts_fast.files import Document
from sts_fast.forecast.compare import sae_comparison
from sts_fast.forecast.cost import Outlook
from sts_fast.forecast.estimators import BY_NAME, IN_ORDER, SIZES, Estimator
from sts_fast.forecast.run import Forecast
from sts_fast.report.comparison import conclusion as comparison_conclusion
from sts_fast.report.features import MEASURES
from sts_fast.report.numbers import plain
from sts_fast.report.ranking import cautions, rankings
from sts_fast.report.report import conclusion
from sts_fast.report.signed import estimated
from sts_fast.rollouts.counts_text import counts_in_words, overlaps_in_words

# What planned sets are read for.
USES = {"shift": "D_N", "score": "scores", "answers": "answers", "trial": "trial"}


def print_conclusion(sentence: str) -> None:
    """The first line of a command's results."""
    out.print(sentence, "", sep="\n", highlight=False, markup=False)


def print_forecast(forecast: Forecast) -> None:
    """The conclusion, then one table of all domains, then what belongs to it."""
    scores = forecast.to_dict()
    print_conclusion(conclusion(scores))
    signed, change = estimated(scores), change_column(forecast)
    fields = [of.main.field for of in signed]
    fields += [name for name in SIZES if name in forecast.settings["estimators"]]
    fields += [of.other.field for of in signed]
    columns, lead = [_column(forecast, BY_NAME[name]) for name in fields], BY_NAME[fields[0]]
    title, bars, random = _title(lead), "both" if lead.signed else "one", None
    if change is not None:
        columns.insert(0, change)
        title, bars = change_title(forecast), change_bars(forecast)
    elif not lead.signed:
        random = {domain.name: domain.controls["random"][lead.name] for domain in forecast.domains}
    names = _highest_first(columns[0], [domain.name for domain in forecast.domains])
    print_domains(title, names, [[column] for column in columns], bars=bars, random=random)
    for line in _notes(forecast):
        out.print(line, highlight=False, markup=False)


def _column(forecast: Forecast, estimator: Estimator) -> Column:
    found = {domain.name: domain.scores.get(estimator.name) for domain in forecast.domains}
    return Column.of(estimator, {name: (of.value, of.ci) for name, of in found.items() if of is not None})


def _notes(forecast: Forecast) -> list[str]:
    counts = [domain.n_prompts for domain in forecast.domains]
    n_prompts = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    lines = [f"Prompts: {n_prompts} of each domain. {_shift_sentence(forecast)}"]
    if skipped := [f"{domain.n_skipped} of {domain.name}" for domain in forecast.domains if domain.n_skipped]:
        lines.append(f"Left out, too long for the context or without an answer: {', '.join(skipped)}.")
    lines += learned(forecast)
    if any(name in SIZES for name in forecast.settings["estimators"]):
        lines.append(
            "STS forecasts how much a domain moves, not in which direction. Compare the domains with each other and "
            "with random features."
        )
    return lines


def _shift_sentence(forecast: Forecast) -> str:
    shift, kept = forecast.shift, forecast.shift["stability"]
    low, high = kept["overlap_ci"]
    return (
        f"The top {forecast.settings['top_n']} features make up {shift['share_of_top_n']:.0%} of the "
        f"{_measure(forecast)}; resampling the {forecast.train['n_prompts']} training prompts keeps "
        f"{kept['mean_overlap']:.0%} of them ({low:.0%} to {high:.0%})."
    )


def _measure(forecast: Forecast) -> str:
    return MEASURES.get(forecast.settings["dims"], "shift")


def print_shift(forecast: Forecast, n_features: int) -> None:
    """The conclusion, then the first features of D_N."""
    print_conclusion(conclusion(forecast.to_dict()))
    measure = _measure(forecast)
    most = "Most shifted" if measure == "shift" else "Most active"
    table = Table(title=f"{most} of {forecast.sae['d_sae']:,} features", title_justify="left")
    table.add_column("feature", justify="right")
    table.add_column(f"share of {measure}", justify="right")
    table.add_column("mean activation", justify="right")
    for feature in forecast.shifted_features[:n_features]:
        table.add_row(str(feature.index), f"{feature.share:.1%}", f"{feature.mean_activation:.4g}")
    out.print(table)
    out.print(_shift_sentence(forecast), highlight=False, markup=False)


def _title(estimator: Estimator) -> str:
    unit = {"": "", "points": ", in points"}.get(estimator.unit, f", {estimator.unit}")
    return f"Forecast {estimator.quantity}, by {estimator.label}{unit}"


def print_comparison(compared: Document) -> None:
    """The conclusion, then one table: the first estimator for each training set, then the others."""
    print_conclusion(plain(comparison_conclusion(compared)))
    trains = [train["name"] for train in compared["trains"]]
    names = [name for name in IN_ORDER if name in compared["scores"]]
    groups = [
        [Column.compared(compared, BY_NAME[name], train, f"{BY_NAME[name].label}\n{train}") for train in trains]
        for name in names
    ]
    title = _title(BY_NAME[names[0]])
    if changes := change_columns(compared):
        groups.insert(0, changes)
        title = changes_title(compared)
    print_domains(title, compared["domains"], groups)
    out.print(
        "Read down a column to see which domains a training set moves most. Scores along a row can be compared where "
        "the training sets shift the same kind of features. STS forecasts the size of a change, not its direction.",
        highlight=False,
    )


def print_rollouts(forecasts: Mapping[str, Forecast], compared: Document) -> None:
    """The conclusion, then one table: numbers with a sign, the same whatever the way, then sizes by the way."""
    first = next(iter(forecasts.values()))
    scores, ways = first.to_dict(), list(forecasts)
    print_conclusion(conclusion(scores))
    signed = [field for of in estimated(scores) for field in (of.main.field, of.other.field)]
    sizes = [name for name in SIZES if name in compared["scores"]]
    groups = [[_column(first, BY_NAME[name])] for name in signed] + [
        [Column.compared(compared, BY_NAME[name], way, f"{BY_NAME[name].label}\n{way}") for way in ways]
        for name in sizes
    ]
    lead = BY_NAME[[*signed, *sizes][0]]
    domains = _highest_first(groups[0][0], compared["domains"])
    print_domains(_title(lead), domains, groups, bars="both" if signed else None)
    block = first.rollouts or {}
    for line in (counts_in_words(block), overlaps_in_words(block)):
        out.print(line, highlight=False, markup=False)


def _highest_first(column: Column, domains: Iterable[str]) -> list[str]:
    numbers = column.numbers
    return sorted(domains, key=lambda name: -numbers[name].value if name in numbers else math.inf)


def print_sae(forecast: Forecast, forecasts: list[Forecast]) -> None:
    """Names the SAE of the tables below, where there are several."""
    if len(by_sae(forecasts)) > 1:
        text = f"{forecast.sae['source']}, read at {forecast.sae['hook_name']}"
        out.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)


def print_agreement(forecasts: list[Forecast]) -> None:
    """Rank correlations between the scores of several SAEs over the domains."""
    if len(by_sae(forecasts)) == 1:
        return
    comparison = sae_comparison(forecasts)
    names = [sae["name"] for sae in comparison["saes"]]
    for estimator, of_trains in comparison["rank_correlation"].items():
        for train, matrix in of_trains.items():
            title = f"Rank correlation of {BY_NAME[estimator].label} over domains, trained on {train}"
            table = Table(title=title, title_justify="left")
            table.add_column("SAE")
            for name in names:
                table.add_column(escape(name), justify="right")
            for name, row in zip(names, matrix, strict=True):
                table.add_row(escape(name), *("" if value is None else f"{value:.2f}" for value in row))
            out.print(table)


def print_end(forecasts: list[Forecast], output: Path) -> None:
    shown_before = {forecast.sae["fit"][key] for forecast in forecasts for key in ("warning", "names")}
    warnings = [warning for forecast in forecasts for warning in forecast.warnings]
    if len({forecast.train["name"] for forecast in forecasts}) == 1:
        warnings += [caution for forecast in forecasts for caution in _cautions(forecast)]
    for warning in dict.fromkeys(warnings):
        if warning in shown_before:
            continue
        say(f"warning: {warning}")
    note(f"Results are in {output}")


def _cautions(forecast: Forecast) -> list[str]:
    """What the report warns of from the numbers."""
    scores = forecast.to_dict()
    return [plain(caution) for caution in cautions(scores, rankings(scores))]


def print_outlook(outlook: Outlook, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(files.to_json(outlook.to_dict()))
        return
    cost = outlook.cost
    whole = f", and {cost.n_answer_tokens:,} tokens through the whole model" if cost.n_answer_tokens else ""
    print_conclusion(
        f"{cost.n_passes:,} forward passes of {cost.n_tokens:,} tokens up to the hook{whole}: about "
        f"{duration(cost.seconds)} and {cost.memory_bytes / 1e9:.1f} GB of memory, not counting the time to load the "
        "model."
    )
    table = Table(title="What will be read", title_justify="left")
    for column in ("set", "for"):
        table.add_column(column)
    for column in ("prompts", "left out", "tokens"):
        table.add_column(column, justify="right")
    for planned in outlook.sets:
        left_out = planned.n_too_long + planned.n_unanswered
        table.add_row(
            escape(planned.name), USES[planned.use], str(planned.n_prompts), str(left_out), f"{planned.n_tokens:,}"
        )
    out.print(table)
    for planned in outlook.sets:
        if planned.use in ("answers", "trial"):
            continue
        first = f"“{_shortened(planned.first)}”" if planned.first else "nothing"
        lengths = zip(planned.first_lengths, (" tokens", " behind demonstrations"), strict=False)
        lines = [f"{planned.name} asks {first} ({', '.join(f'{n}{how}' for n, how in lengths)})"]
        lines += [f"from {planned.source}"] if planned.source else []
        lines += [str(ReadColumns(planned.columns, planned.unread or []))] if planned.columns else []
        lines += [f"{n:,} rows with {reason} are left out" for reason, n in (planned.left_out or {}).items()]
        out.print("; ".join(lines), highlight=False, markup=False, soft_wrap=True)
    for warning in outlook.warnings:
        say(f"warning: {warning}")


def _shortened(text: str) -> str:
    """A text in one line of at most 61 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:60]}…"


def by_sae(forecasts: list[Forecast]) -> list[list[Forecast]]:
    """Forecasts in groups of one SAE; they must be in that order."""
    names = list(dict.fromkeys(forecast.train["name"] for forecast in forecasts))
    return [forecasts[i : i + len(names)] for i in range(0, len(forecasts), len(names))]
