"""sts-fast search."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from sts_fast import files
from sts_fast.cli.console import out, say
from sts_fast.cli.domain_table import Column, Number, print_domains
from sts_fast.cli.options import AsJson
from sts_fast.cli.tables import print_conclusion
from sts_fast.data.contamination import SAME
from sts_fast.data.options import Option
from sts_fast.data.sets import Seed
from sts_fast.forecast.estimators import BY_NAME, Estimator, SizeEstimator
from sts_fast.forecast.search import Candidate
from sts_fast.forecast.search import search as run_search
from sts_fast.report.numbers import counted


def search(
    library: Annotated[Path, Option("Folder of profiles, made by sts-fast profile; or as s3://bucket/lib.")],
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
    of, shown = BY_NAME[estimator], found[:rows]
    print_conclusion(_conclusion(found, of, *names))
    columns = [
        Column.of(of, {candidate.name: candidate.scores[domain] for candidate in shown}, domain)
        for domain in found[0].scores
    ]
    if names[1]:
        texts = {candidate.name: f"{candidate.selectivity:.3g}" for candidate in shown}
        columns.append(Column("up / keep", "", {name: Number(0.0, text, text) for name, text in texts.items()}))
    title = f"{of.label} of {counted(len(shown), 'training set')}"
    print_domains(title, [candidate.name for candidate in shown], [columns], first="training set")
    out.print("A score forecasts how much a domain will move, not in which direction.", highlight=False)
    for candidate in found[:rows]:
        for domain, ids in candidate.same.items():
            say(
                f"warning: {len(ids)} examples of '{candidate.name}' ask the same as questions of '{domain}' ({SAME}), "
                f"such as {ids[0]}"
            )


def _conclusion(found: list[Candidate], of: Estimator, up: list[str], keep: list[str]) -> str:
    best = found[0]
    moved = f"Of {counted(len(found), 'training set')}, {best.name} is forecast to move {' and '.join(up)} most"
    if keep:
        moved += f" in proportion to {' and '.join(keep)} ({best.selectivity:.3g} times as much)"
    return f"{moved}, for better or worse, by {of.label}."
