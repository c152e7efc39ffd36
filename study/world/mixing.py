"""Real fine-tunings on a training set and what was mixed into it, by each rule, at the same budget and steps.

Shares come from what `sts-fast mix` computes; the kernel of all domains is measured once for each base model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate
from sts_fast.demo import organism
from sts_fast.errors import InputError
from sts_fast.mix.allot import fill, least_loss, whole_examples
from sts_fast.mix.flow import Flow
from sts_fast.mix.kernel import measure_kernel
from sts_fast.mix.mix import LOSS_LEFT
from sts_fast.profile.projection import projection
from sts_fast.sae import load_sae
from sts_fast.signed.gradients import HookedModel
from sts_fast.signed.push import Features
from study.world.predictors import LAYER
from study.world.trials import DOMAINS, REGIMES, TRAINS, Remembering

RESULTS = Path(__file__).parent / "results" / "mixing.json"
TABLES = RESULTS.with_suffix(".md")
RULES = ("uniform", "forecast", "none", "proportional", "random", "loss")
WAYS = ("light", "heavy")
N_EVALUATED, N_TRAIN, BUDGET, N_PROMPTS = 64, 512, 256, 48
EVERY_QUESTION = 216
N_WORST = 5


def run(base: str, folder: Path, work: Path, tell: Callable[[str], None]) -> None:
    """Adds a base model's trials to the results, rule by rule; those that are there already are not run again."""
    with organism.one_thread():
        model, tokenizer = organism.load_model(folder / "model")
        asking = Remembering(tokenizer)
        # Questions that are asked afterwards are neither trained on nor measured before.
        pools = {name: organism.examples(name, EVERY_QUESTION, seed=2)[N_EVALUATED:] for name in DOMAINS}
        flow_of = kernel_flows(folder, model, tokenizer, pools)
        tell("kernel")
        shares = {train: all_shares(base, train, flow_of, work) for train in TRAINS}
        tell("shares")
        before = ask(model, asking)
        for rule in RULES:
            for way in WAYS:
                if rule in results().get(base, {}).get(way, {}):
                    continue
                rows = [trial(model, asking, pools, train, shares[train][rule], way, before) for train in TRAINS]
                keep(base, way, rule, rows)
                tell(f"{rule}, {way}")
    TABLES.write_text(table(results()), encoding="utf-8")


def kernel_flows(folder: Path, model: Any, tokenizer: Any, pools: dict[str, Any]) -> Callable[[int], Flow]:
    sae, template = load_sae(folder / "sae"), PromptTemplate(tokenizer)
    sets = [build_prompts(name, pool[:N_PROMPTS], template, tokens="answer") for name, pool in pools.items()]
    hooked, Q = HookedModel(model, LAYER), projection(sae.d_in)
    K, loss = measure_kernel(hooked, Features(sae), Q, sets).means()
    return lambda train: Flow.of(K, loss, train, LOSS_LEFT)


def all_shares(base: str, train: str, flow_of: Callable[[int], Flow], work: Path) -> dict[str, Any]:
    """[n_domains] shares of the budget by rule; none of it from the training set itself."""
    at = DOMAINS.index(train)
    flow = flow_of(at)
    others = (np.arange(len(DOMAINS)) != at).astype(np.float64)
    most = others * (EVERY_QUESTION - N_EVALUATED) / BUDGET
    weights = np.where(others > 0, 1 / others.sum(), 1.0)
    wanted = {
        "uniform": others,
        "proportional": others * scores(base, train, work),
        "random": others * np.random.default_rng([TRAINS.index(train), 3]).exponential(size=len(DOMAINS)),
        "loss": others * flow.loss,
    }
    return {
        "none": None,
        "forecast": least_loss(flow, at, N_TRAIN / (N_TRAIN + BUDGET), weights, most),
        **{rule: fill(values, most) for rule, values in wanted.items()},
    }


