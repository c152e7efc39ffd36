"""Sentences about `rollouts` in scores.json, for the terminal and the report."""

from __future__ import annotations

from sts_fast.files import Document

LEFT_OUT = {
    "n_unrewarded": "completions without a reward",
    "n_empty": "empty completions",
    "n_truncated": "completions that were cut off",
    "n_too_long": "completions too long for the context",
    "n_lone": "prompts with only one completion",
    "n_settled": "prompts whose completions all have the same reward",
}
OTHERWISE = {
    "verified": "those of its own verified completions",
    "correlation": "those of the correlation with the advantage",
    "gradient": "those of the policy gradient",
    "step": "those that a step along it shifts",
    "tuned": "those that RL truly shifted",
    "most_active": "the most active ones",
}


def counts_in_words(block: Document) -> str:
    """Numbers of completions and prompts read, those of little use, and the columns they came from."""
    counts = [f"{what} ({block[name]:,})" for name, what in LEFT_OUT.items() if block[name]]
    columns = [f"{what} from {column}" for what, column in block["columns"].items()]
    sentences = [
        f"{block['n_completions']:,} completions of {block['n_groups']:,} prompts, mean reward "
        f"{block['mean_reward']:.3g}; {block['n_verified']:,} prompts have a completion of a reward of "
        f"{block['verified_reward']:.3g} or more.",
        f"Of little use or none: {', '.join(counts)}." if counts else "",
        f"Read: {', '.join(columns)}; advantages: {block['advantages']}." if columns else "",
    ]
    return " ".join(filter(None, sentences))


def overlaps_in_words(block: Document) -> str:
    """Share of D_N that other ways find too."""
    shares = [f"{share:.0%} are among {OTHERWISE[way]}" for way, share in block["overlaps"].items()]
    return f"Of the features of D_N, {', '.join(shares)}." if shares else ""
