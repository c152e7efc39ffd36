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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np

from sts_fast import files
from sts_fast.data.examples import Example
from sts_fast.data.options import Option
from sts_fast.data.prompts import Prompt, build_prompts
from sts_fast.data.sets import Fields, FieldsOptions, Sampling, Sets, Source, check_enough, repeats_of
from sts_fast.data.tables import Table
from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.forecast.assemble import promoted_tokens
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


class TracingOptions(FieldsOptions, ReadingOptions, total=False):
    """`Tracing` as keywords."""

    domain: Sequence[str]
    by: By
    limit: int | None
    n_shown: int
    drop: str | None
    keep: str | None


class Traced:
    """What both ways have in common. values: [n_domains, n_prompts], whose mean over prompts is the domain's number."""

    names: list[str]
    prompts: list[Prompt]
    values: Doubles
    reliability: list[float | None]
    left_out: dict[str, int]
    examples: list[Example] | None = None
    loss: Doubles | None = None
    tables: Sequence[Table] = ()

    def features(self, i: int, chosen: Indices) -> list[list[Document]]:
        """Of a few prompts, the features with the largest parts in their number."""
        raise NotImplementedError

    def domain_block(self, i: int, n_shown: int) -> Document:
        values = self.values[i]
        order = np.argsort(-values, kind="stable")
        n_shown = min(n_shown, len(values) // 2)
        ends = {"highest": order[:n_shown], "lowest": order[::-1][:n_shown]}
        harm = np.sort(np.minimum(values, 0.0))
        worst = max(1, round(WORST * len(values)))
        return {
            "name": self.names[i],
            "value": float(values.mean()),
            "reliability": self.reliability[i],
            "share_below_zero": float((values < 0).mean()),
            "share_of_harm_in_worst": float(harm[:worst].sum() / harm.sum()) if harm.sum() else None,
            **{end: self._shown(i, chosen) for end, chosen in ends.items()},
        }

    def _shown(self, i: int, chosen: Indices) -> list[Document]:
        features = self.features(i, chosen)
        return [
            {**self._row(int(p)), "part": float(self.values[i, p]), "features": of_prompt}
            for p, of_prompt in zip(chosen, features, strict=True)
        ]

    def _row(self, p: int) -> Document:
        if self.examples is None:
            prompt = self.prompts[p]
            return {"row": None, "id": prompt.id, "question": prompt.question, "answer": None}
        example = self.examples[p]
        return {"row": example.row, "id": example.id, "question": example.question, "answer": example.answer}

    def table(self) -> pa.Table:
        import pyarrow as pa

        rows = [self._row(p) for p in range(len(self.prompts))]
        columns = {name: pa.array([row[name] for row in rows]) for name in ("row", "id", "question", "answer")}
        columns["loss"] = pa.nulls(len(rows), pa.float64()) if self.loss is None else pa.array(self.loss)
        return pa.table(
            {**columns, **{f"part_in_{name}": of for name, of in zip(self.names, self.values, strict=True)}}
        )

    def select(self, share: str, *, keep: bool) -> tuple[frozenset[int], int]:
        raise InputError("--drop and --keep need a sign, which --by act has not: leave it out, for ntk")


class Influences(Traced):
    """By ntk: answers of the run's domains, and those of the examples."""

    def __init__(self, run: Run, session: Session, tracing: Tracing, train: Source | None, names: list[str]) -> None:
        _, answered = answered_sets(run.table(PROMPTS_FILE))
        by_name = {domain.name: domain for domain in answered}
        if missing := [name for name in names if name not in by_name]:
            raise InputError(
                f"the run read no answers of {listed(missing)}: make it again with --estimators ntk, or trace by act"
            )
        scores = run.scores
        name, seed = scores["train"]["name"], scores["provenance"]["seed"]
        sets = _examples_of(run, tracing, train, name)
        every = sets.trains[name]
        if not sets.tables("train", name):  # examples that were made elsewhere
            every = [replace(example, row=i) for i, example in enumerate(every, 1)]
        self._repeats = repeats_of(every, with_answers=True)
        once = [of_one[0] for of_one in self._repeats]
        prompt_set = build_prompts(
            name, [replace(example, id=str(i)) for i, example in enumerate(once)], session.template,
            tokens="answer", context_length=session.reader.context_length, limit=tracing.limit, seed=seed,
        )  # fmt: skip
        check_enough(prompt_set, session.reader.context_length, "train")
        self.at = [int(prompt.id) for prompt in prompt_set.prompts]
        self.names, self.prompts, self.tables = names, prompt_set.prompts, sets.tables("train", name)
        self.examples = [once[i] for i in self.at]
        self.left_out = {
            "repeated": len(every) - len(once),
            "unanswered": prompt_set.n_unanswered,
            "too_long": prompt_set.n_too_long,
            "not_drawn": len(once) - len(self.at) - prompt_set.n_unanswered - prompt_set.n_too_long,
        }
        [sae] = session.saes
        self.hooked = HookedModel(
            session.whole, hook_layer(sae), name=session.reader.name, batch_tokens=tracing.batch_tokens,
            say=tracing.tell_line,
        )  # fmt: skip
        self.features_of, self.Q, self.session = Features(sae), projection(sae.d_in, seed=seed), session
        self.influence = measure_influence(
            self.hooked, self.features_of, self.Q, prompt_set, [by_name[name] for name in names], tell=tracing.tell
        )
        self.values, self.loss = self.influence.values, self.influence.nll
        self.reliability = self.influence.reliability()

    def features(self, i: int, chosen: Indices) -> list[list[Document]]:
        prompts = [self.prompts[p] for p in chosen]
        parts = carriers(self.hooked, self.features_of, self.Q, prompts, self.influence, i)
        return _described(parts, self.session)

    def select(self, share: str, *, keep: bool) -> tuple[frozenset[int], int]:
        """The rows of the most harmful examples, or with `keep` of the most helpful, repeats with their first, and the
        number of these examples."""
        n = number_of(share, len(self.prompts))
        order = np.argsort(self.values.mean(axis=0), kind="stable")
        chosen = order[-n:] if keep else order[:n]
        harmful = int((self.values.mean(axis=0)[chosen] < 0).sum())
        if harmful != (0 if keep else n):
            which = f"{harmful} of the {n} examples kept raise" if keep else f"{n - harmful} of the {n} dropped lower"
            self.session.reading.tell_line(f"warning: {which} the loss: give a smaller number")
        return frozenset(example.row for p in chosen for example in self._repeats[self.at[p]]), n


class Parts(Traced):
    """By act: the run's own prompts of the training set, read once more."""

    def __init__(self, run: Run, session: Session, tracing: Tracing, train: Source | None, names: list[str]) -> None:
        scores = run.scores
        settings = scores["settings"]
        if train is not None:
            raise InputError("--train is for ntk: by act, the prompts of the run itself are traced")
        if tracing.drop is not None or tracing.keep is not None:
            self.select("", keep=False)
        if settings["dims"] == "tuned":
            raise InputError("this run's D_N is that of a model after training, which is not traced by act: use ntk")
        [prompt_set] = sets_of_stage(run.table(PROMPTS_FILE), "shift")
        sampling = Sampling(shots=settings["shots"], tokens=settings["tokens"], limit=settings["limit"])  # type: ignore[arg-type]
        [profile] = read_profiles(
            session.reader, session.saes, "train", prompt_set, sampling,
            tell=lambda done, total: tracing.tell(prompt_set.name, done, total),
        )  # fmt: skip
        _, arrays = run.means()
        self.top, of_domains = arrays["shifted_features"], arrays["domain_mean_activations"]
        rows = [domain["name"] for domain in scores["domains"]]
        activations = of_domains[[rows.index(name) for name in names]]  # [n_domains, N]
        sums = profile.rows.matrix("sum_h" if settings["dims"] == "active" else "sum_sq_shift").tocsc()[:, self.top]
        totals = np.asarray(sums.sum(axis=0)).ravel()
        self.shares = (sums * len(prompt_set.prompts)).multiply(1 / np.where(totals, totals, 1.0)).tocsr()
        self.activations = activations * (totals > 0)
        self.values = np.asarray((self.shares @ self.activations.T).T)
        self.names, self.prompts, self.session = names, prompt_set.prompts, session
        self.reliability, self.left_out = [None] * len(names), {}

    def features(self, i: int, chosen: Indices) -> list[list[Document]]:
        parts = []
        for p in chosen:
            of_prompt = self.shares[[p]].toarray().ravel() * self.activations[i]
            parts.append({int(j): float(part) for j, part in zip(self.top, of_prompt, strict=True) if part})
        return _described(parts, self.session)


def _by_size(parts: Mapping[int, float], feature: int) -> tuple[float, int]:
    return -abs(parts[feature]), feature


def _described(parts: Sequence[Mapping[int, float]], session: Session) -> list[list[Document]]:
    largest = [sorted(of, key=partial(_by_size, of))[:N_FEATURES] for of in parts]
    shown = sorted({j for of in largest for j in of})
    promoted = promoted_tokens(session.reader, session.saes[0], shown, session.tokenizer)
    return [
        [{"index": j, "part": of[j], "promoted_tokens": promoted.get(j)} for j in top]
        for of, top in zip(parts, largest, strict=True)
    ]


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
