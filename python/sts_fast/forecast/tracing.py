"""Training examples that carry a forecast: each one's part in it, and the training set without or with some of them.

ntk  influence on the loss of a domain's answers (see signed.influence): above zero an example lowers it, below zero it
     is harmful; the mean over the examples is the set's ntk_loss
act  part in STS_act = sum_{j in D_N} a_j, a_j the domain's mean activation: an example i gets

         n sum_{j in D_N} a_j s_ij / sum_i s_ij,

     s_ij its part of what ranked feature j for D_N (its squared change, or for dims 'active' its activation); the mean
     over the examples is STS_act
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np

from sts_fast import files
from sts_fast.data.examples import Example
from sts_fast.data.options import Option
from sts_fast.data.prompts import build_prompts
from sts_fast.data.sets import Fields, FieldsOptions, Sampling, Sets, Source, check_enough, repeats_of
from sts_fast.data.tables import Table
from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.forecast.dims import ranked_by
from sts_fast.forecast.run import PROMPTS_FILE, Run
from sts_fast.forecast.stored_prompts import answered_sets, sets_of_stage
from sts_fast.model.session import Reading, ReadingOptions, Session
from sts_fast.profile.projection import projection
from sts_fast.profile.read import read_profiles
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.influence import carriers, measure_influence
from sts_fast.signed.push import Features
from sts_fast.signed.signed import hook_layer

if TYPE_CHECKING:
    import pyarrow as pa

    from sts_fast.statistics import Doubles, Indices

By = Literal["ntk", "act"]
# Share of the examples whose part in all harm is told, and features told of an example.
WORST, N_FEATURES = 0.05, 3


@dataclass(frozen=True)
class Tracing(Fields, Reading):
    """Options of tracing; see Fields and Reading for the rest.

    domain: names of domains of the run; none for all
    by:     'ntk' or 'act', as in the module's equations; 'ntk' needs answers
    limit:  most examples, drawn with the run's seed; None for all
    n_shown: examples told on each side of each domain
    drop, keep: share ('5%') or number of examples; see Trace.named
    column: name of a column for each example's mean influence, in the training set that is written
    """

    TITLE = "Trace"

    domain: Annotated[Sequence[str], Option("Domain of the run; repeatable; default: all of them.")] = ()
    by: Annotated[By, Option("ntk: which examples lower or raise the loss of the domain's answers; act: STS_act.")] = (
        "ntk"
    )
    limit: Annotated[int | None, Option("Most training examples, drawn at random; default: all.", least=1)] = None
    n_shown: Annotated[int, Option("Examples shown on each side.", "--show", least=1)] = 5
    drop: Annotated[
        str | None, Option("Write the training set without its most harmful examples: 5%, or a number.")
    ] = None
    keep: Annotated[str | None, Option("Write the most helpful examples alone: 50%, or a number.")] = None
    column: Annotated[
        str | None, Option("Write the training set with each example's mean influence in a column of this name.")
    ] = None


class TracingOptions(FieldsOptions, ReadingOptions, total=False):
    """`Tracing` as keywords."""

    domain: Sequence[str]
    by: By
    limit: int | None
    n_shown: int
    drop: str | None
    keep: str | None
    column: str | None


@dataclass(frozen=True)
class Traced:
    """Training examples with their parts in the forecasts of some domains.

    names:    of the domains; values: [n_domains, n_examples] parts, whose mean over examples is the domain's number
    rows:     of each example, `row` of the training set (from 1; None where not known), id, question and answer
    loss:     [n_examples] nats per token of the answer, before training; None where none was read
    reliability: by domain, see Influence; None where there is none
    left_out: number of examples that were not traced, by reason
    features: of some examples, by index, each feature's part in their part in one domain
    repeats:  rows of the training set that are each example, itself and those that repeat it
    tables:   the training set; empty where it was given as examples
    """

    names: list[str]
    values: Doubles
    rows: list[Document]
    loss: Doubles | None
    reliability: list[float | None]
    left_out: dict[str, int]
    features: Callable[[int, Indices], list[dict[int, float]]]
    repeats: list[list[int]] = field(default_factory=list)
    tables: Sequence[Table] = ()

    def domain_block(self, i: int, n_shown: int, promoted: Callable[[list[int]], Mapping[int, list[str]]]) -> Document:
        """A domain of trace.json, with n_shown examples of each side; promoted: output tokens that features promote."""
        values = self.values[i]
        order = np.argsort(-values, kind="stable")
        n_shown = min(n_shown, len(values) // 2)
        harm = np.sort(np.minimum(values, 0.0))
        worst = max(1, round(WORST * len(values)))
        return {
            "name": self.names[i],
            "value": float(values.mean()),
            "reliability": self.reliability[i],
            "share_below_zero": float((values < 0).mean()),
            "share_of_harm_in_worst": float(harm[:worst].sum() / harm.sum()) if harm.sum() else None,
            "highest": self._shown(i, order[:n_shown], promoted),
            "lowest": self._shown(i, order[::-1][:n_shown], promoted),
        }

    def _shown(
        self, i: int, chosen: Indices, promoted: Callable[[list[int]], Mapping[int, list[str]]]
    ) -> list[Document]:
        largest = [
            sorted(parts.items(), key=lambda part: (-abs(part[1]), part[0]))[:N_FEATURES]
            for parts in self.features(i, chosen)
        ]
        tokens = promoted(sorted({j for parts in largest for j, _ in parts}))
        return [
            {
                **self.rows[p],
                "part": float(self.values[i, p]),
                "features": [{"index": j, "part": part, "promoted_tokens": tokens.get(j)} for j, part in parts],
            }
            for p, parts in zip(chosen.tolist(), largest, strict=True)
        ]

    def table(self) -> pa.Table:
        """One row an example, as in trace.parquet."""
        import pyarrow as pa

        types = {"row": pa.int64(), "id": pa.string(), "question": pa.string(), "answer": pa.string()}
        columns = {name: pa.array([row[name] for row in self.rows], kind) for name, kind in types.items()}
        columns["loss"] = pa.nulls(len(self.rows), pa.float64()) if self.loss is None else pa.array(self.loss)
        parts = {f"part_in_{name}": of for name, of in zip(self.names, self.values, strict=True)}
        return pa.table({**columns, **parts})

    def mean_by_row(self) -> dict[int, float]:
        """By row of the training set, the mean part over the domains of the example that it is or repeats."""
        means = self.values.mean(axis=0)
        return {row: float(means[p]) for p, rows in enumerate(self.repeats) for row in rows}

    def extreme(self, n: int, *, highest: bool) -> tuple[frozenset[int], int]:
        """Rows of the n examples with the lowest mean part over the domains, or the highest; and how many of the n have
        another sign than was asked for."""
        means = self.values.mean(axis=0)
        order = np.argsort(means, kind="stable")
        chosen = order[-n:] if highest else order[:n]
        n_other = int((means[chosen] < 0).sum() if highest else (means[chosen] >= 0).sum())
        return frozenset(row for p in chosen for row in self.repeats[p]), n_other


def by_influence(run: Run, session: Session, tracing: Tracing, train: Source | None, names: list[str]) -> Traced:
    """Traces the influence of the training set's answers on those of some domains of a run.

    train: as for `trace`; names: of the domains. Raises InputError where answers are missing.
    """
    _, answered = answered_sets(run.table(PROMPTS_FILE))
    by_name = {domain.name: domain for domain in answered}
    if missing := [name for name in names if name not in by_name]:
        raise InputError(
            f"the run read no answers of {listed(missing)}: make it again with --estimators ntk, or trace by act"
        )
    name, seed = run.scores["train"]["name"], run.scores["provenance"]["seed"]
    sets = _examples_of(run, tracing, train, name)
    every, tables = sets.trains[name], sets.tables("train", name)
    if not tables:
        every = [replace(example, row=i) for i, example in enumerate(every, 1)]
    repeats = repeats_of(every, with_answers=True)
    # Ids need not be unique: a prompt is known by its place.
    once = [replace(group[0], id=str(i)) for i, group in enumerate(repeats)]
    prompt_set = build_prompts(
        name, once, session.template, tokens="answer", context_length=session.reader.context_length,
        limit=tracing.limit, seed=seed,
    )  # fmt: skip
    check_enough(prompt_set, session.reader.context_length, "train")
    traced = [repeats[int(prompt.id)] for prompt in prompt_set.prompts]
    [sae] = session.saes
    hooked = HookedModel(
        session.whole, hook_layer(sae), name=session.reader.name, batch_tokens=tracing.batch_tokens,
        say=tracing.tell_line, kept=session.kept,
    )  # fmt: skip
    features, Q = Features(sae), projection(sae.d_in, seed=seed)
    influence = measure_influence(
        hooked, features, Q, prompt_set, [by_name[domain] for domain in names], tell=tracing.tell
    )
    n_left_out = len(once) - len(traced)
    return Traced(
        names=names,
        values=influence.values,
        rows=[_row(group[0]) for group in traced],
        loss=influence.nll,
        reliability=influence.reliability(),
        left_out={
            "repeated": len(every) - len(once),
            "unanswered": prompt_set.n_unanswered,
            "too_long": prompt_set.n_too_long,
            "not_drawn": n_left_out - prompt_set.n_unanswered - prompt_set.n_too_long,
        },
        features=lambda i, chosen: carriers(hooked, features, Q, [prompt_set.prompts[p] for p in chosen], influence, i),
        repeats=[[example.row for example in group] for group in traced],
        tables=tables,
    )


def by_score(run: Run, session: Session, tracing: Tracing, names: list[str]) -> Traced:
    """Traces the parts of the run's own prompts of the training set in STS_act; these are read once more."""
    settings = run.scores["settings"]
    if settings["dims"] == "tuned":
        raise InputError("this run's D_N is that of a model after training, which is not traced by act: use ntk")
    [prompt_set] = sets_of_stage(run.table(PROMPTS_FILE), "shift")
    sampling = Sampling(shots=settings["shots"], tokens=settings["tokens"], limit=settings["limit"])  # type: ignore[arg-type]
    [profile] = read_profiles(
        session.reader, session.saes, "train", prompt_set, sampling, tell=partial(tracing.tell, prompt_set.name)
    )
    _, arrays = run.means()
    top, every = arrays["shifted_features"], [domain["name"] for domain in run.scores["domains"]]
    activations = arrays["domain_mean_activations"][[every.index(name) for name in names]]  # [n_domains, N]
    sums = profile.rows.matrix(ranked_by(settings["dims"])).tocsc()[:, top]
    totals = np.asarray(sums.sum(axis=0)).ravel()
    shares = (sums * len(prompt_set.prompts)).multiply(1 / np.where(totals, totals, 1.0)).tocsr()

    def features(i: int, chosen: Indices) -> list[dict[int, float]]:
        of_prompts = (shares[[p]] for p in chosen)
        return [
            {int(top[k]): float(share * activations[i, k]) for k, share in zip(of.indices, of.data, strict=True)}
            for of in of_prompts
        ]

    return Traced(
        names=names,
        values=np.asarray((shares @ activations.T).T),
        rows=[{"row": None, "id": of.id, "question": of.question, "answer": None} for of in prompt_set.prompts],
        loss=None,
        reliability=[None] * len(names),
        left_out={},
        features=features,
    )


