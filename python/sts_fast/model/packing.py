"""Packing of sequences into the rows of a forward pass: layout, attention masks and shared keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.ops.devices import doubled

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import IntArray

# A shared start shorter than this is not worth a separate pass.
LEAST_SHARED = 16
# Lengths tried for rows of packed sequences; the cheapest is used.
PACKED_LENGTHS = (256, 512, 1024, 2048, 4096)
# Cost of a product in attention, and of copying a number of a key or value, in multiplications by a weight.
ATTENTION_COST, COPY_COST = 3.0, 60.0
# By kind of layer, the config key of its attention window.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}

# Other config keys of attention to a part of the tokens, which the mask does not know.
UNKNOWN_WINDOWS = ("window_size", "attention_types", "local_attention", "block_size", "attention_window")


def shared_length(ids: Sequence[IntArray], positions: Sequence[IntArray]) -> int:
    """Number of tokens that all sequences share before the first one read; 0 where too few for a separate pass."""
    used = [i for i, sequence in enumerate(ids) if len(sequence)]
    if len(used) < 2:
        return 0
    first = ids[used[0]]
    n_shared = min(int(positions[i].min()) for i in used)
    for i in used:
        other = ids[i][:n_shared]
        differs = np.flatnonzero(first[: len(other)] != other)
        n_shared = int(differs[0]) if len(differs) else len(other)
    return n_shared if n_shared >= LEAST_SHARED else 0


def packed_rows(lengths: list[int], row_length: int) -> list[list[int]]:
    """Packs sequences in order into rows of about equal length, as many as row_length requires."""
    total = sum(lengths)
    n_rows = max(1, min(len(lengths), -(-total // row_length)))
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    before = 0
    for slot, length in enumerate(lengths):
        rows[min(n_rows - 1, int((before + length / 2) * n_rows / max(1, total)))].append(slot)
        before += length
    return [row for row in rows if row]


def cheapest_rows(lengths: list[int], n_shared: int, sizes: tuple[float, int, int]) -> list[list[int]]:
    """Indices of the sequences in each row, for the least arithmetic; n_shared tokens precede each row.

    sizes: of a layer, as `layer_sizes` returns them
    """
    layouts = [[[slot] for slot in range(len(lengths))]] + [packed_rows(lengths, length) for length in PACKED_LENGTHS]
    return min(layouts, key=lambda rows: _cost(rows, lengths, n_shared, sizes))


def _cost(rows: list[list[int]], lengths: list[int], n_shared: int, sizes: tuple[float, int, int]) -> float:
    """Approximate multiplications per layer: by weights, in attention, and for copying keys and values."""
    n_columns = max(sum(lengths[slot] for slot in row) for row in rows)
    # A single sequence in a row needs no mask where nothing is shared, and then half of its products.
    n_seen = n_shared + n_columns / (2 if len(rows) == len(lengths) and not n_shared else 1)
    n_weights, d_attention, d_keys = sizes
    per_column = n_weights + ATTENTION_COST * n_seen * 2 * d_attention
    # The shared keys and values are joined with the row's own, and then repeated for each head.
    copied = COPY_COST * (n_shared + n_columns) * 2 * (d_keys + d_attention) if n_shared else 0
    return len(rows) * (n_columns * per_column + copied)


@dataclass(frozen=True)
class Rows:
    """Sequences in rows, padded with zeros on the right.

    ids, positions, segments: [n_rows, n_columns] int64 on the CPU: token ids, their positions in their sequences, and
           the indices of their sequences (-1: padding)
    spans: start and end of each sequence in the flattened rows
    shares_rows: true if a row has more than one sequence
    """

    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    spans: list[tuple[int, int]]
    shares_rows: bool


def lay_out(own: Sequence[IntArray], rows: list[list[int]], n_shared: int) -> Rows:
    """Puts sequences into rows.

    own:  each sequence without the n_shared tokens before it
    rows: indices of the sequences in each row
    """
    import torch

    n_columns = max(1, *(sum(len(own[slot]) for slot in row) for row in rows))
    ids = torch.zeros((len(rows), n_columns), dtype=torch.long)
    positions = torch.full((len(rows), n_columns), n_shared)  # padding must not make a row look longer
    segments = torch.full((len(rows), n_columns), -1)
    spans = [(0, 0)] * len(own)
    for r, row in enumerate(rows):
        column = 0
        for slot in row:
            here = slice(column, column + len(own[slot]))
            ids[r, here] = torch.from_numpy(own[slot].astype(np.int64))
            positions[r, here] = n_shared + torch.arange(len(own[slot]))
            segments[r, here] = slot
            spans[slot] = (r * n_columns + column, r * n_columns + here.stop)
            column = here.stop
    return Rows(ids, positions, segments, spans, any(len(row) > 1 for row in rows))


def check_vocabulary(model: torch.nn.Module, ids: Sequence[IntArray], *, name: str) -> None:
    """Raises InputError for a token that the embedding of the model, called `name`, does not have."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    largest = max((int(sequence.max(initial=0)) for sequence in ids), default=0)
    if embedding is not None and largest >= embedding.weight.shape[0]:
        raise InputError(
            f"{name} knows {embedding.weight.shape[0]} tokens, but its tokenizer gives token id {largest}: "
            "the tokenizer belongs to another model"
        )


