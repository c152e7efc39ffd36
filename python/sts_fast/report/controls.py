"""Controls in the report: which of them put the domains in the order of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sts_fast.forecast.blocks import Scores
from sts_fast.forecast.controls import CONTROLS
from sts_fast.forecast.estimators import BY_NAME, SIZES
from sts_fast.report.numbers import MIN_DOMAINS, SAME, SIMILAR, joined
from sts_fast.report.ranking import estimators_of
from sts_fast.statistics import defined, spearman

MEANINGS = {control.name: control.meaning for control in CONTROLS}
UNITS = {control.quantity: control.unit for control in CONTROLS if control.unit}


@dataclass(frozen=True)
class Compared:
    """Comparison of a control's ranking of the domains with a score's; rho is None where that cannot be judged."""

    rho: float | None
    word: str


@dataclass(frozen=True)
class Control:
    """compared: one for each estimator; None where the control has no number for it."""

    label: str
    compared: list[Compared | None]


@dataclass(frozen=True)
class ControlSection:
    """labels: of the estimators; sentences: one for each, on which controls rank as it does.

    quantities: (control, quantity, value by domain), all numbers there are
    """

    labels: list[str]
    controls: list[Control]
    sentences: list[str]
    quantities: list[tuple[str, str, dict[str, float]]]


def control_label(control: str) -> str:
    """A control's name in words; also of 'name quantity', as validation.json joins them."""
    name, _, quantity = control.partition(" ")
    if name not in MEANINGS:
        return control.replace("_", " ")
    return MEANINGS[name] if quantity in ("", *UNITS) else f"{MEANINGS[name]}, {quantity}"


def control_section(scores: Scores) -> ControlSection:
    """Every control beside every estimator: by its own number for that estimator, or else by the only one it has."""
    domains, known = scores["domains"], estimators_of(scores)
    numbers_of: dict[str, dict[str, dict[str, float]]] = {}
    for domain in domains:
        for control, entry in domain["controls"].items():
            for quantity, value in entry.items() if isinstance(entry, dict) else [("", entry)]:
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    numbers_of.setdefault(control, {}).setdefault(quantity, {})[domain["name"]] = float(value)
    controls = []
    for control, numbers in numbers_of.items():
        alone = next(iter(numbers.values())) if not any(key in SIZES for key in numbers) else {}
        compared = []
        for estimator in known:
            values = numbers.get(estimator, alone)
            scored = {d["name"]: d["scores"][estimator]["value"] for d in domains if estimator in d["scores"]}
            compared.append(_compare(values, scored) if values else None)
        controls.append(Control(control_label(control), compared))
    labels = [BY_NAME[estimator].label for estimator in known]
    return ControlSection(
        labels=labels,
        controls=controls,
        sentences=_control_sentences(labels, controls),
        quantities=[
            (control_label(control), _quantity_label(quantity), values)
            for control, numbers in numbers_of.items()
            for quantity, values in numbers.items()
        ],
    )


def _compare(values: dict[str, float], scored: dict[str, float]) -> Compared:
    names = [name for name in scored if name in values]
    if len(names) < MIN_DOMAINS:
        return Compared(None, "too few domains")
    rho = defined(spearman([values[name] for name in names], [scored[name] for name in names]))
    if rho is None:
        return Compared(None, "ranks nothing")
    if rho >= SAME:
        return Compared(rho, "nearly the same")
    if rho >= SIMILAR:
        return Compared(rho, "similar")
    return Compared(rho, "different" if rho > -SIMILAR else "reverse")


def _control_sentences(labels: Sequence[str], controls: Sequence[Control]) -> list[str]:
    sentences = []
    for i, label in enumerate(labels):
        rhos = {c.label: compared.rho for c in controls if (compared := c.compared[i]) and compared.rho is not None}
        same = [name for name, rho in rhos.items() if rho >= SAME]
        if same:
            sentences.append(
                f"{label}: {joined(same)} {'puts' if len(same) == 1 else 'put'} the domains in nearly the same order, "
                f"so over these domains it says little that {'this does' if len(same) == 1 else 'these do'} not."
            )
        elif rhos:
            sentences.append(f"{label}: no control puts the domains in nearly the same order.")
    return sentences


def _quantity_label(quantity: str) -> str:
    if quantity in SIZES:
        return BY_NAME[quantity].label
    return UNITS.get(quantity, quantity.replace("_", " "))
