"""What is tried on the design part before forecasts are frozen: gradients of all weights, and trials of many lengths.

Everything here is of design sets and design domains; `results/design.json` has every configuration that was looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sts_fast.signed.gradients import frozen
from sts_fast.signed.small_areas import Domain, domain_means
from sts_fast.signed.trial import low_rank_maps
from study.real import runs
from study.real.agreement import Number
from study.real.measure import Asked, Asking, measure
from study.real.model import keep_freed_memory, load_model
from study.real.runs import Tell
from study.real.sets import DEMONSTRATIONS, read_rows
from study.real.sources import Row
from study.real.training import BATCH_ROWS, N_HELD_OUT, answer_loss, products

N_QUESTIONS = 16  # of a domain; N_ROWS: of a training set, for its gradient
N_ROWS = 32
# Learning rates of low-rank trials, and the steps after which they are looked at.
RATES, STEPS = (1e-3, 3e-3), (2, 4, 8, 16)
# Questions of a domain of which its fall is estimated, the first ones.
ASKED_AGAIN = (4, 8, 16)

RESULTS = runs.RESULTS / "design"


def explore(work: Path, tell: Tell) -> None:
    """Writes what is not there yet: a file of kernels, and one of trials for each training set and rate."""
    torch.set_num_threads(1)
    keep_freed_memory()
    part = runs.read_json(runs.RESULTS / "split.json")["design"]
    model, tokenizer = load_model(work / "model")
    asking = Asking(tokenizer)
    trains = {name: read_rows(work / "train" / f"{name}.jsonl")[:-N_HELD_OUT] for name in part["trains"]}
    domains = {
        name: read_rows(work / "domains" / f"{name}.jsonl")[DEMONSTRATIONS:][:N_QUESTIONS] for name in part["domains"]
    }
    if not (RESULTS / "kernels.json").exists():
        runs.write_json(RESULTS / "kernels.json", kernels(model, asking, trains, domains, tell))
    for rate in RATES:
        for name, rows in trains.items():
            path = RESULTS / f"trial {name} {rate:g}.json"
            if not path.exists():
                runs.write_json(path, trial(model, asking, rows, domains, rate))
                tell(f"trial of {name} at {rate:g}")


def trial(
    model: Any, asking: Asking, rows: list[Row], domains: dict[str, list[Row]], rate: float
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Steps -> domain -> measure -> [n_questions] after that many steps of a low-rank trial; 0 is before."""
    items, rng, order = [asking.asked(row) for row in rows], np.random.default_rng(0), []
    found = {"0": measured(model, asking, domains)}
    with frozen(model), low_rank_maps(model, seed=0) as maps:
        optimizer = torch.optim.Adam(maps, lr=rate)
        for step in range(1, max(STEPS) + 1):
            order = order or rng.permutation(len(items)).tolist()
            batch, order = [items[i] for i in order[:BATCH_ROWS]], order[BATCH_ROWS:]
            loss = answer_loss(model, [(item.question, item.answer) for item in batch], asking.end)
            for weight, gradient in zip(maps, torch.autograd.grad(loss, maps), strict=True):
                weight.grad = gradient
            optimizer.step()
            if step in STEPS:
                found[str(step)] = measured(model, asking, domains)
    return found


def measured(model: Any, asking: Asking, domains: dict[str, list[Row]]) -> dict[str, dict[str, list[float]]]:
    with products():
        values = measure(model, asking, [row for rows in domains.values() for row in rows])
    return runs.parted(values, domains)


def kernels(
    model: Any, asking: Asking, trains: dict[str, list[Row]], domains: dict[str, list[Row]], tell: Tell
) -> dict[str, Any]:
    """Training set -> domain -> group of weights -> inner products of their gradients, and of its sign with the other.

    'norms' has the squared norms of the gradients by set, kind and group.
    """
    weights = dict(model.named_parameters())
    groups = {name: group_of(name) for name in weights}
    of_trains = {}
    for name, rows in trains.items():
        of_trains[name] = gradient(model, [asking.asked(row) for row in rows[:N_ROWS]], asking)
        tell(f"gradient of {name}")
    found: dict[str, Any] = {name: {} for name in trains} | {"norms": {}}
    for name, of_train in of_trains.items():
        found["norms"][f"train {name}"] = by_group(groups, of_train, of_train)
    for domain, rows in domains.items():
        of_domain = gradient(model, [asking.asked(row) for row in rows], asking)
        found["norms"][f"domain {domain}"] = by_group(groups, of_domain, of_domain)
        for name, of_train in of_trains.items():
            signs = {weight: part.sign() for weight, part in of_train.items()}
            found[name][domain] = {
                "inner": by_group(groups, of_train, of_domain),
                "sign": by_group(groups, signs, of_domain),
            }
        tell(f"gradient of {domain}")
    return found


