"""What an ablation says, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sts_fast.signed.push import SMALLEST_P

WORDS = {"loss": "the loss per token", "p_answer": "P(answer)", "accuracy": "accuracy"}


def main_outcome(document: Mapping[str, Any]) -> str:
    """'p_answer', or 'loss' where the training set's answers are too long for their probability to say much."""
    return "p_answer" if document["sets"][0]["before"]["p_answer"] >= SMALLEST_P else "loss"


def findings(document: Mapping[str, Any]) -> list[str]:
    """What an ablation.json says, in sentences."""
    train, *domains = document["sets"]
    of = main_outcome(document)
    found = {name: condition[of] for name, condition in train["conditions"].items()}
    more, draws = found["like_activity"]["top_less_this"], found["like_activity"]["draws"]
    less = {"value": -more["value"], "ci": [-bound for bound in reversed(more["ci"])]}
    clearly = "It loses clearly more than" if is_loss(of, more) else "It loses neither clearly more nor less than"
    clearly = "It loses clearly less than" if is_loss(of, less) else clearly
    said = [
        f"Zeroing the {document['top_n']} features of D_N changes {WORDS[of]} on the training set by "
        f"{with_ci(of, found['top'])}; as many random features by {amount(of, found['random']['value'])}, the least "
        f"shifted by {amount(of, found['low_shift']['value'])}, features of like activity by "
        f"{amount(of, found['like_activity']['value'])} ({short_amount(of, min(draws))} to "
        f"{short_amount(of, max(draws))} in {document['n_draws']} draws).",
        f"{clearly} with features of like activity: the difference is {with_ci(of, more)}.",
    ]
    if domains:
        changes = [one["conditions"]["top"][of]["value"] for one in domains]
        worse = sum(is_loss(of, one["conditions"]["like_activity"][of]["top_less_this"]) for one in domains)
        own = found["top"]["value"]
        less_hurt = sum(change < own if of == "loss" else change > own for change in changes)
        said.append(
            f"Of {len(domains)} domains {worse} clearly lose{'s' if worse == 1 else ''} more than with features of "
            f"like activity, and {less_hurt} lose{'s' if less_hurt == 1 else ''} less than the training set does."
        )
    return said


def amount(outcome: str, value: float) -> str:
    """A change, in points, or in nats where it is one of the loss."""
    return f"{short_amount(outcome, value)} {'nats' if outcome == 'loss' else 'points'}"


def short_amount(outcome: str, value: float) -> str:
    """The same without its unit."""
    if outcome != "loss" and abs(value) < 5e-4:
        return "0.0"
    return (f"{value:+.3g}" if outcome == "loss" else f"{100 * value:+.1f}").replace("-", "−")


def with_ci(outcome: str, found: Mapping[str, Any]) -> str:
    """A change with its interval, as in '+1.0 points [−0.5, +2.5]'."""
    low, high = (short_amount(outcome, bound) for bound in found["ci"])
    return f"{amount(outcome, found['value'])} [{low}, {high}]"


def is_loss(outcome: str, found: Mapping[str, Any]) -> bool:
    """Whether the whole interval lies on the side of worse answers."""
    low, high = found["ci"]
    return bool(low > 0 if outcome == "loss" else high < 0)
