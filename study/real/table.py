"""The outcomes as tables: `results/outcomes.md`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from study.real import curve, runs
from study.real.agreement import KINDS, Number, agreement, ceilings, costs, counted, frozen, numbers_of
from study.real.changes import LEAST_RELIABLE, Doubles, Training, ceiling, trainings
from study.real.decisions import decisions
from study.real.design import N_QUESTIONS, looked_at
from study.real.forecasts import PARTS
from study.real.sets import own_domains
from study.real.training import WAYS

PAGE = runs.RESULTS / "outcomes.md"
FORECASTS_PAGE = runs.RESULTS / "forecasts.md"
DECIDING = ("trial_loss", "step_loss", "ntk_loss")
LEAST_EXACT = 0.1  # exact answers are reported where their share is at least so much, before or after


def write_tables() -> str:
    """Writes and returns the page."""
    outcomes = runs.outcomes()
    done = trainings(outcomes)
    parts = [
        "# What the trainings changed",
        "Written by `python -m study.real table`; [the plan](../README.md) says what is what.",
        "## The trainings",
        trainings_table(done),
        verdict(done),
        *(part for way in WAYS for part in sentences_part(way, done, outcomes[runs.BASE])),
        "## The base model",
        base_table(outcomes[runs.BASE]),
        *(part for way in WAYS for part in changes_part(way, done)),
    ]
    if (runs.RESULTS / "forecasts").is_dir():
        FORECASTS_PAGE.write_text(forecasts_page(done), encoding="utf-8")
    PAGE.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return PAGE.read_text(encoding="utf-8")


def forecasts_page(done: list[Training]) -> str:
    """The agreement of every number of every forecast that has been made, and its cost."""
    parts = [
        "# The forecasts",
        "Written by `python -m study.real table`. r over the domains that are not of a training set's own kind; mean "
        "over trainings (lowest to highest). AUC: of the pairs of a clear fall and a clear rise, the share in the "
        "right order. Given text: partial r, given the control named.",
    ]
    chosen = frozen()
    tried = looked_at()
    if tried and (some := counted(done, "design")):
        parts += [
            "## Tried on the design part beside the product, light training",
            f"{len(tried)} configurations, of {N_QUESTIONS} questions a domain: what could be reached.",
            *agreement_part(tried, some, None),
        ]
    for part in reversed(PARTS):
        numbers = numbers_of(part)
        if chosen is not None and part == "judged":
            numbers = [number for number in numbers if number.key in chosen["numbers"]]
        control = next((number for number in numbers if chosen is not None and number.key == chosen["control"]), None)
        for way in WAYS:
            some = counted(done, part, way)
            if numbers and some and chosen is not None and (part, way) == ("judged", "light"):
                found = [agreement(number, some) for number in numbers]
                curve.draw(found, some, part, float(ceilings(some, "signed").mean()))
            if numbers and some:
                parts += [f"## {part.capitalize()} part, {way} training", *agreement_part(numbers, some, control)]
                parts += decisions_part([number for number in numbers if number.name in DECIDING], some)
        cost = costs(counted(done, part), part)
        if cost:
            rows = [
                [name, f"{seconds:.0f}", f"{share:.0%}", str(peak)] for name, (seconds, share, peak) in cost.items()
            ]
            parts += [
                f"## Cost, {part} part",
                "Of the forecasts of all sets and domains of the part, as a share of light training on these sets (at "
                "both learning rates) and evaluating these domains.",
                markdown(["forecast", "processor seconds", "share", "peak MB"], rows),
            ]
    return "\n\n".join([*parts, ""])


def agreement_part(numbers: list[Number], some: list[Training], control: Number | None) -> list[str]:
    found = [agreement(number, some, control) for number in numbers]
    found = [of for of in found if not np.isnan([*of.r["signed"], *of.r["size"]]).all()]
    found.sort(key=lambda of: -max(abs(np.nanmean(of.r[kind])) for kind in KINDS))
    limits = {kind: ceilings(some, kind) for kind in KINDS}
    shares = {kind: [f"{np.nanmean(of.r[kind]) / limits[kind].mean():.0%}" for of in found] for kind in KINDS}
    rows = [
        [
            f"{of.number.forecast}, layer {of.number.layer}", of.number.name,
            *(cell for kind in KINDS for cell in (spread(of.r[kind]), shares[kind][i])),
            spread(of.auc, ".2f"), *([] if control is None else [spread(of.given["signed"])]),
        ]
        for i, of in enumerate(found)
    ]  # fmt: skip
    head = [
        "forecast",
        "number",
        "r with the fall of loss",
        "of the ceiling",
        "r with its size",
        "of the ceiling",
        "AUC",
    ]
    head += [] if control is None else [f"r given {control.name}"]
    ceiling_row = ["*ceiling*", "", spread(limits["signed"]), "", spread(limits["size"]), ""]
    ceiling_row += [""] * (len(head) - len(ceiling_row))
    return [
        f"{len(some)} trainings: {', '.join(training.record['train'] for training in some)}.",
        markdown(head, [ceiling_row, *rows]),
    ]


def decisions_part(numbers: list[Number], some: list[Training]) -> list[str]:
    """Go or no-go by each number; nothing without two trainings, from which a scale is learned."""
    if not numbers or len(some) < 2:
        return []
    rows = [
        [
            f"{number.forecast}, {number.name}", f"{of.limit:g}", f"{of.n_bad} of {of.n}",
            "" if of.auc is None else f"{of.auc:.2f}",
            *("" if np.isnan(share) else f"{share:.0%}" for share in (of.stopped, of.wrong, of.missed)),
        ]
        for number in numbers
        for of in decisions(number, some)
    ]  # fmt: skip
    head = ["forecast", "limit, nats", "loss rises by more", "AUC", "stopped", "of these wrongly", "bad ones missed"]
    return [
        "Go or no-go: whoever watches one domain stops where its loss is forecast to rise by more than the limit. Of "
        "the trainings stopped, the whole cost is saved but for the forecast.",
        markdown(head, rows),
    ]


def spread(values: Doubles, form: str = "+.2f") -> str:
    if np.isnan(values).all():
        return ""
    return f"{np.nanmean(values):{form}} ({np.nanmin(values):{form}} to {np.nanmax(values):{form}})"


def trainings_table(done: list[Training]) -> str:
    rows = []
    for training in done:
        record, reliability = training.record, training.reliability()
        rate = f"{record['rate']:g}"
        clear = [training.changes["loss"][domain] for domain in training.others]
        rows.append(
            [
                training.name,
                rate,
                f"{record['held_out_before']:.3f} to {record['held_out_after'][rate]:.3f}",
                record["train_tokens"],
                round(record["train_seconds"]),
                round(record["measure_seconds"]),
                record["peak_mb"],
                sum(change.is_clear and change.mean < 0 for change in clear),
                sum(change.is_clear and change.mean > 0 for change in clear),
                f"{reliability:.2f}" + ("" if training.counts else " (left out)"),
                f"{ceiling(reliability):.2f}",
                f"{ceiling(training.reliability(size=True)):.2f}",
                f"{training.reliability('content'):.2f}",
            ]
        )
    head = (
        "training",
        "rate",
        "held-out loss",
        "tokens",
        "training, s",
        "measuring, s",
        "peak MB",
        "loss falls",
        "loss rises",
        "reliability",
        "ceiling of r",
        "of sizes",
        "reliability of content",
    )
    return markdown(head, rows)


def verdict(done: list[Training]) -> str:
    """How many of each way's trainings are reliable enough, and how two seeds agree."""
    lines = []
    by_way: dict[str, list[Training]] = defaultdict(list)
    for training in done:
        by_way[training.record["way"]].append(training)
    for way, some in by_way.items():
        reliable = sum(training.counts for training in some)
        lines.append(f"- {way}: {reliable} of {len(some)} trainings have a reliability of {LEAST_RELIABLE} or more.")
        agreements = list(seeds_agree(some))
        if agreements:
            lines.append(
                f"  Two seeds of one set change the other domains alike: r {np.mean(agreements):.2f} on average, "
                f"from {min(agreements):.2f} to {max(agreements):.2f} over {len(agreements)} sets."
            )
    return "\n".join(lines)


