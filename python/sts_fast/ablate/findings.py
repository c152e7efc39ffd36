"""Findings of an ablation, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sts_fast.signed.push import SMALLEST_P

WORDS = {"loss": "the loss per token", "p_answer": "P(answer)", "accuracy": "accuracy"}


def main_outcome(document: Mapping[str, Any]) -> str:
    """'p_answer', or 'loss' where the training set's answers are so long that their probability says little."""
    return "p_answer" if document["sets"][0]["before"]["p_answer"] >= SMALLEST_P else "loss"


def findings(document: Mapping[str, Any]) -> list[str]:
    """Findings from the content of an ablation.json, in sentences."""
    train, *domains = document["sets"]
    of = main_outcome(document)
    effects = {name: condition[of] for name, condition in train["conditions"].items()}
    more, draws = effects["like_activity"]["top_less_this"], effects["like_activity"]["draws"]
    less = {"value": -more["value"], "ci": [-bound for bound in reversed(more["ci"])]}
    clearly = "It loses clearly more than" if is_loss(of, more) else "It loses neither clearly more nor less than"
    clearly = "It loses clearly less than" if is_loss(of, less) else clearly
    sentences = [
        f"Zeroing the {document['top_n']} features of D_N changes {WORDS[of]} on the training set by "
        f"{with_ci(of, effects['top'])}; as many random features by {amount(of, effects['random']['value'])}, the "
        f"least shifted by {amount(of, effects['low_shift']['value'])}, features of similar activity by "
        f"{amount(of, effects['like_activity']['value'])} ({short_amount(of, min(draws))} to "
        f"{short_amount(of, max(draws))} in {document['n_draws']} draws).",
        f"{clearly} with features of similar activity: the difference is {with_ci(of, more)}.",
    ]
    if domains:
        changes = [domain["conditions"]["top"][of]["value"] for domain in domains]
        worse = sum(is_loss(of, domain["conditions"]["like_activity"][of]["top_less_this"]) for domain in domains)
        own = effects["top"]["value"]
        less_hurt = sum(change < own if of == "loss" else change > own for change in changes)
        sentences.append(
            f"Of {len(domains)} domains {worse} clearly lose{'s' if worse == 1 else ''} more than with features of "
            f"similar activity, and {less_hurt} lose{'s' if less_hurt == 1 else ''} less than the training set does."
        )
    return sentences


def amount(outcome: str, value: float) -> str:
    """A change in points, or in nats for the loss."""
    return f"{short_amount(outcome, value)} {'nats' if outcome == 'loss' else 'points'}"


def short_amount(outcome: str, value: float) -> str:
    """The same without its unit."""
    if outcome != "loss" and abs(value) < 5e-4:
        return "0.0"
    return (f"{value:+.3g}" if outcome == "loss" else f"{100 * value:+.1f}").replace("-", "−")


def with_ci(outcome: str, change: Mapping[str, Any]) -> str:
    """A change with its interval, as in '+1.0 points [−0.5, +2.5]'."""
    low, high = (short_amount(outcome, bound) for bound in change["ci"])
    return f"{amount(outcome, change['value'])} [{low}, {high}]"


def is_loss(outcome: str, change: Mapping[str, Any]) -> bool:
    """True if the whole interval lies on the side of worse answers."""
    low, high = change["ci"]
    return bool(low > 0 if outcome == "loss" else high < 0)
