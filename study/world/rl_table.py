"""results/rl.json as pages: all tables in results/rl.md, a few of their columns in rl.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.tables import between_markers

from study.world import grpo
from study.world.rl import ESTIMATORS, OTHERS, RESULTS, TRUE
from study.world.rl_forecasts import DIMS, TOP_N

PAGE, SUMMARY = RESULTS.with_suffix(".md"), Path(__file__).parent / "rl.md"
HEAD = """# Results of the RL study

`python -m study.world rl` writes this page, and the tables of [rl.md](../rl.md), from rl.json. What
they mean: [rl_plan.md](../rl_plan.md). A cell is mean [lowest, highest] over runs; a difference mean [95% interval].

"""
DESIGN = "package"
N_BOOTSTRAP = 10_000

Lists = dict[str, Any]


def pages() -> list[tuple[Path, str]]:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    shown = between_markers(SUMMARY.read_text(encoding="utf-8"), summary(results))
    return [(PAGE, HEAD + table(results)), (SUMMARY, shown)]


def judged_bases(results: Lists) -> Lists:
    """Those that the forecasts were not designed on."""
    return {name: results[name] for name in sorted(results) if name != DESIGN} or results


def summary(results: Lists) -> str:
    """The held-out base models together."""
    judged = judged_bases(results)
    of_regime = {
        regime: [of_base[regime] for of_base in judged.values() if regime in of_base] for regime in grpo.REGIMES
    }
    rising = of_regime["rising"]
    counts = [
        f"{sum(len(of_base['trainings']) for of_base in bases)} runs *{regime}*" for regime, bases in of_regime.items()
    ]
    return "\n".join(
        [
            f"On {' and '.join(judged)}: {', '.join(counts)}. Mean [lowest, highest] over runs.\n",
            rows_of(
                "`D_N` from",
                {name: name for name in (TRUE, *DIMS, OTHERS)},
                {
                    f"overlap, of {TOP_N}": lambda name: cell(merged(rising, "overlap", name)),
                    "r of STS_act": lambda name: cell(merged(rising, "zero-shot dP", f"STS_act, {name}", "size")),
                    "less that of the true [95%]": lambda name: difference(rising, "zero-shot dP", f"STS_act, {name}"),
                    "*saturated*: r": lambda name: cell(
                        merged(of_regime["saturated"], "zero-shot dP", f"STS_act, {name}", "size")
                    ),
                },
            ),
            rows_of(
                "forecast",
                {name: name.removesuffix(", dP") for name in signed_names(rising)},
                {
                    "r, change of P": lambda name: cell(merged(rising, "zero-shot dP", name, "signed")),
                    "AUC": lambda name: cell(merged(rising, "zero-shot dP", name, "auc_distinct")),
                    "r, fall of loss": lambda name: cell(merged(rising, "zero-shot dloss", of_loss(name), "signed")),
                    "few-shot, P": lambda name: cell(merged(rising, "few-shot dP", name, "signed")),
                    "*saturated*: r, P": lambda name: cell(
                        merged(of_regime["saturated"], "zero-shot dP", name, "signed")
                    ),
                },
            ),
        ]
    )


def table(results: Lists) -> str:
    """Markdown, the held-out base models together and then each."""
    judged = judged_bases(results)
    sections = []
    for regime in grpo.REGIMES:
        for title, bases in (
            (" and ".join(judged), judged),
            *((name, {name: results[name]}) for name in sorted(results)),
        ):
            chosen = [of_base[regime] for of_base in bases.values() if regime in of_base]
            if chosen:
                sections.append(section(title, regime, chosen))
    return "\n".join(sections)


def section(title: str, regime: str, bases: Sequence[Lists]) -> str:
    n = sum(len(of_base["trainings"]) for of_base in bases)
    left_out = sum(len(of_base["not_counted"]) for of_base in bases)
    rewards = np.asarray([pair for of_base in bases for pair in of_base["rewards"]])
    share = [one for of_base in bases for one in of_base["share_of_top_n"]]
    lines = [
        f"## {title}, {regime}: {n} runs\n",
        f"Mean reward {rewards[:, 0].mean():.2f} in the first five steps, {rewards[:, 1].mean():.2f} in the last ten; "
        f"{left_out} runs whose reward did not rise are not counted. The {TOP_N} features that a run shifts most hold "
        f"{cell(share)} of its shift.\n",
        "### Which features\n",
        rows_of(
            "D_N from",
            {name: name for name in (*DIMS, OTHERS, TRUE)},
            {
                f"overlap, of {TOP_N}": lambda name: cell(merged(bases, "overlap", name)),
                **{
                    f"{estimator}: {shown}": lambda name, estimator=estimator, outcome=outcome: cell(
                        merged(bases, outcome, f"{estimator}, {name}", "size")
                    )
                    for estimator in ESTIMATORS
                    for shown, outcome in (("r, size of change of P", "zero-shot dP"), ("of loss", "zero-shot dloss"))
                },
                "STS_act: few-shot P": lambda name: cell(merged(bases, "few-shot dP", f"STS_act, {name}", "size")),
                "STS_act: less that of the true": lambda name: difference(bases, "zero-shot dP", f"STS_act, {name}"),
            },
        ),
        "### Which way\n",
        rows_of(
            "forecast",
            {name: name.removesuffix(", dP") for name in signed_names(bases)},
            {
                "r, change of P": lambda name: cell(merged(bases, "zero-shot dP", name, "signed")),
                "r, size of it": lambda name: cell(merged(bases, "zero-shot dP", name, "size")),
                "AUC, distinct": lambda name: cell(merged(bases, "zero-shot dP", name, "auc_distinct")),
                "r, fall of loss": lambda name: cell(merged(bases, "zero-shot dloss", of_loss(name), "signed")),
                "r, accuracy": lambda name: cell(merged(bases, "zero-shot daccuracy", name, "signed")),
                "few-shot r, P": lambda name: cell(merged(bases, "few-shot dP", name, "signed")),
                "few-shot r, loss": lambda name: cell(merged(bases, "few-shot dloss", of_loss(name), "signed")),
            },
        ),
    ]
    return "\n".join(lines)


def rows_of(what: str, names: dict[str, str], columns: dict[str, Callable[[str], str]]) -> str:
    lines = [[what, *columns], ["---"] * (1 + len(columns))]
    lines += [[shown, *(of_column(name) for of_column in columns.values())] for name, shown in names.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def signed_names(bases: Sequence[Lists]) -> list[str]:
    names = bases[0]["zero-shot dP"]
    return [name for name in names if "signed" in names[name] and "_loss," not in name and not name.endswith("dloss")]


def of_loss(name: str) -> str:
    """The predictor of the loss that belongs to one of P."""
    if name.endswith(", dP"):
        return name.removesuffix("dP") + "dloss"
    estimator, comma, rest = name.partition(", ")
    return f"{estimator}_loss, {rest}" if comma else name


def merged(bases: Sequence[Lists], *keys: str) -> list[float | None]:
    found: list[float | None] = []
    for of_base in bases:
        values: Any = of_base
        for key in keys:
            values = values.get(key, {})
        found += values or []
    return found


def difference(bases: Sequence[Lists], outcome: str, name: str) -> str:
    """Mean over runs of r less r of the true dimensions, with its interval over training sets of base models."""
    clusters: dict[tuple[int, str], list[float]] = {}
    for i, of_base in enumerate(bases):
        found = of_base[outcome]
        if name not in found or name.endswith(TRUE):
            return ""
        for (train, _), r, true in zip(
            of_base["trainings"], found[name]["size"], found[f"STS_act, {TRUE}"]["size"], strict=True
        ):
            clusters.setdefault((i, train), []).append(r - true)
    sums = np.asarray([[sum(values), len(values)] for values in clusters.values()])
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(N_BOOTSTRAP, len(sums)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return f"{sums[:, 0].sum() / sums[:, 1].sum():+.2f} [{low:+.2f}, {high:+.2f}]"


def cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = 1 if max(known) > 1.5 else 2
    return f"{np.mean(known):.{digits}f} [{min(known):.{digits}f}, {max(known):.{digits}f}]"
