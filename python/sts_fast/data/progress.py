"""Progress over several stages at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from sts_fast.data.prompts import Progress, PromptSet

# The stage that stands for all of them.
WHOLE = "all sets"


def with_whole(progress: Progress | None, stages: Mapping[str, int]) -> Progress | None:
    """Progress that is also told how much of all stages is done, as the stage WHOLE, before each stage itself.

    stages: the size of each, such as its tokens, in their order; one that is passed over, as that of a set which is
        known already, counts as done when a later one is told of
    """
    if progress is None:
        return None
    ends = dict(zip(stages, itertools.accumulate(stages.values()), strict=True))
    most = 0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal most
        if stage in ends:
            most = max(most, round(ends[stage] - stages[stage] * (1 - done / max(total, 1))))
            progress(WHOLE, most, max(ends.values()))
        progress(stage, done, total)

    return tell


def n_sent(prompt_sets: Sequence[PromptSet]) -> int:
    """Tokens of the prompts of some sets, without and with demonstrations."""
    return sum(len(p.base_ids) + len(p.demos_ids) for prompt_set in prompt_sets for p in prompt_set.prompts)
