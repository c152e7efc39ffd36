"""sts-fast trace."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from sts_fast import files
from sts_fast.cli.arguments import Threads, set_threads, typed_command
from sts_fast.cli.console import Table, note, out, progress, say
from sts_fast.cli.options import AsJson
from sts_fast.cli.output import kept_beside
from sts_fast.data.options import Option
from sts_fast.forecast.run import Run
from sts_fast.forecast.trace import SELECTED_FILE, Trace
from sts_fast.forecast.trace import trace as run_trace
from sts_fast.forecast.tracing import WORST, Tracing

MOST_TABLES = 4
TEXT_WIDTH = 110


def trace(
    tracing: Tracing,
    run: Annotated[Path, typer.Argument(help="Folder of sts-fast score.")],
    train: Annotated[
        list[str] | None, Option("Training examples; default: the run's own, all of them; several are one set.")
    ] = None,
    model: Annotated[str | None, Option("The run's model, if it has moved.")] = None,
    sae: Annotated[str | None, Option("The run's SAE, if it has moved.")] = None,
    threads: Threads = None,
    output: Annotated[Path | None, Option("Folder for the results; by default the run's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which training examples carry a forecast, and write the training set without or with some of them."""
    set_threads(threads)
    folder = output or Run.load(run).folder
    files.prepare_folder(folder)
    with kept_beside(folder) as kept:
        with progress("examples") as tell:
            tracing = replace(tracing, command=typed_command(), progress=tell, say=say, kept=kept)
            traced = run_trace(run, train=train, model=model, sae=sae, **vars(tracing))
        traced.save(folder)
    if as_json:
        sys.stdout.write(files.to_json(traced.to_dict()))
    else:
        _print_trace(traced)
    selection = traced.to_dict()["selection"]
    if selection is not None:
        left = "without" if selection["how"] == "drop" else "with only"
        note(
            f"{folder / SELECTED_FILE} is the training set {left} {selection['n_examples']} examples "
            f"({selection['n_rows']} rows)"
        )
    note(f"Results are in {folder}")


def _print_trace(traced: Trace) -> None:
    document = traced.to_dict()
    domains = document["domains"]
    for domain in domains[:MOST_TABLES]:
        out.print(_sentence(document, domain), highlight=False, markup=False)
        table = Table(show_lines=False)
        table.add_column("row", justify="right")
        table.add_column("part", justify="right", no_wrap=True)
        table.add_column("example, and the features that carry it", overflow="fold")
        for end in ("highest", "lowest"):
            for example in domain[end]:
                row = example["id"] if example["row"] is None else str(example["row"])
                table.add_row(escape(row), f"{example['part']:+.3g}", escape(_text(example)))
            table.add_section()
        out.print(table)
    if len(domains) > MOST_TABLES:
        out.print(f"{len(domains) - MOST_TABLES} more domains are in trace.json: choose some with --domain.")


def _sentence(document: dict[str, Any], domain: dict[str, Any]) -> str:
    n, name = document["n_examples"], domain["name"]
    if document["by"] == "act":
        return f"{name}: parts of {n} training prompts in STS_act, whose mean it is: {domain['value']:.3g}."
    text = f"{name}: {domain['share_below_zero']:.0%} of {n} examples raise its loss"
    if domain["share_of_harm_in_worst"] is not None:
        text += f", and the worst {WORST:.0%} do {domain['share_of_harm_in_worst']:.0%} of the harm"
    reliability = domain["reliability"]
    more = "" if reliability is None else f" Other questions of it would rank them alike with r = {reliability:.2f}."
    return f"{text}.{more}"


def _text(example: dict[str, Any]) -> str:
    words = " ".join(f"{example['question'] or ''}\0{example['answer'] or ''}".split())
    text = words.replace("\0", " → " if example["answer"] else "")
    short = text if len(text) <= TEXT_WIDTH else f"{text[: TEXT_WIDTH - 1]}…"
    features = ", ".join(
        f"{feature['index']} ({feature['part']:+.2g}"
        + (f": {' '.join(feature['promoted_tokens'][:3])}" if feature["promoted_tokens"] else "")
        + ")"
        for feature in example["features"]
    )
    return f"{short}\n{features}"
