"""Where features fire."""

from __future__ import annotations

import numpy as np

from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.model.explain import N_EXAMPLES, Firings

N_TOKENS, N_PROMPTS = 40, 8


class Words:
    """A tokenizer of one word per token."""

    def decode(self, ids: list[int], **options: object) -> str:
        return " ".join(map(str, ids))


def test_firings_of_several_passes_are_those_of_one() -> None:
    """The strongest of each feature, at most one of a prompt; of equal values the first."""
    rng = np.random.default_rng(0)
    features, none = np.asarray([3, 7]), np.zeros(0, np.int32)
    one_pass, several, fired = Firings(features, "score"), Firings(features, "score"), []
    for name in ("law", "days", "sums"):
        ids = np.arange(N_TOKENS, dtype=np.int32)
        prompts = [Prompt(str(i), ids, none, ids, none, none, 0) for i in range(N_PROMPTS)]
        prompt_set = PromptSet(name, prompts, 0, 0)
        prompt_of = np.repeat(np.arange(N_PROMPTS), 2 * N_TOKENS)
        positions = np.tile(np.repeat(np.arange(N_TOKENS), 2), N_PROMPTS)
        values = rng.integers(1, 60, (N_PROMPTS, N_TOKENS, 2)).astype(np.float32)
        activations = (np.tile(features, N_PROMPTS * N_TOKENS), prompt_of, positions, values.reshape(-1))
        one_pass.add(prompt_set, *activations)
        for part in np.array_split(np.arange(len(prompt_of)), 5):
            several.add(prompt_set, *(values[part] for values in activations))
        fired.append(values.max(axis=1))
    taken = several.table(Words()).to_pylist()
    assert taken == one_pass.table(Words()).to_pylist()
    for slot, feature in enumerate(features):
        strongest = np.sort(np.concatenate(fired)[:, slot])[::-1][:N_EXAMPLES]
        assert [row["value"] for row in taken if row["feature"] == feature] == strongest.tolist()
