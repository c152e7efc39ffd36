"""Explanations of a feature: its strongest firings in the user's data, the tokens it promotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import PromptSet

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from sts_fast.statistics import Floats, Indices

N_FEATURES = 20  # features of D_N that are explained, the most shifted ones
N_EXAMPLES = 5
N_PROMOTED = 8
VOCABULARY_BLOCK = 16_384
CONTEXT_BEFORE, CONTEXT_AFTER = 12, 6  # tokens


@dataclass(frozen=True, order=True)
class _Firing:
    rank_key: tuple[float, int, int, int]  # strongest first; ties by set, prompt and position
    prompt_set: str
    prompt: int
    position: int


class Firings:
    """The strongest firings of some features, at most one per prompt.

    features: [n_features] features of the SAE
    stage:    the pass in which they fire, as in prompts.parquet
    """

    def __init__(self, features: Indices, stage: str) -> None:
        self.features, self.stage = features, stage
        self._best: dict[int, list[_Firing]] = {int(feature): [] for feature in features}
        self._sets: dict[str, PromptSet] = {}

    def add(
        self, prompt_set: PromptSet, features: Indices, prompt_of: Indices, positions: Indices, values: Floats
    ) -> None:
        """Adds activations of a set, these features among them; several calls may add to one set.

        features, values: [n] each activation's feature and size; prompt_of, positions: [n] its prompt, as an index into
            the set, and the position of its token in base_ids
        """
        n_set = len(self._sets) if prompt_set.name not in self._sets else list(self._sets).index(prompt_set.name)
        self._sets[prompt_set.name] = prompt_set
        for feature, best in self._best.items():
            entries = np.flatnonzero(features == feature)
            for entry in entries[np.argsort(-values[entries], kind="stable")]:
                prompt, position = int(prompt_of[entry]), int(positions[entry])
                key = (-float(values[entry]), n_set, prompt, position)
                if len(best) == N_EXAMPLES and key >= best[-1].rank_key:
                    break
                best.append(_Firing(key, prompt_set.name, prompt, position))
                strongest: dict[tuple[str, int], _Firing] = {}
                for firing in sorted(best):
                    strongest.setdefault((firing.prompt_set, firing.prompt), firing)
                best[:] = list(strongest.values())[:N_EXAMPLES]

    def table(self, tokenizer: PreTrainedTokenizerBase | None) -> pa.Table:
        """One row per example: feature, rank, value, stage, domain, id, and the text before, at and after the token.

        No rows without a tokenizer, which writes the text.
        """
        import pyarrow as pa

        kinds = {"feature": pa.int64(), "rank": pa.int64(), "value": pa.float64()}
        names = ("feature", "rank", "value", "stage", "domain", "id", "before", "token", "after")
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
        if tokenizer is None:
            return schema.empty_table()
        rows = []
        for feature in map(int, self.features):
            for rank, firing in enumerate(self._best[feature]):
                prompt = self._sets[firing.prompt_set].prompts[firing.prompt]
                before, token, after = _text_around(tokenizer, prompt.base_ids, firing.position)
                rows.append(
                    {
                        "feature": feature,
                        "rank": rank,
                        "value": -firing.rank_key[0],
                        "stage": self.stage,
                        "domain": firing.prompt_set,
                        "id": prompt.id,
                        "before": before,
                        "token": token,
                        "after": after,
                    }
                )
        return pa.Table.from_pylist(rows, schema)


def _text_around(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int32], position: int) -> tuple[str, str, str]:
    start = max(0, position - CONTEXT_BEFORE)
    # Decoding a token alone may lose its leading space, so texts that end before and after it are compared.
    texts = [
        tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=True)
        for end in (position, position + 1, position + 1 + CONTEXT_AFTER)
    ]
    before, through, whole = (str(text) for text in texts)
    if not (through.startswith(before) and whole.startswith(through)):  # a character split over tokens
        return before, str(tokenizer.decode([int(ids[position])])), ""
    return before, through[len(before) :], whole[len(through) :]


def promoted_tokens(
    directions: torch.Tensor, unembedding: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[list[str]]:
    """The N_PROMOTED output tokens whose logits each decoder direction raises most.

    directions:  [n_features, d_in] rows of W_dec
    unembedding: [vocabulary, d_in], applied directly, without norms and upper layers
    """
    import torch

    logits = torch.cat(
        [directions.float() @ rows.float().T for rows in torch.split(unembedding, VOCABULARY_BLOCK)], dim=-1
    )
    return [[str(tokenizer.decode([int(token)])) for token in top] for top in logits.topk(N_PROMOTED, dim=-1).indices]


def neuronpedia_links(neuronpedia_id: str | None, features: Sequence[int]) -> list[str | None]:
    """Address of each feature's page; None where the SAE's metadata name no dashboard."""
    return [f"https://neuronpedia.org/{neuronpedia_id}/{j}" if neuronpedia_id else None for j in features]
