"""Pieces of sets: prompts that are read together, each a profile; side by side they are the profile of their set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sts_fast.data.prompts import Prompt, PromptSet

PIECES_FOLDER = "pieces"  # in a library or a plan, of the profiles of pieces until their set is whole


@dataclass(frozen=True)
class Piece:
    """Prompts start to stop of the set with an index."""

    set: int
    start: int
    stop: int

    def of(self, sets: Sequence[PromptSet]) -> PromptSet:
        """Its prompts as a set; the whole set keeps what was left out of it, and warnings."""
        whole = sets[self.set]
        if self.is_whole(sets):
            return whole
        prompts = whole.prompts[self.start : self.stop]
        return replace(whole, prompts=prompts, n_too_long=0, n_unanswered=0, warnings=())

    def is_whole(self, sets: Sequence[PromptSet]) -> bool:
        return self.start == 0 and self.stop == len(sets[self.set].prompts)


Shard = tuple[Piece, ...]


def cut(sets: Sequence[PromptSet], most_tokens: int) -> list[Shard]:
    """Shards of so many tokens, or by less than a prompt more, in the order of the sets.

    A set that fits into a shard is one piece; a larger one is cut into pieces of about the same number of tokens.
    """
    shards: list[list[Piece]] = []
    room = 0
    for index, prompt_set in enumerate(sets):
        tokens = np.cumsum([n_tokens(prompt) for prompt in prompt_set.prompts])
        total = int(tokens[-1]) if len(tokens) else 0
        n_pieces = -(-total // most_tokens) or 1
        ends = np.searchsorted(tokens, np.arange(1, n_pieces) * (total / n_pieces), side="right")
        bounds = np.unique([0, *ends, len(tokens)])
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            size = int(tokens[stop - 1] - (tokens[start - 1] if start else 0))
            if size > room or not shards:
                shards.append([])
                room = most_tokens
            shards[-1].append(Piece(index, start, stop))
            room -= size
    return [tuple(shard) for shard in shards]


def n_tokens(prompt: Prompt) -> int:
    """Tokens that reading a prompt runs, but for demonstrations: those are shared by all that are asked behind them."""
    return len(prompt.base_ids) * (2 if len(prompt.demos_ids) else 1)
