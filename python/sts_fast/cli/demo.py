"""sts-fast demo."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated

from sts_fast import files
from sts_fast.cli.console import Table, note, out, progress
from sts_fast.cli.options import AsJson
from sts_fast.cli.output import Output
from sts_fast.data.options import Option
from sts_fast.demo import organism
from sts_fast.demo.demo import PREDICTORS, PRIMARY, SCORE, Demo, run_demo
from sts_fast.forecast.run import REPORT_FILE
from sts_fast.statistics import Z_95


def demo(
    output: Output,
    seeds: Annotated[int, Option("Fine-tunings on each training set.", least=1)] = 1,
    seed: Annotated[int, Option("Seed of the first fine-tuning, and of --retrain.", least=0)] = 0,
    heavy: Annotated[bool, Option("Train five times as long at a higher rate.")] = False,
    retrain: Annotated[bool, Option("First train the model and SAE again; takes minutes.")] = False,
    library: Annotated[
        Path | None, Option("Keep the profiles of all 80 sets in this folder, for sts-fast search and report.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Forecast, fine-tune and compare, on a small model that comes with the package."""
    with output.folder() as results:
        # Beside the results, which name its place.
        folder = results.path.with_name(f"{results.path.name}-organism") if retrain else None
        with progress("steps") as tell:
            if folder is not None:
                organism.train(seed, folder, tell)
            result = run_demo(n_seeds=seeds, seed=seed, heavy=heavy, folder=folder, library=library, progress=tell)
        result.save(results.folder)
    if as_json:
        sys.stdout.write(files.to_json(result.to_dict()))
    else:
        _print_demo(result)
    note(f"Open {results.path / REPORT_FILE}")


def _print_demo(demo: Demo) -> None:
    trial = demo.trials[0]
    rows = sorted(trial.validation.domains, key=lambda row: -row.score)
    table = Table(title=f"Trained on {trial.train}: forecast, made before, and outcome", title_justify="left", width=79)
    for name in ("domain", f"{SCORE} [95%]", "change of P(correct) ± 95%"):
        table.add_column(name, justify="left" if name == "domain" else "right", no_wrap=True)
    for row in (*rows[:7], None, *rows[-3:]):
        if row is None:
            table.add_row(f"... {len(rows) - 10} more", "...", "...")
            continue
        low, high = row.score_ci or (row.score, row.score)
        noise = "" if row.outcome.stderr is None else f" ± {Z_95 * row.outcome.stderr:.3f}"
        table.add_row(row.name, f"{row.score:.3g} [{low:.3g}, {high:.3g}]", f"{row.outcome.change:+.3f}{noise}")
    out.print(table)
    table = Table(title=f"Correlation with {PRIMARY}, over domains", title_justify="left", width=79)
    for name in ("number", "mean r", "lowest", "highest", "above zero"):
        table.add_column(name, justify="left" if name == "number" else "right", no_wrap=True)
    for predictor in PREDICTORS:
        spread = demo.spread(PRIMARY, predictor)
        cells = (f"{value:.2f}" for value in (spread.mean, spread.low, spread.high))
        table.add_row(predictor, *cells, f"{spread.n_above_zero} of {spread.n}")
    out.print(table)
    table = Table(title=f"{SCORE} in each training", title_justify="left", width=79)
    for name in ("trained on", "own change", "r [95%]", "domains moved"):
        table.add_column(name, justify="left" if name == "trained on" else "right", no_wrap=True)
    for trial in demo.trials:
        pearson, limits = trial.validation.size.pearson, trial.validation.limits
        name = trial.train if len(demo.trials) == len(demo.forecasts) else f"{trial.train}, seed {trial.seed}"
        interval = "" if pearson.ci_domains is None else " [{:.2f}, {:.2f}]".format(*pearson.ci_domains)
        moved = f"{limits.n_distinguishable} of {len(trial.validation.domains)}"
        table.add_row(name, f"{trial.own_change:+.2f}", f"{pearson.value:.2f}{interval}", moved)
    out.print(table)
    for finding in demo.findings():
        out.print("\n".join(textwrap.wrap(finding, 77, initial_indent="- ", subsequent_indent="  ")), highlight=False)
