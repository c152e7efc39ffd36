"""Allots a budget of further examples to be mixed into a training set over the domains that they may come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack, get_args

import numpy as np

from sts_fast import files
from sts_fast.data.contamination import SAME, NgramIndex
from sts_fast.data.examples import Example, read_examples
from sts_fast.data.options import Option, shows
from sts_fast.data.prompts import build_prompts, set_warnings
from sts_fast.data.sets import (
    Drawing,
    DrawingOptions,
    Fields,
    FieldsOptions,
    Limit,
    Sets,
    Source,
    Sources,
    check_enough,
    distinct,
)
from sts_fast.data.sources import origin_of
from sts_fast.data.turns import messages_of
from sts_fast.errors import InputError, listed
from sts_fast.files import Document
from sts_fast.forecast.estimators import SIZES
from sts_fast.forecast.run import PROMPTS_FILE, Run
from sts_fast.mix.allot import fill, least_loss, whole_examples
from sts_fast.mix.flow import Flow
from sts_fast.mix.kernel import Kernel, measure_kernel
from sts_fast.mix.trainers import Trainer, check_trainer, write_configuration
from sts_fast.model.session import Purpose, Reading, ReadingOptions, SAESource, Session
from sts_fast.profile.projection import projection
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features
from sts_fast.signed.signed import hook_layer
from sts_fast.statistics import CONFIDENCE, INTERVAL, Interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sts_fast.statistics import Doubles

Rule = Literal["forecast", "proportional", "uniform"]
RULES = get_args(Rule)

SCHEMA_VERSION = "1.0"
MIX_FILE, MIXED_FILE = "mix.json", "mixed.jsonl"
TRAIN = "train"
LOSS_LEFT = 0.01
N_BOOTSTRAP = 200


@dataclass(frozen=True)
class Mixing(Drawing, Fields, Reading):
    """Options of the allotment; see Drawing, Fields and Reading for how sets and model are read.

    rule:      see mix
    estimator: scores of a run to use: 'act', 'icl' or 'act_sq'; by default the first that it has
    weights:   weight of each domain's loss, 1 by default; under 'train' that of the training set's own loss, beside
               all domains together
    protect:   the only domains that count; examples may still come from all
    loss_left: length of the training: the share of the training set's own loss that it would leave without mixing
    """

    TITLE = "Mixture"

    rule: Annotated[Rule, Option("Least forecast loss; in proportion to STS (--from); or evenly.")] = "forecast"
    estimator: Annotated[str | None, Option(f"Scores of that run to use: {', '.join(SIZES)}.")] = None
    weights: Annotated[
        Mapping[str, float], Option("Weight of a set's loss, as law=2 or train=0.5; repeatable.", "--weight")
    ] = field(default_factory=dict)
    protect: Annotated[Sequence[str], Option("Count only this domain; repeatable.")] = ()
    loss_left: Annotated[float, Option("Share of the training set's loss that training alone would leave.")] = LOSS_LEFT
    limit: Limit = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.loss_left < 1:
            raise InputError(f"--loss-left must lie between 0 and 1, not {self.loss_left:g}")


class MixingOptions(DrawingOptions, FieldsOptions, ReadingOptions, total=False):
    """`Mixing` as keywords."""

    rule: Rule
    estimator: str | None
    weights: Mapping[str, float]
    protect: Sequence[str]
    loss_left: float


@dataclass(frozen=True)
class MixedSet:
    """One set of the mixture: the training set, which is used whole, or a domain.

    share:        share of the budget; 0 for the training set
    n_examples:   its examples in the mixture; n_available: answered examples that it has
    loss:         loss before training, in nats per token of its answers
    alone, mixed: forecast change of that loss by training on the training set alone, and on the mixture, equally long
    alone_ci, mixed_ci: 95% interval over resamplings of the sets' prompts, with the same allotment

    Losses and forecasts are None where no model was given.
    """

    name: str
    share: float
    n_examples: int
    n_available: int
    loss: float | None = None
    alone: float | None = None
    alone_ci: Interval | None = None
    mixed: float | None = None
    mixed_ci: Interval | None = None


@dataclass(frozen=True)
class Mixture:
    """An allotment, its forecast, and the examples themselves.

    train, domains: see MixedSet
    settings:    the options, as in mix.json
    mean_change: forecast change of the weighted mean loss over domains, `alone` and `mixed`; None without a model
    examples:    (set, example) of the mixture, shuffled
    """

    rule: Rule
    budget: int
    train: MixedSet
    domains: list[MixedSet]
    mean_change: dict[str, float] | None
    settings: Document
    warnings: list[str]
    examples: list[tuple[str, Example]]

    def to_dict(self) -> Document:
        """The content of mix.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "rule": self.rule,
            "budget": self.budget,
            "train": _plain(self.train),
            "domains": [_plain(domain) for domain in self.domains],
            "mean_change": self.mean_change,
            "settings": self.settings,
            "warnings": self.warnings,
        }

    def save(self, folder: str | Path, *, write_for: Trainer | None = None, place: str | Path | None = None) -> None:
        """Writes mixed.jsonl, a conversation a line under `messages`, and then mix.json.

        write_for: trainer whose configuration is written too, see trainers
        place:     the folder that the files will lie in, where it is another one

        Raises InputError where the folder cannot be written to, or the trainer would misread the examples.
        """
        if write_for is not None:
            check_trainer(write_for, (example for _, example in self.examples))
        folder = Path(folder)
        files.prepare_folder(folder)
        content = self.to_dict()
        validate_mix(content)
        columns = {"messages": None}
        with files.atomic_path(folder / MIXED_FILE) as path, path.open("w", encoding="utf-8") as lines:
            for name, example in self.examples:
                turns = [turn for turn in (*example.turns, example.reply) if turn is not None]
                tools = [json.loads(turn.content) for turn in turns if turn.role == "tools"]
                messages = messages_of([turn for turn in turns if turn.role != "tools"])
                row = {"id": example.id, "set": name, "messages": messages} | ({"tools": tools[0]} if tools else {})
                columns |= {"tools": None} if tools else {}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        if write_for is not None:
            write_configuration(folder, write_for, Path(place or folder) / MIXED_FILE, columns)
        with files.atomic_path(folder / MIX_FILE) as path:
            path.write_text(files.to_json(content), encoding="utf-8")


