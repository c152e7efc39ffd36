"""Training examples that carry a forecast, told and kept; the training set without, or with, some of them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sts_fast import files
from sts_fast._version import __version__
from sts_fast.data.options import shows
from sts_fast.data.sets import Source
from sts_fast.data.tables import Table
from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.forecast.assemble import promoted_tokens
from sts_fast.forecast.run import SCORES_FILE, Run, save_beside
from sts_fast.forecast.tracing import Tracing, TracingOptions, by_influence, by_score, number_of
from sts_fast.model.session import Purpose, SAESource, Session, open_sae

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA_VERSION = "1.0"
TRACE_FILE, EXAMPLES_FILE, SELECTED_FILE = "trace.json", "trace.parquet", "selected.jsonl"


@dataclass(frozen=True)
class Trace:
    """Training examples that carry a forecast.

    document: content of trace.json
    examples: rows of trace.parquet, one for each example: its row of the training set (from 1; null where not known),
        id, question, answer, loss before training (nats per token), and its part in each domain's forecast
    named:    rows of the training set that --drop leaves out or --keep keeps, from 1; None without these
    tables:   the training set
    column:   name of a column that the written rows get, and its values by row, from 1; null for other rows
    """

    document: Document
    examples: pa.Table
    named: frozenset[int] | None
    tables: Sequence[Table]
    column: tuple[str, Mapping[int, float]] | None = None

    def to_dict(self) -> Document:
        return self.document

    def save(self, folder: str | Path) -> None:
        """Writes trace.parquet, trace.json and, for named rows or a column, selected.jsonl: all of them, or none.

        Raises InputError where the folder cannot be written to, or the training set has a column of that name.
        """
        import pyarrow.parquet as pq

        folder = Path(folder)
        files.prepare_folder(folder)
        files.check_document(self.document, trace_schema())
        writes_rows = self.named is not None or self.column is not None
        if writes_rows and not self.tables:
            raise InputError("the training set was given as examples, which have no rows to write: see Trace.named")
        with ExitStack() as together:
            pq.write_table(
                self.examples, together.enter_context(files.atomic_path(folder / EXAMPLES_FILE)), compression="zstd"
            )
            if writes_rows:
                path = together.enter_context(files.atomic_path(folder / SELECTED_FILE))
                with path.open("w", encoding="utf-8") as lines:
                    lines.writelines(_line(row) + "\n" for row in self._selected())
            save_beside(folder, TRACE_FILE, self.document)
        if not writes_rows:
            (folder / SELECTED_FILE).unlink(missing_ok=True)  # of an earlier trace

    def _selected(self) -> Iterator[Mapping[str, Any]]:
        named, n_before = self.named or frozenset(), 0
        keeps = self.named is not None and self.document["selection"]["how"] == "keep"
        for table in self.tables:
            number = 0
            for number, _, row in table.read():
                if (n_before + number in named) == keeps and isinstance(row, Mapping):
                    yield row if self.column is None else self._with_column(*self.column, row, n_before + number)
            n_before += number

    def _with_column(
        self, name: str, values: Mapping[int, float], row: Mapping[str, Any], number: int
    ) -> Mapping[str, Any]:
        if name in row:
            raise InputError(f"the training set has a column {name!r} already: give --column another name")
        return {**row, name: values.get(number)}


def _line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    written = text.encode("utf-8", "ignore").decode("utf-8") == text  # half of a surrogate pair cannot be
    return text if written else json.dumps(row, default=str)


def trace_schema() -> Document:
    """The JSON schema of trace.json."""
    return files.load_schema("forecast/trace.schema.json")


@shows(Tracing, TracingOptions)
def trace(
    run: str | Path,
    *,
    train: Source | None = None,
    model: str | Path | PreTrainedModel | None = None,
    sae: SAESource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Unpack[TracingOptions],
) -> Trace:
    """Finds the training examples that carry a run's forecast, by the equations of the module `tracing`.

    run:   folder of `score`
    train: the examples to trace, as for `score`: by default the run's training set, all of it. Another set may be
           given, such as candidates of which some are to be added
    model, sae: by default the run's; needed where these have moved
    options: see Tracing

    Returns each example's part in each domain's ntk_loss (fall of the loss per unit of a step, as in signed.push) or
    STS_act. Raises InputError where the run, the model, the SAE and the training set cannot be used together, or lack
    answers.
    """
    tracing, opened = Tracing(**options), Run.load(run)
    scores = opened.scores
    if tracing.layer is not None or tracing.hook is not None:
        raise InputError("--layer and --hook are taken from the run: leave them out, or make the run again with them")
    if scores["rollouts"] is not None:
        raise InputError(f"{run} is a forecast of RL, whose completions are not traced: give a run of sts-fast score")
    share = _share_of(tracing)
    if tracing.by == "act" and train is not None:
        raise InputError("--train is for ntk: by act, the prompts of the run itself are traced")
    if tracing.by == "act" and (share is not None or tracing.column is not None):
        raise InputError("--drop, --keep and --column need a sign, which --by act has not: leave it out, for ntk")
    signed = scores["signed"]
    if tracing.by == "ntk" and signed is not None and signed["features"] not in (None, "sae"):
        raise InputError(
            f"the run's signed forecasts are written in {signed['features']} features, and examples are traced in the "
            "SAE's: make the run again without --signed-features"
        )
    wanted = [tracing.domain] if isinstance(tracing.domain, str) else tracing.domain
    names = _chosen([domain["name"] for domain in scores["domains"]], wanted)
    tracing = replace(tracing, hook=scores["sae"]["hook_name"])
    loaded = open_sae(scores["sae"]["source"] if sae is None else sae, tracing)
    if loaded.fingerprint != opened.means()[0].sae_fingerprint:
        raise InputError(f"{loaded.source or 'the SAE'} is not the SAE of this run: give that one with --sae")
    session = Session.open(
        scores["model"]["name"] if model is None else model, [loaded], tracing,
        tokenizer=tokenizer,
        purpose=Purpose(
            whole=tracing.by == "ntk",
            texts=tracing.by == "ntk",
            needs=[("--by ntk", "the whole model, and its gradients")] if tracing.by == "ntk" else [],
        ),
    )  # fmt: skip
    if scores["model"]["weights_sha256"] not in (None, session.reader.weights_sha256(session.reader.hook(loaded))):
        tracing.warn("the model's weights, or their dtype, are not those of the run: its forecast is of another model")
    if tracing.by == "ntk":
        traced = by_influence(opened, session, tracing, train, names)
    else:
        traced = by_score(opened, session, tracing, names)
    promoted = partial(_promoted, session)
    document = {
        "run": files.sha256(opened.folder / SCORES_FILE),
        "schema_version": SCHEMA_VERSION,
        "model": session.reader.name,
        "sae": loaded.source,
        "hook_name": loaded.hook_name,
        "train": scores["train"]["name"],
        "by": tracing.by,
        "n_examples": len(traced.rows),
        "left_out": traced.left_out,
        "domains": [traced.domain_block(i, tracing.n_shown, promoted) for i in range(len(names))],
        "selection": None,
        "provenance": {
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": tracing.command,
            "seed": scores["provenance"]["seed"],
            "version": __version__,
        },
    }
    named = None
    if share is not None:
        keeps, n = tracing.keep is not None, number_of(share, len(traced.rows))
        named, n_other = traced.extreme(n, highest=keeps)
        if n_other:
            which = "kept raise" if keeps else "dropped lower"
            tracing.tell_line(f"warning: {n_other} of the {n} examples {which} the loss: give a smaller number")
        document["selection"] = {
            "how": "keep" if keeps else "drop",
            "n_examples": n,
            "n_rows": len(named),
            "file": SELECTED_FILE,
        }
    column = None if tracing.column is None else (tracing.column, traced.mean_by_row())
    return Trace(document, traced.table(), named, traced.tables, column)


def _promoted(session: Session, features: list[int]) -> Mapping[int, list[str]]:
    return promoted_tokens(session.reader, session.saes[0], features, session.tokenizer)


def _chosen(every: Sequence[str], names: Sequence[str]) -> list[str]:
    if unknown := [name for name in names if name not in every]:
        raise InputError(f"the run has no domain called {listed(unknown)}: its domains are {listed(every)}")
    if not every:
        raise InputError("the run has no domains, only the shift of its training set: make it again with --domains")
    return list(dict.fromkeys(names or every))


def _share_of(tracing: Tracing) -> str | None:
    if tracing.drop is not None and tracing.keep is not None:
        raise InputError("--drop and --keep exclude each other: give one of them")
    given = tracing.keep if tracing.drop is None else tracing.drop
    if given is not None:
        number_of(given, 100)
    return given