def layer_sizes(model: torch.nn.Module, config: Any) -> tuple[float, int, int]:
    """(number of weights, width of the queries, width of the keys) of one layer."""
    n_heads = getattr(config, "num_attention_heads", 1)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    n_keys = getattr(config, "num_key_value_heads", None) or n_heads
    n_embedded = getattr(config, "vocab_size", 0) * config.hidden_size
    n_weights = max(0, sum(parameter.numel() for parameter in model.parameters()) - n_embedded)
    return n_weights / config.num_hidden_layers, n_heads * d_head, n_keys * d_head


def bytes_per_token(config: Any, n_shared: int) -> int:
    """Upper estimate of the memory of one token of a batch while a layer runs, in bytes."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    experts = getattr(config, "num_experts_per_tok", None) or 1
    n_bytes = 4 * (8 * config.hidden_size + 4 * width * experts)
    eager = str(getattr(config, "_attn_implementation", "eager")) == "eager"
    n_scores = getattr(config, "num_attention_heads", 1) if eager else 1
    return int(n_bytes + 3 * 4 * (n_shared + PACKED_LENGTHS[2]) * n_scores)


def attention_masks(
    config: Any, dtype: torch.dtype, positions: torch.Tensor, segments: torch.Tensor, n_shared: int
) -> Any:
    """Masks by which each token attends to the shared tokens, and to those of its own sequence up to itself.

    positions, segments: [n_rows, n_columns] each token's position in its sequence, and its sequence (-1: padding)

    Returns [n_rows, 1, n_columns, n_shared + n_columns], to be added to the attention logits; a dict of one per kind of
    layer where a model has several kinds.
    """
    import torch

    shared = torch.arange(n_shared, device=positions.device).expand(len(positions), -1)
    keys, queries = torch.cat([shared, positions], dim=1)[:, None, :], positions[:, :, None]
    same = (segments[:, :, None] == segments[:, None, :]) & (positions[:, None, :] <= queries)
    seen = torch.cat([same.new_ones((*positions.shape, n_shared)), same], dim=2)

    def weights(kind: str) -> torch.Tensor:
        width = getattr(config, WINDOWS.get(kind, ""), None)
        visible = seen
        if width and kind == "sliding_attention":
            visible = seen & (queries - keys < width)
        elif width and kind == "chunked_attention":
            visible = seen & (queries // width == keys // width)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    return weights(kinds.pop()) if len(kinds) == 1 else {kind: weights(kind) for kind in kinds}


@contextmanager
def short_windows(config: Any, width: int) -> Iterator[None]:
    """Cuts attention windows to at most this width; short sequences then exceed them."""
    saved = {
        name: given
        for name in WINDOWS.values()
        if isinstance(given := getattr(config, name, None), int) and given > width
    }
    try:
        for name in saved:
            setattr(config, name, width)
        yield
    finally:
        for name, given in saved.items():
            setattr(config, name, given)


def as_cache(model: torch.nn.Module, cache: Any) -> dict[str, Any]:
    """A cache, under the name by which the model's forward takes it: Transformers 5.24 gave it another one."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def shared_cache(cache: Any) -> Any:
    """A cache whose keys and values precede those of every row, and which is never extended."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class SharedLayer(DynamicLayer):
        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.lazy_initialization(keys, values)
            self.shared = keys, values
            self.keys, self.values = keys, values  # for their length

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = (shared.expand(len(key_states), -1, -1, -1) for shared in self.shared)
            return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    shared = DynamicCache()
    shared.layers = [SharedLayer(layer.keys, layer.values) for layer in cache.layers]
    return shared


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """[n_tokens] float64 Euclidean norm of each row [n_tokens, d_in]; NaN where it contains NaN or infinity."""
    import torch

    norms = doubled(torch.linalg.vector_norm(rows.float(), dim=-1))
    finite = torch.isfinite(rows).all(dim=-1)
    return torch.where(finite, norms, torch.nan)