@shows(Mixing, MixingOptions)
def mix(
    *,
    train: Source,
    pool: Sources,
    budget: int,
    model: str | Path | PreTrainedModel | None = None,
    sae: SAESource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: str | Path | None = None,
    **options: Unpack[MixingOptions],
) -> Mixture:
    """Allots `budget` further examples over domains, to be trained on together with the training set.

    The rules, where the training set makes up n / (n + budget) of the mixture:

    forecast      half of the budget evenly from all domains that count, against changes that no forecast foresees; the
                  other half such that the shares w of the whole minimise the forecast loss after training,
                      v_train L_train(w) + sum_T v_T L_T(w) / sum_T v_T,
                  with v the weights; see flow for L(w), and kernel for the passes over model and data
    proportional  w_T in proportion to STS, as in the paper: from `run`
    uniform       the same from every domain

    No domain gives more answered examples than it has; the other domains make up the shortfall.

    train: as for `score`; pool: the examples to choose from, by domain, in the forms of the domains of `score`
    model, sae:    as for `score`; needed by `forecast`. With them the result of every rule is forecast
    run:           folder of a run of `score`: no example that asks the same as its domains' questions is added
    options:       see Mixing

    Raises InputError, in one sentence with the remedy, for input that cannot be used.
    """
    mixing = Mixing(**options)
    rule, seed = mixing.rule, mixing.seed
    if budget < 1:
        raise InputError(f"--budget must be at least 1 example, not {budget}")
    if (model is None) != (sae is None) or (rule == "forecast" and model is None):
        raise InputError("a forecast needs both --model and --sae: give them, or mix by --rule proportional or uniform")
    if rule == "proportional" and run is None:
        raise InputError(
            "--rule proportional needs --from RUN (run): shares in proportion to STS come from a run of sts-fast score "
            "over the same domains"
        )
    if mixing.estimator is not None and rule != "proportional":
        raise InputError("--estimator chooses among the scores of a run: give it with --rule proportional")
    sets = Sets.read({TRAIN: train}, pool, None, mixing, "train")
    for line in sets.told():
        mixing.tell_line(line)
    pools = {
        name: [example for example in examples if example.answer is not None]
        for name, examples in {**sets.trains, **sets.domains}.items()
    }
    # A row that repeats another one is no further example to add; the training set is trained on as it is.
    pools |= {name: distinct(pools[name], with_answers=True) for name in sets.domains}
    refused: list[str] = []
    if run is not None:
        ngrams, unknown = _asked_in(run)
        if unknown:
            refused.append(f"of {listed(unknown)} only the questions that the run read are known, and kept out")
        for name in sets.domains:
            left = [example for example in pools[name] if not ngrams.sets_with(example.question)]
            if len(left) < len(pools[name]):
                refused.append(
                    f"{len(pools[name]) - len(left)} of the {len(pools[name])} examples of '{name}' ask the same as "
                    f"questions of the run's domains ({SAME}), and are not added"
                )
            pools[name] = left
    names = [name for name in pools if name != TRAIN]
    if same := [name for name in names if pools[name] and pools[name] == pools[TRAIN]]:
        raise InputError(f"domain '{same[0]}' is the training set itself: leave it out of --pool")
    if not names:
        raise InputError("there is no domain to take examples from: give one or more with --pool")
    available = np.asarray([len(pool) for pool in pools.values()])
    if available[0] == 0:
        raise InputError("the training set has no answered example: add answers, or name their column")
    if available[1:].sum() < budget:
        raise InputError(
            f"the pool has {available[1:].sum()} answered examples in all, fewer than the budget of {budget}: lower "
            "--budget, or add examples" + (f"; {refused[0]}" if refused else "")
        )
    counted = _weights(names, mixing.weights, mixing.protect)
    most = np.where(np.arange(len(pools)) == 0, 0, available / budget)
    train_share = float(available[0] / (available[0] + budget))

    kernel = flow = None
    if model is not None and sae is not None:
        kernel = _measure(pools, model, sae, tokenizer, mixing)
        flow = Flow.of(*kernel.means(), 0, mixing.loss_left)
    if rule == "forecast" and flow is not None:
        shares = least_loss(flow, 0, train_share, counted, most)
    else:
        by_scores = run if rule == "proportional" else None
        wanted = np.ones(len(names)) if by_scores is None else _scores(by_scores, names, mixing.estimator)
        shares = fill(np.concatenate([[0.0], wanted]), most)
    counts = whole_examples(shares, budget, np.where(np.arange(len(pools)) == 0, 0, available))
    mixed_sets = [
        MixedSet(name, float(shares[i]), int(available[i] if i == 0 else counts[i]), int(available[i]))
        for i, name in enumerate(pools)
    ]
    used_up = [
        f"'{mixed_set.name}' gives all its {mixed_set.n_available} answered examples, fewer than its share: the other "
        "domains make up the shortfall; add examples to it"
        for mixed_set in mixed_sets[1:]
        if mixed_set.n_examples == mixed_set.n_available < budget and mixed_set.n_examples > 0
    ]
    for warning in (*refused, *used_up):
        mixing.tell_line(f"warning: {warning}")
    mean_change = None
    if kernel is not None and flow is not None:
        trained_on = np.where(np.arange(len(pools)) == 0, available, counts) / (available[0] + budget)
        mixed_sets, mean_change = _with_forecast(mixed_sets, kernel, flow, trained_on, counted, seed)
    return Mixture(
        rule=rule,
        budget=budget,
        train=mixed_sets[0],
        domains=mixed_sets[1:],
        mean_change=mean_change,
        settings={
            "loss_left": mixing.loss_left,
            "weights": {name: float(weight) for name, weight in zip(pools, counted, strict=True)},
            "limit": mixing.limit,
            "seed": seed,
            "confidence": CONFIDENCE,
            "command": mixing.command,
        },
        warnings=[*(kernel.warnings if kernel is not None else []), *refused, *used_up],
        examples=_drawn(pools, [mixed_set.n_examples for mixed_set in mixed_sets], seed),
    )


