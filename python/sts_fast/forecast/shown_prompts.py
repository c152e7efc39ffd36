"""A few prompts of each set as the report shows them: their tokens as text, and the features behind their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import Prompt
from sts_fast.forecast.estimators import BY_NAME

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from sts_fast.forecast.domains import Use
    from sts_fast.statistics import Doubles, Indices, IntArray

N_PROMPTS = 3
N_FEATURES = 5
# Tokens of a prompt that are written as text, and those of them before the first one that was read.
MOST_TOKENS, MOST_BEFORE = 256, 12


def spread_out(values: Doubles) -> list[int]:
    """Indices of the prompts with the largest, the middle and the smallest value, each once."""
    order = np.argsort(-values, kind="stable")
    return list(dict.fromkeys(order[np.linspace(0, len(order) - 1, N_PROMPTS).round().astype(int)].tolist()))


def text_column(prompts: Sequence[Prompt], shown: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> pa.Array:
    """Column `texts` of prompts.parquet: the text of each token in base_ids; null for all but the `shown` prompts.

    Tokens beyond MOST_TOKENS have none.
    """
    import pyarrow as pa

    kind = pa.list_(pa.string())
    if tokenizer is None:
        return pa.nulls(len(prompts), kind)
    chosen = set(shown)
    return pa.array([_texts(prompt, tokenizer) if i in chosen else None for i, prompt in enumerate(prompts)], kind)


def part_column(use: Use, shown: Sequence[int], top: Indices, estimator: str) -> pa.Array:
    """Column `parts` of prompts.parquet: the features of D_N that add most to the score of each of the `shown` prompts.

    Each with its sum over the prompt's tokens and the place, in base_ids, of the token on which it is most active; null
    for the other prompts.
    """
    import pyarrow as pa

    kind = pa.list_(pa.struct({"feature": pa.int64(), "sum": pa.float64(), "position": pa.int64()}))
    rows, log, prompts = use.profile.rows, use.profile.log, use.profile.prompt_set.prompts
    sums, members = getattr(rows, BY_NAME[estimator].sums), np.zeros(rows.d_sae, bool)
    members[top] = True
    parts: list[list[dict[str, float | int | None]] | None] = [None] * len(prompts)
    for i in shown:
        entries = np.arange(rows.indptr[i], rows.indptr[i + 1])
        entries = entries[members[rows.indices[entries]] & (sums[entries] > 0)]
        read: IntArray = prompts[i].positions[log.kept[i]]
        parts[i] = [
            {
                "feature": int(rows.indices[entry]),
                "sum": float(sums[entry]),
                "position": int(read[rows.strongest_at[entry]]) if rows.strongest_at[entry] >= 0 else None,
            }
            for entry in entries[np.argsort(-sums[entries], kind="stable")][:N_FEATURES]
        ]
    return pa.array(parts, kind)


def _texts(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token in base_ids; a character that is split over tokens stands at the last of them."""
    ids = prompt.base_ids.tolist()
    start = max(0, int(prompt.positions[0]) - MOST_BEFORE) if len(prompt.positions) else 0
    end = min(len(ids), start + MOST_TOKENS)
    # Decoding a token alone may lose its leading space, so that texts with and without it are compared.
    before, done, texts = start, start, [""] * len(ids)
    for i in range(start, end):
        whole = _decoded(tokenizer, ids[before : i + 1])
        if whole.endswith("\ufffd") and i + 1 < end:
            continue
        texts[i] = whole[len(_decoded(tokenizer, ids[before:done])) :]
        before, done = done, i + 1
    return texts


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
