"""Forecasts as tables in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.markup import escape

from sts_fast import files
from sts_fast.cli.console import BAR_WIDTH, SIDE_WIDTH, Table, err, out
from sts_fast.data.columns import ReadColumns
from sts_fast.files import Document
from sts_fast.forecast.compare import sae_comparison
from sts_fast.forecast.cost import Outlook
from sts_fast.forecast.estimators import BY_NAME, IN_ORDER, SIZES, Estimator
from sts_fast.forecast.run import Forecast, Score


def print_shift(forecast: Forecast, n_features: int) -> None:
    top_n, shift = forecast.settings["top_n"], forecast.shift
    table = Table(title=f"Most shifted of {forecast.sae['d_sae']:,} features", title_justify="left")
    table.add_column("feature", justify="right")
    table.add_column("share of shift", justify="right")
    table.add_column("mean activation", justify="right")
    for feature in forecast.shifted_features[:n_features]:
        table.add_row(str(feature.index), f"{feature.share:.1%}", f"{feature.mean_activation:.4g}")
    out.print(table)
    low, high = shift["stability"]["overlap_ci"]
    out.print(
        f"The top {top_n} make up {shift['share_of_top_n']:.0%} of the shift; resampling the "
        f"{forecast.train['n_prompts']} training prompts keeps {shift['stability']['mean_overlap']:.0%} of them "
        f"({low:.0%} to {high:.0%}).\n"
    )


def print_scores(forecast: Forecast) -> None:
    for estimator in (BY_NAME[name] for name in SIZES if name in forecast.settings["estimators"]):
        rows = [(domain.scores[estimator.name], domain) for domain in forecast.domains]
        longest = max(score.value for score, _ in rows) or 1.0
        table = Table(title=_title(estimator), title_justify="left", width=79)
        table.add_column("domain", ratio=1)
        table.add_column("", width=BAR_WIDTH)
        table.add_column("score [95%]", justify="right", no_wrap=True)
        table.add_column("random", justify="right", no_wrap=True)
        table.add_column("prompts", justify="right", no_wrap=True)
        for score, domain in sorted(rows, key=lambda row: -row[0].value):
            table.add_row(
                escape(domain.name),
                "█" * round(BAR_WIDTH * score.value / longest),
                estimator.text(score.value, score.ci),
                f"{domain.controls['random'][estimator.name]:.3g}",
                str(domain.n_prompts),
            )
        out.print(table)
    if skipped := [f"{domain.n_skipped} of {domain.name}" for domain in forecast.domains if domain.n_skipped]:
        out.print(
            f"Left out, too long for the context or without an answer: {', '.join(skipped)}.",
            highlight=False,
            markup=False,
        )
    out.print(
        "A score forecasts how much a domain will move, not in which direction.\n"
        "Compare domains with each other, and each score with that of random features beside it."
    )


def _title(estimator: Estimator) -> str:
    unit = {"": "", "points": ", in points"}.get(estimator.unit, f", {estimator.unit}")
    return f"Forecast {estimator.quantity}, by {estimator.label}{unit}"


def print_signed(forecast: Forecast) -> None:
    for estimator in (BY_NAME[name] for name in IN_ORDER if BY_NAME[name].signed):
        rows: list[tuple[Score, str]] = [
            (domain.scores[estimator.name], domain.name)
            for domain in forecast.domains
            if estimator.name in domain.scores
        ]
        if not rows:
            continue
        table = Table(title=_title(estimator), title_justify="left", width=79)
        table.add_column("domain", ratio=1)
        for column in ("worse", "better"):
            table.add_column(column, width=SIDE_WIDTH, justify="right" if column == "worse" else "left")
        table.add_column("forecast [95%]", justify="right", no_wrap=True)
        largest = max(abs(score.value) for score, _ in rows) or 1.0
        for score, name in sorted(rows, key=lambda row: -row[0].value):
            bar = "█" * round(SIDE_WIDTH * abs(score.value) / largest)
            sides = (bar, "") if score.value < 0 else ("", bar)
            table.add_row(escape(name), *sides, estimator.text(score.value, score.ci))
        out.print(table)


def print_comparison(comparison: Document) -> None:
    for estimator in (BY_NAME[name] for name in IN_ORDER if name in comparison["scores"]):
        out.print(_comparison_table(comparison, estimator))
    out.print(
        "Read down a column to see which domains a training set moves most. Scores along a row can be compared where "
        "the training sets shift the same kind of features. STS forecasts the size of a change, not its direction.",
        highlight=False,
    )


def _comparison_table(comparison: Document, estimator: Estimator) -> Table:
    columns = [comparison["scores"][estimator.name][train["name"]] for train in comparison["trains"]]
    table = Table(title=_title(estimator), title_justify="left")
    table.add_column("domain")
    for train in comparison["trains"]:
        table.add_column(escape(train["name"]), justify="right")
    for i, domain in enumerate(comparison["domains"]):
        scores = [(column["value"][i], column["ci"][i]) for column in columns]
        texts = ["no answers" if value is None else estimator.text(value, ci) for value, ci in scores]
        table.add_row(escape(domain), *texts)
    return table


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
    for warning in dict.fromkeys(warning for forecast in forecasts for warning in forecast.warnings):
        if warning in shown_before:
            continue
        err.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    err.print(f"Results are in {output}", highlight=False, markup=False, soft_wrap=True)


def print_outlook(outlook: Outlook, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(files.to_json(outlook.to_dict()))
        return
    table = Table(title="What will be read", title_justify="left")
    for column in ("set", "for"):
        table.add_column(column)
    for column in ("prompts", "left out", "tokens"):
        table.add_column(column, justify="right")
    for planned in outlook.sets:
        left_out = planned.n_too_long + planned.n_unanswered
        table.add_row(escape(planned.name), planned.use, str(planned.n_prompts), str(left_out), f"{planned.n_tokens:,}")
    out.print(table)
    for planned in outlook.sets:
        if planned.use in ("answers", "trial"):
            continue
        first = f"“{_shortened(planned.first)}”" if planned.first else "nothing"
        lines = [f"{planned.name} asks {first}"]
        lines += [f"from {planned.source}"] if planned.source else []
        lines += [str(ReadColumns(planned.columns, planned.unread or []))] if planned.columns else []
        lines += [f"{n:,} rows with {reason} are left out" for reason, n in (planned.left_out or {}).items()]
        out.print("; ".join(lines), highlight=False, markup=False, soft_wrap=True)
    for warning in outlook.warnings:
        err.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    cost = outlook.cost
    whole = f", and {cost.n_answer_tokens:,} tokens through the whole model" if cost.n_answer_tokens else ""
    out.print(
        f"{cost.n_passes:,} forward passes of {cost.n_tokens:,} tokens up to the hook{whole}: about "
        f"{_duration(cost.seconds)} and {cost.memory_bytes / 1e9:.1f} GB of memory, not counting the time to "
        "load the model.",
        highlight=False,
    )


def _shortened(text: str) -> str:
    """A text in one line of at most 61 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:60]}…"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def by_sae(forecasts: list[Forecast]) -> list[list[Forecast]]:
    """Forecasts in groups of one SAE; they must be in that order."""
    names = list(dict.fromkeys(forecast.train["name"] for forecast in forecasts))
    return [forecasts[i : i + len(names)] for i in range(0, len(forecasts), len(names))]