def _asked_in(run: str | Path) -> tuple[NgramIndex, list[str]]:
    """The questions of a run's domains, and the files of these that are no longer as they were."""
    opened = Run.load(run)
    asked: dict[str, list[str]] = {}
    for row in opened.table(PROMPTS_FILE, ["stage", "domain", "question"]).to_pylist():
        if row["stage"] == "score" and row["question"] is not None:
            asked.setdefault(row["domain"], []).append(row["question"])
    unknown = []
    for entry in opened.scores["provenance"]["inputs"]:
        if entry["role"] == "domains":
            try:
                if files.sha256(entry["path"]) != entry["sha256"]:
                    raise InputError("it has changed")
                examples, _ = read_examples(origin_of(entry["path"], "domain", "domain"))
                asked[f"file {entry['path']}"] = [example.question for example in examples]
            except (OSError, InputError):
                unknown.append(entry["path"])
    return NgramIndex.of(asked), unknown


def _weights(names: Sequence[str], weights: Mapping[str, float], protect: Sequence[str]) -> Doubles:
    """[1 + n_domains] weight of each set's loss, the training set first; those of the domains sum to 1."""
    for name in (*weights, *protect):
        if name not in (*names, TRAIN) or (name == TRAIN and name in protect):
            raise InputError(f"a weight is given for '{name}', but the domains are {', '.join(names)}")
    for name, weight in weights.items():
        if not (np.isfinite(weight) and weight >= 0):
            raise InputError(f"the weight of '{name}' must be a number of at least 0, not {weight}")
    of_domains = np.asarray([weights.get(name, 1.0) * (not protect or name in protect) for name in names])
    if of_domains.sum() == 0:
        raise InputError("no domain counts: give at least one a weight above 0")
    return np.concatenate([[weights.get(TRAIN, 1.0)], of_domains / of_domains.sum()])


