"""sts-fast overlap."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sts_fast import files
from sts_fast.cli.console import out
from sts_fast.cli.options import AsJson
from sts_fast.forecast.overlap import overlap as find_overlap


def overlap(
    reference: Annotated[Path, typer.Argument(help="Run whose shifted features are to be found, as of --dims tuned.")],
    runs: Annotated[list[Path], typer.Argument(help="Runs that may have found them, of the same SAE.")],
    as_json: AsJson = False,
) -> None:
    """Say how many of one run's shifted features others found: predicted against true, beside chance."""
    found = find_overlap(reference, runs)
    if as_json:
        sys.stdout.write(files.to_json(found.to_dict()))
        return
    title = f"Of the {found.top_n} features that {escape(found.train)} shifts (dims {found.dims}), found by"
    table = Table(title=title, title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("its features")
    table.add_column("share", justify="right")
    table.add_column("chance", justify="right")
    for one in found.found:
        table.add_row(escape(one.run), one.features, f"{one.share:.0%}", f"{one.chance:.1%}")
    out.print(table)