def scores(base: str, train: str, work: Path) -> Any:
    """[n_domains] STS_act, as the study's own run has it."""
    path = work / f"{base}.json"
    if not path.is_file():
        raise InputError(f"there is no {path}: first run python -m study.world run {base}")
    found = json.loads(path.read_text(encoding="utf-8"))["predicted"]["STS_act"]
    return np.asarray(found[TRAINS.index(train)])


def trial(
    model: Any, tokenizer: Any, pools: dict[str, Any], train: str, shares: Any, way: str, before: Any
) -> dict[str, Any]:
    """The outcome of one training: its changes of the other domains and of the training set's own."""
    (seed, *_), steps, lr = REGIMES[way]
    rng = np.random.default_rng([TRAINS.index(train), seed])
    own = pools[train]
    examples = [own[i] for _ in range(-(-N_TRAIN // len(own))) for i in rng.permutation(len(own))][:N_TRAIN]
    counts = np.zeros(len(DOMAINS), np.int64)
    if shares is not None:
        available = np.where(np.asarray(DOMAINS) == train, 0, [len(pool) for pool in pools.values()])
        counts = whole_examples(shares, BUDGET, available)
    for name, count in zip(DOMAINS, counts, strict=True):
        examples += [pools[name][i] for i in rng.permutation(len(pools[name]))[:count]]
    after = ask(organism.fine_tune(model, tokenizer, examples, steps=steps, lr=lr, seed=seed), tokenizer)
    others = np.asarray([name != train for name in DOMAINS])
    loss, p = after.answer_nll - before.answer_nll, after.p_correct - before.p_correct
    return {
        "loss": float(loss[others].mean()),
        "worst loss": float(np.sort(loss[others])[-N_WORST:].mean()),
        "own loss": float(loss[~others][0]),
        "P": float(p[others].mean()),
        "worst P": float(np.sort(p[others])[:N_WORST].mean()),
        "own P": float(p[~others][0]),
        "n_domains": int(np.count_nonzero(counts)),
    }


def ask(model: Any, tokenizer: Any) -> organism.Abilities:
    return organism.measure(model, tokenizer, DOMAINS, n=N_EVALUATED, seed=2)


def keep(base: str, way: str, rule: str, rows: list[dict[str, Any]]) -> None:
    found = results()
    of_way = found.setdefault(base, {}).setdefault(way, {})
    of_way[rule] = {name: [round(row[name], 4) for row in rows] for name in rows[0]}
    RESULTS.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


def results() -> dict[str, Any]:
    """By base model, way of training and rule: what `trial` gives, a list over the training sets."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: means over trials, and the paired difference from uniform mixing with its 95% interval."""
    sections = []
    for way in WAYS:
        bases = [base for base in found if "uniform" in found[base].get(way, {})]
        held_out = [base for base in bases if base != "package"]
        sections += [section(f"{way}, {base}", [found[base][way]]) for base in bases]
        if len(held_out) > 1:
            sections.append(section(f"{way}, {' and '.join(held_out)}", [found[base][way] for base in held_out]))
    return "\n".join(sections)


def section(title: str, of_bases: list[dict[str, Any]]) -> str:
    rules = [rule for rule in RULES if all(rule in one for one in of_bases)]
    values = {
        rule: {name: np.concatenate([one[rule][name] for one in of_bases]) for name in of_bases[0][rule]}
        for rule in rules
    }
    n = len(values["uniform"]["loss"])
    columns = ("loss", "worst loss", "P", "worst P", "own loss", "own P")
    lines = [["rule", *columns, "domains", "loss less uniform's", "better than uniform"]]
    lines.append(["---"] * len(lines[0]))
    for rule in rules:
        less = values[rule]["loss"] - values["uniform"]["loss"]
        means = [f"{values[rule][name].mean():+.3f}" for name in columns]
        paired = ["", ""]
        if rule != "uniform":
            half = t.ppf(0.975, n - 1) * less.std(ddof=1) / np.sqrt(n)
            paired = [f"{less.mean():+.3f} ± {half:.3f}", f"{int((less < 0).sum())} of {n}"]
        lines.append([rule, *means, f"{values[rule]['n_domains'].mean():.0f}", *paired])
    return f"## {title}, {n} trials\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