def _measure(
    pools: Mapping[str, list[Example]],
    model: str | Path | PreTrainedModel,
    sae: SAESource,
    tokenizer: PreTrainedTokenizerBase | None,
    mixing: Mixing,
) -> Kernel:
    purpose = Purpose(whole=True, needs=[("mix", "the whole model, and its gradients")])
    limit, seed = mixing.limit, mixing.seed
    session = Session.open(model, [sae], mixing, tokenizer=tokenizer, purpose=purpose)
    reader, [loaded_sae] = session.reader, session.saes
    hooked = HookedModel(
        session.whole, hook_layer(loaded_sae), name=reader.name, batch_tokens=mixing.batch_tokens, kept=session.kept
    )
    template, context_length = session.template, reader.context_length
    prompt_sets = [
        build_prompts(name, pool, template, tokens="answer", context_length=context_length, limit=limit, seed=seed)
        for name, pool in pools.items()
    ]
    for prompt_set in prompt_sets:
        check_enough(prompt_set, context_length, "train" if prompt_set is prompt_sets[0] else "domain")
    [fit] = session.check_fit(prompt_sets[0])
    kernel = measure_kernel(
        hooked, Features(loaded_sae), projection(loaded_sae.d_in, seed=seed), prompt_sets,
        tell=mixing.tell,
    )  # fmt: skip
    warnings = [*set_warnings(prompt_sets), *kernel.warnings]
    for warning in warnings:
        mixing.tell_line(f"warning: {warning}")
    return replace(kernel, warnings=[*filter(None, (fit.warning, fit.names)), *warnings])


def _scores(run: str | Path, names: Sequence[str], estimator: str | None) -> Doubles:
    """[n_domains] STS of each domain in a run."""
    of = {domain["name"]: domain["scores"] for domain in Run.load(run).scores["domains"]}
    has = [name for name in SIZES if all(name in scores for scores in of.values())]
    estimator = estimator or next(iter(has), None)
    if estimator not in has:
        raise InputError(f"{run} has no scores by '{estimator}', only by {', '.join(has) or 'none'}: name one of these")
    missing = [name for name in names if name not in of]
    if missing:
        raise InputError(f"{run} has no score of '{missing[0]}': run sts-fast score over the same domains")
    return np.asarray([float(of[name][estimator]["value"]) for name in names])


def _with_forecast(
    sets: Sequence[MixedSet], kernel: Kernel, flow: Flow, trained_on: Doubles, counted: Doubles, seed: int
) -> tuple[list[MixedSet], dict[str, float]]:
    """The sets with the forecast effects of training on the training set alone, and on the mixture."""
    # Every resampling has the same training time as the forecast.
    K, loss = kernel.resampled(N_BOOTSTRAP, seed)
    resampled = Flow.lasting(K, loss, flow.time)

    def forecast(shares: Doubles) -> tuple[Doubles, list[Interval]]:
        low, high = np.percentile(resampled.losses(shares) - resampled.loss, INTERVAL, axis=0)
        return flow.losses(shares) - flow.loss, list(zip(low.tolist(), high.tolist(), strict=True))

    (alone, alone_ci), (mixed, mixed_ci) = forecast(np.eye(len(sets))[0]), forecast(trained_on)
    with_forecast = [
        replace(
            mixed_set,
            loss=float(flow.loss[i]),
            alone=float(alone[i]),
            alone_ci=alone_ci[i],
            mixed=float(mixed[i]),
            mixed_ci=mixed_ci[i],
        )
        for i, mixed_set in enumerate(sets)
    ]
    return with_forecast, {
        "alone": float(np.einsum("t,t->", counted[1:], alone[1:])),
        "mixed": float(np.einsum("t,t->", counted[1:], mixed[1:])),
    }


def _drawn(pools: Mapping[str, list[Example]], counts: Sequence[int], seed: int) -> list[tuple[str, Example]]:
    """(set, example): `counts` examples of each set, drawn without replacement and shuffled."""
    rng = np.random.default_rng([seed, 1])
    chosen = [
        (name, pool[i])
        for (name, pool), count in zip(pools.items(), counts, strict=True)
        for i in sorted(rng.permutation(len(pool))[:count])
    ]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def mix_schema() -> Document:
    """The JSON schema of mix.json."""
    return files.load_schema("mix/mix.schema.json")


def validate_mix(mixture: Document) -> None:
    """Raises jsonschema.ValidationError where a document is not a valid mix.json."""
    files.check_document(mixture, mix_schema())


def _plain(mixed_set: MixedSet) -> Document:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(mixed_set).items()}