def group_of(name: str) -> str:
    """'embedding', 'norm', or the third of the layers and whether of attention or MLP: 'early mlp'."""
    if "embed" in name or "lm_head" in name:
        return "embedding"
    if "norm" in name:
        return "norm"
    third = ("early", "middle", "late")[int(name.split(".layers.")[1].split(".")[0]) // 10]
    return f"{third} {'mlp' if '.mlp.' in name else 'attention'}"


def by_group(groups: dict[str, str], one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, group in groups.items():
        sums[group] = sums.get(group, 0.0) + float(torch.dot(one[name].flatten(), other[name].flatten()))
    return {group: float(f"{value:.6g}") for group, value in sums.items()}


def gradient(model: Any, items: list[Asked], asking: Asking) -> dict[str, torch.Tensor]:
    """Of the mean over rows of their loss per token, for every weight."""
    weights = dict(model.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for item in items:
        loss = answer_loss(model, [(item.question, item.answer)], asking.end) / len(items)
        for name, part in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += part
    return total


def looked_at() -> list[Number]:
    """Every configuration of which there are results, as numbers that are held against outcomes."""
    found = [number for rate in RATES for number in _trials(rate)]
    path = RESULTS / "kernels.json"
    return found + (_kernels(runs.read_json(path)) if path.exists() else [])


def _trials(rate: float) -> list[Number]:
    """Falls after each number of steps: of the loss, plain means and by small areas, and of its first tokens alone."""
    suffix = f" {rate:g}.json"
    made = {
        path.name.removeprefix("trial ").removesuffix(suffix): runs.read_json(path)
        for path in sorted(RESULTS.glob(f"trial *{suffix}"))
    }
    if not made:
        return []
    base = runs.outcomes()[runs.BASE]["domains"]

    def number(name: str, falls: Callable[[dict[str, Any]], dict[str, float]]) -> Number:
        values = {train: falls(of_train) for train, of_train in made.items()}
        return Number(f"low-rank trial, rate {rate:g}", "all", name, values, is_signed=True)

    found = []
    for steps in STEPS:
        found.append(number(f"format, {steps} steps", partial(_means, measure="format", steps=steps, n=N_QUESTIONS)))
        for n in ASKED_AGAIN:
            asked = f"{steps} steps, {n} questions"
            found.append(number(f"loss, {asked}", partial(_means, measure="loss", steps=steps, n=n)))
            found.append(number(f"small areas, {asked}", partial(_small_areas, base=base, steps=steps, n=n)))
    return found


def _means(of_train: dict[str, Any], *, measure: str, steps: int, n: int) -> dict[str, float]:
    """By domain, the mean fall over the first n questions."""
    after = of_train[str(steps)]
    return {
        domain: float(np.mean(np.subtract(before[measure], after[domain][measure])[:n]))
        for domain, before in of_train["0"].items()
    }


def _small_areas(of_train: dict[str, Any], *, base: dict[str, Any], steps: int, n: int) -> dict[str, float]:
    """The same by small-area estimation, with the base losses of all questions."""
    areas = {
        domain: Domain(
            np.subtract(before["loss"], of_train[str(steps)][domain]["loss"])[:n],
            np.asarray(before["loss"])[:n],
            base[domain]["loss"],
        )
        for domain, before in of_train["0"].items()
    }
    return dict(zip(areas, domain_means(list(areas.values())).values.tolist(), strict=True))


def _kernels(kernels: dict[str, Any]) -> list[Number]:
    """Inner products of gradients, cosines, and inner products with the sign, of all weights and of parts of them."""
    norms, trains = kernels["norms"], [name for name in kernels if name != "norms"]
    groups = list(next(iter(norms.values())))
    parts = {"all weights": groups, "layers": [g for g in groups if g not in ("embedding", "norm")]}
    parts |= {group: [group] for group in groups}

    def total(values: dict[str, float], part: list[str]) -> float:
        return sum(values[group] for group in part)

    found = []
    for label, part in parts.items():
        inner, cosine, sign = ({train: {} for train in trains} for _ in range(3))
        for train in trains:
            for domain, of_pair in kernels[train].items():
                product = total(of_pair["inner"], part)
                size = total(norms[f"train {train}"], part) * total(norms[f"domain {domain}"], part)
                inner[train][domain], sign[train][domain] = product, total(of_pair["sign"], part)
                cosine[train][domain] = product / size**0.5 if size else 0.0
        for name, values in (("inner product", inner), ("cosine", cosine), ("with its sign (Adam)", sign)):
            found.append(Number("gradients", label, name, values, is_signed=True))
    return found
