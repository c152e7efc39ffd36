"""sts-fast overlap."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sts_fast import files
from sts_fast.cli.console import Table, out
from sts_fast.cli.options import AsJson
from sts_fast.forecast.overlap import overlap as find_overlap


def overlap(
    reference: Annotated[
        Path, typer.Argument(help="Run whose shifted features are compared, such as one with --dims tuned.")
    ],
    runs: Annotated[list[Path], typer.Argument(help="Runs that may have found them, with the same SAE.")],
    as_json: AsJson = False,
) -> None:
    """Show how many of one run's shifted features others found, beside chance: predicted against true ones."""
    result = find_overlap(reference, runs)
    if as_json:
        sys.stdout.write(files.to_json(result.to_dict()))
        return
    title = f"Of the {result.top_n} features that {escape(result.train)} shifts (dims {result.dims}), found by"
    table = Table(title=title, title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("its features")
    table.add_column("share", justify="right")
    table.add_column("chance", justify="right")
    for other in result.found:
        table.add_row(escape(other.run), other.features, f"{other.share:.0%}", f"{other.chance:.1%}")
    out.print(table)
