"""The forecast: which features a training set shifts, and how strongly each domain leans on them."""

from __future__ import annotations

import datetime
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sts_fast import _cpu, results
from sts_fast._version import __version__
from sts_fast.capture import Decoder, capture, load_decoder, load_tokenizer
from sts_fast.correlate import CorrelationStats
from sts_fast.encode import encode
from sts_fast.errors import InputError
from sts_fast.examples import Example, load_domains, load_examples
from sts_fast.prompts import PromptSet, PromptTemplate, TokenClass, build_prompts, choose_demos
from sts_fast.results import ESTIMATORS, DomainScore, Estimator, Forecast, Interval, PromptLog, ShiftedFeature
from sts_fast.sae import SAE, load_sae
from sts_fast.shift import ShiftStats, top_indices

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Doubles = NDArray[np.float64]

Dims = Literal["icl", "tuned", "active"]
Source = str | Path | Sequence[Example]
Progress = Callable[[str, int, int], None]

MIN_PROMPTS = 8
N_BOOTSTRAP = 1000
CONFIDENCE = 0.95
# Resamplings of the training prompts that tell how settled D_N is; each costs one float64 per feature.
N_REPLICATES = 32
# Sets of random features that the control averages over: one set alone would be as noisy as what it is to judge.
N_RANDOM_SETS = 10


@dataclass(frozen=True)
class _Features:
    """The features that the score stage reads.

    columns:  [n_columns] int64, ascending: D_N and the random control's
    in_top:   [n_columns] 1.0 where in D_N, else 0.0
    in_random: [n_columns] share of the random sets that hold the feature
    """

    columns: NDArray[np.int64]
    in_top: Doubles
    in_random: Doubles


