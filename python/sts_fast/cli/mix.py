"""sts-fast mix."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.markup import escape

from sts_fast import files
from sts_fast.cli.arguments import Places, Threads, set_threads, typed_command
from sts_fast.cli.console import Table, note, out, progress, say
from sts_fast.cli.domain_table import NAME_WIDTH
from sts_fast.cli.options import AsJson, Train
from sts_fast.cli.output import Output
from sts_fast.cli.tables import print_conclusion
from sts_fast.data.options import Option
from sts_fast.mix.mix import MIXED_FILE, MixedSet, Mixing, Mixture
from sts_fast.mix.mix import mix as run_mix
from sts_fast.mix.trainers import Trainer
from sts_fast.report.numbers import counted


@dataclass(frozen=True)
class Sources:
    """The sets that are mixed, and the model or run that the rule uses."""

    train: Train
    pool: Annotated[
        list[str],
        Option("Examples to choose from, by domain: name=path, a folder of files, or a file with a category column."),
    ]
    budget: Annotated[int, Option("Number of examples to add to the training set.")]
    model: Annotated[str | None, Option("Model: folder or hub id; for a forecast.")] = None
    sae: Annotated[str | None, Option("SAE of the model, as for score; for a forecast.")] = None
    run: Annotated[
        Path | None,
        Option("Run of sts-fast score: its domains' questions are not added; its scores, for proportional.", "--from"),
    ] = None


def mix(
    sources: Sources,
    mixing: Mixing,
    places: Places,
    output: Output,
    write_for: Annotated[
        Trainer | None, Option("Write the lines with which axolotl, llama-factory or trl reads the mixture.")
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Choose examples to mix into a training set so that other abilities are kept, and write the mixed set."""
    set_threads(threads)
    with output.kept() as kept, output.folder() as results:
        loaded = None if sources.sae is None else places.load([sources.sae], mixing.sae_dtype)[0]
        with progress() as tell:
            mixing = replace(mixing, command=typed_command(), progress=tell, say=say, kept=kept)
            mixture = run_mix(
                train=sources.train,
                pool=sources.pool,
                budget=sources.budget,
                model=sources.model,
                sae=loaded,
                run=sources.run,
                **vars(mixing),
            )
        mixture.save(results.folder, write_for=write_for, place=results.path)
    if as_json:
        sys.stdout.write(files.to_json(mixture.to_dict()))
    else:
        _print_mixture(mixture)
    note(f"Train on {results.path / MIXED_FILE}")


def _print_mixture(mixture: Mixture) -> None:
    forecast = mixture.mean_change is not None
    print_conclusion(_conclusion(mixture))
    table = Table(title=f"Mixture by the rule {mixture.rule}", title_justify="left")
    table.add_column("set", max_width=NAME_WIDTH, overflow="fold")
    for column in ("share", "examples", *(("loss", "alone", "mixed [95%]") if forecast else ())):
        table.add_column(column, justify="right", no_wrap=True)

    def add(mixed: MixedSet, share: str) -> None:
        cells = [escape(mixed.name), share, str(mixed.n_examples)]
        if mixed.loss is not None and mixed.mixed_ci is not None:
            low, high = mixed.mixed_ci
            cells += [f"{mixed.loss:.3f}", f"{mixed.alone:+.3f}", f"{mixed.mixed:+.3f} [{low:+.3f}, {high:+.3f}]"]
        table.add_row(*cells)

    add(mixture.train, "")
    for domain in sorted(mixture.domains, key=lambda domain: -domain.n_examples):
        add(domain, f"{domain.share:.0%}")
    out.print(table)
    if forecast:
        out.print(
            "alone, mixed: forecast change of the loss, in nats per token of the answers, by training on the training "
            "set alone and on the mixture. Less is better.",
            highlight=False,
        )


def _conclusion(mixture: Mixture) -> str:
    n_sets = sum(domain.n_examples > 0 for domain in mixture.domains)
    added = f"{mixture.budget:,} further examples of {counted(n_sets, 'domain')} join the {mixture.train.n_examples:,}"
    if mixture.mean_change is None:
        return f"{added} of the training set."
    alone, mixed = mixture.mean_change["alone"], mixture.mean_change["mixed"]
    return (
        f"{added} of the training set: the mean change of the domains' loss is forecast as {mixed:+.3f} nats per token "
        f"instead of {alone:+.3f}."
    )
