"""Forecasts as tables in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from sts_fast.cli.console import BAR_WIDTH, SIDE_WIDTH, err, out
from sts_fast.forecast.compare import sae_comparison
from sts_fast.forecast.run import ESTIMATORS, Forecast
from sts_fast.signed.signed import SIGNED_FIELDS


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
        f"The top {top_n} hold {shift['share_of_top_n']:.0%} of the shift; resampling the "
        f"{forecast.train['n_prompts']} training prompts keeps {shift['stability']['mean_overlap']:.0%} of them "
        f"({low:.0%} to {high:.0%}).\n"
    )


def print_scores(forecast: Forecast) -> None:
    for estimator in (name for name in ESTIMATORS if name in forecast.settings["estimators"]):
        rows = sorted(
            (
                (getattr(domain, f"sts_{estimator}"), getattr(domain, f"sts_{estimator}_ci"), domain)
                for domain in forecast.domains
            ),
            key=lambda row: -row[0],
        )
        longest = max(value for value, _, _ in rows) or 1.0
        table = Table(title=f"Forecast size of change, by STS_{estimator}", title_justify="left", width=79)
        table.add_column("domain", ratio=1)
        table.add_column("", width=BAR_WIDTH)
        table.add_column("score [95%]", justify="right", no_wrap=True)
        table.add_column("random", justify="right", no_wrap=True)
        table.add_column("prompts", justify="right", no_wrap=True)
        for value, (low, high), domain in rows:
            table.add_row(
                escape(domain.name),
                "█" * round(BAR_WIDTH * value / longest),
                f"{value:.3g} [{low:.3g}, {high:.3g}]",
                f"{domain.controls['random'][f'sts_{estimator}']:.3g}",
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
        "A score says how much a domain is expected to move, not whether for better or worse.\n"
        "Compare domains with each other, and each score with that of random features beside it."
    )


def _signed_title(field: str) -> str:
    if field.endswith("_loss"):
        return f"Forecast fall of the loss, by {field}" + ("" if field == "ntk_loss" else ", nats per token")
    return f"Forecast change of P(answer), by {field}" + ("" if field == "ntk" else ", in points")


def _signed_text(field: str, value: float, ci: tuple[float, float]) -> str:
    """'+12.3 [+10.1, +14.5]', better above zero; changes of P(answer) in points, but for ntk, which has no scale."""
    in_points = not field.endswith("_loss") and field != "ntk"
    texts = [f"{100 * one:+.1f}" if in_points else f"{one:+.3g}" for one in (value, *ci)]
    return "{} [{}, {}]".format(*texts)


def print_signed(forecast: Forecast) -> None:
    if forecast.signed is None:
        return
    domains = forecast.signed["domains"]
    for estimator in (name for name in SIGNED_FIELDS if next(iter(domains.values()))[name] is not None):
        table = Table(title=_signed_title(estimator), title_justify="left", width=79)
        table.add_column("domain", ratio=1)
        for column in ("worse", "better"):
            table.add_column(column, width=SIDE_WIDTH, justify="right" if column == "worse" else "left")
        table.add_column("forecast [95%]", justify="right", no_wrap=True)
        largest = max(abs(found[estimator]["value"]) for found in domains.values()) or 1.0
        for name, found in sorted(domains.items(), key=lambda item: -item[1][estimator]["value"]):
            value = found[estimator]["value"]
            bar = "█" * round(SIDE_WIDTH * abs(value) / largest)
            sides = (bar, "") if value < 0 else ("", bar)
            table.add_row(escape(name), *sides, _signed_text(estimator, value, found[estimator]["ci"]))
        out.print(table)


def print_comparison(comparison: dict[str, Any]) -> None:
    names = [train["name"] for train in comparison["trains"]]
    for estimator, scores in comparison["scores"].items():
        table = Table(title=f"Forecast size of change, by {estimator.replace('sts', 'STS')}", title_justify="left")
        table.add_column("domain")
        for name in names:
            table.add_column(escape(name), justify="right")
        for i, domain in enumerate(comparison["domains"]):
            cells = [(scores[name]["value"][i], *scores[name]["ci"][i]) for name in names]
            table.add_row(escape(domain), *(f"{value:.3g} [{low:.3g}, {high:.3g}]" for value, low, high in cells))
        out.print(table)
    out.print(
        "Read down a column to see what a training set moves most; scores of one domain may be compared along its row "
        "where the training sets shift the same kind of features. Scores say how much, not for better or worse.",
        highlight=False,
    )
    for field, of_trains in (comparison["signed"] or {}).items():
        table = Table(title=_signed_title(field), title_justify="left")
        table.add_column("domain")
        for name in names:
            table.add_column(escape(name), justify="right")
        for i, domain in enumerate(comparison["domains"]):
            found = [(of_trains[name]["value"][i], of_trains[name]["ci"][i]) for name in names]
            texts = ["no answers" if value is None else _signed_text(field, value, ci) for value, ci in found]
            table.add_row(escape(domain), *texts)
        out.print(table)


def print_sae(forecast: Forecast, forecasts: list[Forecast]) -> None:
    """Which SAE the tables below are of, where there are several."""
    if len(by_sae(forecasts)) > 1:
        text = f"{forecast.sae['source']}, read at {forecast.sae['hook_name']}"
        out.print(text, style="bold", highlight=False, markup=False, soft_wrap=True)


def print_agreement(forecasts: list[Forecast]) -> None:
    """How alike several SAEs rank the domains."""
    if len(by_sae(forecasts)) == 1:
        return
    comparison = sae_comparison(forecasts)
    names = [sae["name"] for sae in comparison["saes"]]
    for estimator, of_trains in comparison["rank_correlation"].items():
        for train, matrix in of_trains.items():
            title = f"Rank correlation of {estimator.replace('sts', 'STS')} over domains, trained on {train}"
            table = Table(title=title, title_justify="left")
            table.add_column("SAE")
            for name in names:
                table.add_column(escape(name), justify="right")
            for name, row in zip(names, matrix, strict=True):
                table.add_row(escape(name), *("" if value is None else f"{value:.2f}" for value in row))
            out.print(table)


def print_end(forecasts: list[Forecast], output: Path) -> None:
    told = {forecast.sae["fit"][key] for forecast in forecasts for key in ("warning", "names")}
    for warning in dict.fromkeys(warning for forecast in forecasts for warning in forecast.warnings):
        if warning in told:
            continue
        err.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    err.print(f"Results are in {output}", highlight=False, markup=False, soft_wrap=True)


def by_sae(forecasts: list[Forecast]) -> list[list[Forecast]]:
    """Forecasts in groups of one SAE: they stand in that order."""
    names = list(dict.fromkeys(forecast.train["name"] for forecast in forecasts))
    return [forecasts[i : i + len(names)] for i in range(0, len(forecasts), len(names))]