def score(
    *,
    model: str | Path | PreTrainedModel,
    sae: str | Path | SAE,
    train: Source,
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tuned: str | Path | PreTrainedModel | None = None,
    dims: Dims = "icl",
    estimators: Sequence[Estimator] = ("act", "icl"),
    shots: int = 2,
    domain_shots: int = 5,
    top_n: int = 100,
    tokens: TokenClass = "query",
    limit: int | None = 256,
    question_fields: Mapping[str, str] | None = None,
    answer_fields: Mapping[str, str] | None = None,
    layer: int | None = None,
    dtype: str = "auto",
    sae_dtype: str | None = None,
    device: str = "auto",
    batch_tokens: int = 8192,
    seed: int = 0,
    command: str | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """Forecasts how strongly training on `train` will move each domain, before any training.

    model:     folder or hub id of a causal language model, or one in memory (then with its `tokenizer`)
    sae:       an SAE of its residual stream: folder, 'release/id', or one loaded by load_sae
    train:     the training set: a file, a folder, or examples
    domains:   the abilities to forecast, by name, or as on the command line (see load_domains); none at all measures
               the shift of the training set alone
    demos:     examples to demonstrate with, in the same forms, by domain name, and under 'train' for the training set;
               by default the first answered examples of each set
    dims:      what the shifted features D_N are taken from: 'icl' (demonstrations of the training set in context),
               'tuned' (the model after training, given as `tuned`), 'active' (most active, no demonstrations)
    estimators: any of 'act', 'icl', 'act_sq'; see DomainScore for the equations
    shots, domain_shots: demonstrations of the training set (for D_N), of each domain (for 'icl')
    top_n:     size of D_N
    tokens:    which tokens are read; see build_prompts
    limit:     most prompts of a set, drawn at random; None for all
    question_fields, answer_fields: columns to read, by set name ('train', a domain's), '' for all others
    layer:     reads the residual stream after this layer, whatever the SAE's files say
    dtype, device: of the model, see load_decoder; sae_dtype: 'float32' or 'bfloat16', by default as stored
    batch_tokens: most tokens of one padded forward pass
    command:   recorded in the provenance
    progress:  called with (stage, prompts done, prompts in all)

    Raises InputError, in one sentence with the remedy, for whatever in the input cannot be used, and ValueError for
    an option outside its choices.
    """
    _check_options(dims, estimators, tuned, shots, domain_shots, top_n, limit, batch_tokens)
    sae = sae if isinstance(sae, SAE) else load_sae(sae, layer=layer)
    if sae_dtype is not None:
        sae = sae.with_dtype(sae_dtype)
    read_layer = sae.hook_layer if layer is None else layer
    if read_layer is None:
        raise InputError(f"the SAE {sae.source} does not say which layer it reads: give --layer")
    if top_n > sae.d_sae:
        raise InputError(f"--top-n is {top_n}, but the SAE {sae.source} has {sae.d_sae} features")

    fields = _Fields(question_fields or {}, answer_fields or {})
    train_examples = fields.read("train", train)
    domain_examples = _read_sets(domains, fields, ["train"])
    if "train" in domain_examples:
        raise InputError("a domain cannot be called 'train', the name of the training set: rename it, as in new=path")
    demo_examples = _read_demos(demos or {}, fields, ["train", *domain_examples])

    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or load_tokenizer(model)
        decoder = load_decoder(model, read_layer, dtype=dtype, device=device)
    else:
        decoder = Decoder(model, read_layer)
    if tokenizer is None:
        raise ValueError("a model in memory needs its tokenizer: score(..., tokenizer=...)")
    _check_fit(sae, decoder)
    tuned_decoder = None
    if tuned is not None:
        tuned_decoder = (
            load_decoder(tuned, read_layer, dtype=dtype, device=device)
            if isinstance(tuned, (str, Path))
            else Decoder(tuned, read_layer, name="the tuned model")
        )
        _check_fit(sae, tuned_decoder)

    template = PromptTemplate(tokenizer, prepend_bos=sae.prepend_bos)

    def prompts_of(name: str, examples: list[Example], n_shots: int, demos_key: str) -> PromptSet:
        shown, queries = choose_demos(name, examples, n_shots, demo_examples.get(demos_key) if n_shots else None)
        prompt_set = build_prompts(
            name,
            queries,
            template,
            demos=shown,
            tokens=tokens,
            context_length=decoder.context_length,
            limit=limit,
            seed=seed,
        )
        _check_enough(prompt_set, decoder.context_length)
        return prompt_set

    # Every set is made ready before the first forward pass, so that bad input is told at once.
    train_set = prompts_of("train", train_examples, shots if dims == "icl" else 0, "train")
    domain_sets = [
        prompts_of(name, examples, domain_shots if "icl" in estimators else 0, name)
        for name, examples in domain_examples.items()
    ]

    tell = progress or (lambda stage, done, total: None)
    rng = np.random.default_rng([seed, zlib.crc32(b"shift")])
    stats, importance, replicates, train_rows, counts = _measure_shift(
        decoder, sae, train_set, dims, tuned_decoder, rng, batch_tokens, tell
    )
    top = top_indices(importance, top_n)
    random_sets = _random_sets(sae.d_sae, top, np.random.default_rng([seed, zlib.crc32(b"random features")]))
    features = _features(top, random_sets)
    tables, domain_scores = [train_rows], []
    for domain_set in domain_sets:
        rng = np.random.default_rng([seed, zlib.crc32(domain_set.name.encode())])
        domain_score, table = _score_domain(decoder, sae, domain_set, features, estimators, rng, batch_tokens, tell)
        domain_scores.append(domain_score)
        tables.append(table)

    import pyarrow as pa

    n_moved = int((importance > 0).sum())
    warnings = [f"SAE: {note}" for note in sae.notes]
    if n_moved < top_n:
        warnings.append(
            f"only {n_moved} features shift at all, so {top_n - n_moved} of the {top_n} in D_N stand there by their "
            "index alone: lower --top-n"
        )
    stability = [len(np.intersect1d(top, top_indices(replicate, top_n))) / top_n for replicate in replicates.T]
    total = float(importance.sum())
    mean_base = (stats.sum_base if isinstance(stats, ShiftStats) else stats.sum_h) / stats.n_tokens
    n_fired = stats.n_fired_base if isinstance(stats, ShiftStats) else stats.n_fired
    return Forecast(
        model={
            "name": decoder.name,
            "layer": decoder.layer,
            "d_in": decoder.d_in,
            "dtype": str(next(decoder.model.parameters()).dtype).removeprefix("torch."),
            "context_length": decoder.context_length,
        },
        sae={
            "source": sae.source,
            "architecture": sae.architecture,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "k": sae.k or None,
            "hook_name": sae.hook_name,
            "mean_l0": float(n_fired.sum()) / stats.n_tokens,
        },
        train={"name": "train", "n_prompts": len(train_set.prompts), **_skipped(train_set), **counts},
        settings={
            "dims": dims,
            "estimators": list(estimators),
            "top_n": top_n,
            "tokens": tokens,
            "shots": shots,
            "domain_shots": domain_shots,
            "limit": limit,
            "n_bootstrap": N_BOOTSTRAP,
            "confidence": CONFIDENCE,
            "tuned": None if tuned_decoder is None else tuned_decoder.name,
        },
        shift={
            "share_of_top_n": float(importance[top].sum() / total) if total else 0.0,
            "n_features_shifted": n_moved,
            "stability": {
                "n_replicates": N_REPLICATES,
                "mean_overlap": float(np.mean(stability)),
                "overlap_ci": list(_interval(np.asarray(stability))),
            },
        },
        domains=domain_scores,
        shifted_features=[
            ShiftedFeature(
                index=int(j),
                mean_squared_shift=float(stats.mean_squared_shift[j]) if isinstance(stats, ShiftStats) else None,
                mean_activation=float(mean_base[j]),
                share=float(importance[j] / total) if total else 0.0,
            )
            for j in top
        ],
        warnings=warnings,
        provenance=_provenance(model, sae, train, domains, demos, tuned, seed, command),
        stats=stats,
        random_features=random_sets,
        prompts=pa.concat_tables(tables),
    )


def _check_options(
    dims: str,
    estimators: Sequence[str],
    tuned: object,
    shots: int,
    domain_shots: int,
    top_n: int,
    limit: int | None,
    batch_tokens: int,
) -> None:
    if dims not in get_args(Dims):
        raise InputError(f"dims must be one of {', '.join(get_args(Dims))}, not '{dims}'")
    for estimator in estimators:
        if estimator not in ESTIMATORS:
            raise InputError(f"estimators must be among {', '.join(ESTIMATORS)}, not '{estimator}'")
    if not estimators or len(set(estimators)) < len(estimators):
        raise InputError("estimators must name one or more, each once")
    if (dims == "tuned") != (tuned is not None):
        raise InputError("--dims tuned and --tuned MODEL go together: the true shift needs the model after training")
    for name, value in (
        ("shots", shots),
        ("domain-shots", domain_shots),
        ("top-n", top_n),
        ("limit", limit),
        ("batch-tokens", batch_tokens),
    ):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")


def _check_fit(sae: SAE, decoder: Decoder) -> None:
    if sae.d_in != decoder.d_in:
        raise InputError(
            f"the SAE {sae.source} reads {sae.d_in} dimensions, but the residual stream of {decoder.name} has "
            f"{decoder.d_in}: give an SAE that was trained on this model"
        )


def _check_enough(prompt_set: PromptSet, context_length: int | None) -> None:
    n = len(prompt_set.prompts)
    if n >= MIN_PROMPTS:
        return
    reasons = []
    if prompt_set.n_too_long:
        reasons.append(
            f"{prompt_set.n_too_long} overran the model's context of {context_length} tokens: show fewer or shorter "
            "demonstrations, or add shorter questions"
        )
    if prompt_set.n_unanswered:
        reasons.append(f"{prompt_set.n_unanswered} have no answer to read: add answers, or use --tokens query")
    reason = "; ".join(reasons) or "add examples, or raise --limit"
    kind = "the training set" if prompt_set.name == "train" else f"domain '{prompt_set.name}'"
    raise InputError(f"{kind} keeps {n} prompts, but at least {MIN_PROMPTS} are needed ({reason})")


@dataclass(frozen=True)
class _Fields:
    """Which columns hold questions and answers, by set name; '' for all sets not named."""

    question: Mapping[str, str]
    answer: Mapping[str, str]

    def read(self, name: str, source: Source) -> list[Example]:
        if not isinstance(source, (str, Path)):
            return list(source)
        return load_examples(
            source,
            question_field=self.question.get(name, self.question.get("")),
            answer_field=self.answer.get(name, self.answer.get("")),
        )


def _read_sets(
    sets: Mapping[str, Source] | Sequence[str], fields: _Fields, other_names: Sequence[str]
) -> dict[str, list[Example]]:
    if isinstance(sets, Mapping):
        return {name: fields.read(name, source) for name, source in sets.items()}
    if not sets:
        return {}
    return load_domains(sets, question_fields=fields.question, answer_fields=fields.answer, other_names=other_names)


def _read_demos(
    demos: Mapping[str, Source] | Sequence[str], fields: _Fields, names: Sequence[str]
) -> dict[str, list[Example]]:
    """Demonstrations by set; a file split by category may hold more categories than there are domains."""
    groups = [demos] if isinstance(demos, Mapping) else [[source] for source in demos]
    found: dict[str, list[Example]] = {}
    for group in groups:
        examples = _read_sets(group, fields, [*fields.question, *fields.answer])
        unknown = [name for name in examples if name not in names]
        if unknown and (isinstance(group, Mapping) or len(unknown) == len(examples)):
            raise InputError(f"demonstrations are given for '{unknown[0]}', but the sets are {', '.join(names)}")
        found |= {name: examples[name] for name in examples if name in names}
    return found


def _measure_shift(
    decoder: Decoder,
    sae: SAE,
    prompt_set: PromptSet,
    dims: Dims,
    tuned: Decoder | None,
    rng: np.random.Generator,
    batch_tokens: int,
    tell: Progress,
) -> tuple[ShiftStats | CorrelationStats, Doubles, Doubles, pa.Table, dict[str, int]]:
    """Sums over the training set, [d_sae] what D_N is ranked by, the same for each resampling, prompts, counts."""
    prompts = prompt_set.prompts
    n_prompts = len(prompts)
    # [n_prompts, N_REPLICATES] how often each resampling of the prompts drew each of them.
    draws = rng.multinomial(n_prompts, [1 / n_prompts] * n_prompts, size=N_REPLICATES).T.astype(np.float64)
    log = PromptLog("shift", prompt_set)
    shift_stats = ShiftStats(sae, n_replicates=N_REPLICATES)
    active_stats = CorrelationStats(sae, N_REPLICATES)
    done = 0
    for rows in capture(decoder, prompts, batch_tokens=batch_tokens, other=tuned):
        if dims == "active":
            active_stats.update(rows.base, draws[rows.base_of])
        else:
            shift_stats.update(rows.paired, rows.demos, draws[rows.paired_of])
        log.record(rows)
        done += len(rows.prompts)
        tell("shift", done, n_prompts)
    stats = active_stats if dims == "active" else shift_stats
    if stats.n_tokens == 0:
        raise InputError("the training set has no token in common between its prompts without and with demonstrations")
    if dims == "active":
        importance = active_stats.sum_h
        replicates = active_stats.sum_hy + np.outer(active_stats.sum_h, active_stats.origin)
    else:
        importance, replicates = shift_stats.sum_sq_shift, shift_stats.weighted_sq_shift
    return stats, importance / stats.n_tokens, replicates, log.table({}), log.counts()


def _random_sets(d_sae: int, top: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """[N_RANDOM_SETS, top_n] features drawn outside D_N (or from all of them where too few lie outside)."""
    outside = np.setdiff1d(np.arange(d_sae), top)
    pool = outside if len(outside) >= len(top) else np.arange(d_sae)
    return np.stack([np.sort(rng.choice(pool, len(top), replace=False)) for _ in range(N_RANDOM_SETS)])


def _features(top: NDArray[np.int64], random_sets: NDArray[np.int64]) -> _Features:
    columns = np.unique(np.concatenate([top, *random_sets]))
    return _Features(
        columns=columns,
        in_top=np.isin(columns, top).astype(np.float64),
        in_random=np.sum([np.isin(columns, features) for features in random_sets], axis=0) / len(random_sets),
    )


def _score_domain(
    decoder: Decoder,
    sae: SAE,
    prompt_set: PromptSet,
    features: _Features,
    estimators: Sequence[Estimator],
    rng: np.random.Generator,
    batch_tokens: int,
    tell: Progress,
) -> tuple[DomainScore, pa.Table]:
    n_prompts = len(prompt_set.prompts)
    log = PromptLog("score", prompt_set)
    sums = {f"{control}{estimator}_sum": np.zeros(n_prompts) for control in ("", "random_") for estimator in estimators}
    weights = {"": features.in_top, "random_": features.in_random}
    done = 0
    for rows in capture(decoder, prompt_set.prompts, batch_tokens=batch_tokens):
        if "act" in estimators or "act_sq" in estimators:
            active = encode(sae, rows.base, features.columns)
            prompt_of = np.repeat(rows.base_of, np.diff(active.indptr))
            column_of = np.searchsorted(features.columns, active.indices)
            values = active.values.astype(np.float64)
            for control, weight in weights.items():
                for estimator, term in (("act", values), ("act_sq", values**2)):
                    if estimator in estimators:
                        sums[f"{control}{estimator}_sum"] += np.bincount(
                            prompt_of, weight[column_of] * term, minlength=n_prompts
                        )
        if "icl" in estimators:
            # One "replicate" per prompt, so that a single pass over the rows gives each prompt its own sums.
            of_prompt = (rows.paired_of[:, None] == np.asarray(rows.prompts)).astype(np.float64)
            stats = ShiftStats(sae, columns=features.columns, n_replicates=len(rows.prompts))
            stats.update(rows.paired, rows.demos, of_prompt)
            for control, weight in weights.items():
                sums[f"{control}icl_sum"][rows.prompts] = np.einsum("j,jp->p", weight, stats.weighted_sq_shift)
        log.record(rows)
        done += len(rows.prompts)
        tell(prompt_set.name, done, n_prompts)

    top_n = int(features.in_top.sum())
    n_read, n_pairs = log.n_read.astype(np.float64), log.n_pairs.astype(np.float64)
    denominators = {"act": n_read, "icl": n_pairs, "act_sq": n_read * top_n}
    value: dict[str, float | None] = dict.fromkeys(ESTIMATORS)
    interval: dict[str, Interval | None] = dict.fromkeys(ESTIMATORS)
    random: dict[str, float | None] = {}
    resamples = _resamples(n_prompts, rng)
    for estimator in estimators:
        numerator, denominator = sums[f"{estimator}_sum"], denominators[estimator]
        if denominator.sum() == 0:
            raise InputError(
                f"domain '{prompt_set.name}' has no token to read for the estimator '{estimator}': its prompts without "
                "and with demonstrations end differently, or all their tokens are special"
            )
        value[estimator] = float(numerator.sum() / denominator.sum())
        interval[estimator] = bootstrap_interval(numerator, denominator, resamples)
        random[f"sts_{estimator}"] = float(sums[f"random_{estimator}_sum"].sum() / denominator.sum())
    counts = log.counts()
    return (
        DomainScore(
            name=prompt_set.name,
            sts_act=value["act"],
            sts_act_ci=interval["act"],
            sts_icl=value["icl"],
            sts_icl_ci=interval["icl"],
            sts_act_sq=value["act_sq"],
            sts_act_sq_ci=interval["act_sq"],
            n_prompts=n_prompts,
            **_skipped(prompt_set),
            **counts,
            controls={"random": random},
        ),
        log.table(sums),
    )


def _resamples(n_prompts: int, rng: np.random.Generator) -> Doubles:
    """[N_BOOTSTRAP, n_prompts] how often each resampling of the prompts drew each of them."""
    return rng.multinomial(n_prompts, [1 / n_prompts] * n_prompts, size=N_BOOTSTRAP).astype(np.float64)


def bootstrap_interval(numerator: Doubles, denominator: Doubles, resamples: Doubles) -> Interval:
    """95% percentile interval of sum(numerator) / sum(denominator) under resampling of prompts.

    numerator, denominator: [n_prompts] sum over a prompt's tokens, number of them
    resamples: [n_resamples, n_prompts] how often each resampling drew each prompt

    Tokens of one prompt depend on each other, so whole prompts are drawn, numerator and denominator together.
    """
    # einsum adds in one order; a BLAS product would depend on the number of threads.
    totals = np.einsum("rp,p->r", resamples, denominator)
    ratios = np.einsum("rp,p->r", resamples, numerator)[totals > 0] / totals[totals > 0]
    return _interval(ratios)


def _interval(values: Doubles) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _skipped(prompt_set: PromptSet) -> dict[str, int]:
    return {
        "n_skipped": prompt_set.n_too_long + prompt_set.n_unanswered,
        "n_too_long": prompt_set.n_too_long,
        "n_unanswered": prompt_set.n_unanswered,
    }


def _provenance(
    model: object,
    sae: SAE,
    train: Source,
    domains: Mapping[str, Source] | Sequence[str],
    demos: Mapping[str, Source] | Sequence[str] | None,
    tuned: object,
    seed: int,
    command: str | None,
) -> dict[str, Any]:
    import torch
    import transformers

    named: list[tuple[str, object]] = [("model", model), ("tuned", tuned), ("sae", sae.source), ("train", train)]
    for role, sets in (("domains", domains), ("demos", demos or {})):
        named += [(role, source) for source in (sets.values() if isinstance(sets, Mapping) else sets)]
    inputs = []
    for role, source in named:
        path = _existing_path(source)
        inputs += results.hashed_inputs(role, [path]) if path else []
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "versions": {
            "sts_fast": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "instruction_set": _cpu.instruction_set(),
        "inputs": inputs,
    }


def _existing_path(source: object) -> Path | None:
    """The file or folder behind a path or 'name=path'; None for hub ids and for what is in memory."""
    if not isinstance(source, (str, Path)):
        return None
    candidates = [Path(source), Path(str(source).partition("=")[2] or source)]
    return next((path for path in candidates if path.exists()), None)