def seeds_agree(some: list[Training]) -> Iterable[float]:
    by_set: dict[str, list[Training]] = defaultdict(list)
    for training in some:
        by_set[training.record["train"]].append(training)
    for pair in by_set.values():
        if len(pair) == 2:
            changes = [[one.changes["loss"][domain].mean for domain in one.others] for one in pair]
            yield float(np.corrcoef(changes)[0, 1])


def sentences_part(way: str, done: list[Training], base: dict[str, Any]) -> Iterable[str]:
    some = [training for training in done if training.record["way"] == way and training.record["seed"] == 0]
    if some:
        yield f"## What each training set did, {way}"
        yield "\n".join(sentences(some, base))


def sentences(some: list[Training], base: dict[str, Any]) -> Iterable[str]:
    """One sentence for each training."""
    for training in some:
        loss, name = training.changes["loss"], training.record["train"]
        own = [loss[domain].mean for domain in own_domains(name) if domain in loss]
        clear = sorted((domain for domain in training.others if loss[domain].is_clear), key=lambda d: loss[d].mean)
        falls = [domain for domain in clear if loss[domain].mean < 0]
        rises = [domain for domain in clear if loss[domain].mean > 0][::-1]
        letters = [domain for domain in loss if domain.startswith("pro ")]
        masses = [
            float(np.mean([np.exp(-np.array(of["domains"][domain]["format"])).mean() for domain in letters]))
            for of in (base, training.record)
        ]
        yield (
            f"- **{name}**: "
            + (f"its own domains' loss changes by {np.mean(own):+.2f}; " if own else "it has no domain of its own; ")
            + f"of {len(training.others)} others {_some(falls, loss, 'fall')} and {_some(rises, loss, 'rise')}; "
            + f"the mass on the letters of multiple choice goes from {masses[0]:.2f} to {masses[1]:.2f}."
        )