def _row(example: Example) -> Document:
    return {"row": example.row, "id": example.id, "question": example.question, "answer": example.answer}


def _examples_of(run: Run, tracing: Tracing, train: Source | None, name: str) -> Sets:
    """The training set: the one given, or the run's, as the run read it."""
    scores = run.scores
    given = train is not None
    if train is None:
        inputs = [entry for entry in scores["provenance"]["inputs"] if entry["role"] == "train"]
        moved = [entry["path"] for entry in inputs if not Path(entry["path"]).is_file()]
        if moved or not inputs:
            raise InputError(f"the run's training set is not at {listed(moved) or 'any file'}: give it with --train")
        if changed := [entry["path"] for entry in inputs if files.sha256(entry["path"]) != entry["sha256"]]:
            raise InputError(
                f"{listed(changed)} has changed since the run: give it with --train, or make the run again"
            )
        train = [entry["path"] for entry in inputs]
    sets = Sets.read({name: train}, (), None, tracing)
    for line in sets.told():
        tracing.tell_line(line)
    if not given:
        was = next((block for block in scores["provenance"]["rows"] if name in block["sets"]), None)
        if was is not None and any(now["columns"] != was["columns"] for now in sets.blocks(name)):
            raise InputError(
                f"the run read its training set from other columns ({was['columns']}): give the same --question-field "
                "and --answer-field"
            )
    return sets


def number_of(share: str, n: int) -> int:
    """'5%' of n, or a number. Raises InputError for anything else."""
    number, percent = str(share).removesuffix("%"), str(share).endswith("%")
    try:
        value = float(number) if percent else int(number)
    except ValueError:
        value = -1
    if not 0 < value < (100 if percent else math.inf):
        raise InputError(f"--drop and --keep take a share, as in 5%, or a number of examples, not '{share}'")
    return max(1, round(n * value / 100)) if percent else min(int(value), n)
