"""sts-fast search."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from rich.markup import escape

from sts_fast import files
from sts_fast.cli.console import Table, err, out
from sts_fast.cli.options import AsJson
from sts_fast.data.contamination import SAME
from sts_fast.data.options import Option
from sts_fast.data.sets import Seed
from sts_fast.forecast.estimators import BY_NAME, SizeEstimator
from sts_fast.forecast.search import search as run_search


def search(
    library: Annotated[Path, Option("Folder of profiles, made by sts-fast profile.")],
    up: Annotated[str, Option("Domains to move, comma-separated.")],
    keep: Annotated[str, Option("Domains to leave alone, comma-separated.")] = "",
    estimator: Annotated[SizeEstimator, Option("Whose scores.")] = "act",
    top_n: Annotated[int, Option("How many of the most shifted features are followed.", least=1)] = 100,
    sae: Annotated[str | None, Option("Of several SAEs in the library, the source of the one.")] = None,
    rows: Annotated[int, Option("How many training sets are listed.", least=1)] = 20,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Rank the training sets of a library by the domains that they are forecast to move; no model is run."""
    names = [[name.strip() for name in given.split(",") if name.strip()] for given in (up, keep)]
    found = run_search(library, *names, estimator=estimator, top_n=top_n, sae=sae, seed=seed)
    if as_json:
        sys.stdout.write(files.to_json({"candidates": [asdict(candidate) for candidate in found]}))
        return
    title = f"{BY_NAME[estimator].label} of {len(found)} training sets"
    title += ", by what they move over what they should keep" if names[1] else ""
    table = Table(title=title, title_justify="left")
    table.add_column("training set")
    for name in found[0].scores:
        table.add_column(escape(name), justify="right")
    if names[1]:
        table.add_column("up / keep", justify="right")
    for candidate in found[:rows]:
        cells = [BY_NAME[estimator].text(value, ci) for value, ci in candidate.scores.values()]
        table.add_row(escape(candidate.name), *cells, *([f"{candidate.selectivity:.3g}"] if names[1] else []))
    out.print(table)
    out.print("A score forecasts how much a domain will move, not in which direction.", highlight=False)
    for candidate in found[:rows]:
        for domain, ids in candidate.same.items():
            err.print(
                f"warning: {len(ids)} examples of '{candidate.name}' ask the same as questions of '{domain}' ({SAME}), "
                f"such as {ids[0]}",
                style="yellow", highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