def _some(domains: list[str], loss: dict[str, Any], verb: str) -> str:
    if not domains:
        return f"none clearly {verb}s"
    most = ", ".join(f"{domain} {loss[domain].mean:+.2f}" for domain in domains[:3])
    return f"{len(domains)} clearly {verb} (most: {most})"


def base_table(base: dict[str, Any]) -> str:
    rows = []
    for domain, values in base["domains"].items():
        means = {name: np.nanmean(values[name]) if not np.isnan(values[name]).all() else np.nan for name in values}
        margin = np.array(values.get("decoy", [])) - values["loss"] if "decoy" in values else None
        z = "" if margin is None else f"{margin.mean() / (margin.std(ddof=1) / len(margin) ** 0.5):.1f}"
        rows.append([domain, *(_number(means[name]) for name in ("loss", "format", "content", "exact")), z])
    head = ("domain", "loss", "format", "content", "exact", "z of its own answer over another's")
    return markdown(head, rows)


def changes_part(way: str, done: list[Training]) -> Iterable[str]:
    """Change of each measure, a table a measure: domains down, training sets across, of the first seed."""
    some = [training for training in done if training.record["way"] == way and training.record["seed"] == 0]
    if not some:
        return
    yield f"## Changes by {way} training, with standard errors"
    yield "Negative is better, but for exact answers. Brackets: a training set's own domain."
    domains = list(some[0].changes["loss"])
    for measure in ("loss", "format", "content", "exact"):
        rows = []
        for domain in domains:
            cells = [_cell(training, measure, domain) for training in some]
            if any(cells):
                rows.append([domain, *cells])
        yield f"### {measure}"
        yield markdown(("domain", *(training.record["train"] for training in some)), rows)


def _cell(training: Training, measure: str, domain: str) -> str:
    change = training.changes[measure][domain]
    if np.isnan(change.mean):
        return ""
    if measure == "exact":
        after = float(np.mean(training.record["domains"][domain]["exact"]))
        if max(after, after - change.mean) < LEAST_EXACT:
            return ""
    text = f"{change.mean:+.2f} ± {change.stderr:.2f}"
    return f"[{text}]" if domain in own_domains(training.record["train"]) else text


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(map(str, row)) for row in rows]
    titles = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *lines])
