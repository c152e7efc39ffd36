"""Forward passes in which nothing is computed twice: what sequences share at their start is run once."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from sts_fast.errors import InputError
from sts_fast.hooks import Hook

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]
    IntArray = NDArray[np.int32]

# In the order in which they are tried: the fastest first.
#   packed  several sequences in one row, kept apart by a mask, behind the keys and values of what they share
#   cached  one sequence in a row, padded on the right, behind the same keys and values
#   copied  one sequence in a row, each behind a copy of the model's own cache (linear attention changes its state)
#   plain   one sequence in a row, from its first token on
Strategy = Literal["packed", "cached", "copied", "plain"]

# A shared start shorter than this is not worth a pass of its own.
LEAST_SHARED = 16
# Rows that sequences are packed into are tried at these lengths, and the one that costs least is taken.
PACKED_LENGTHS = (256, 512, 1024, 2048, 4096)
# What a product of attention, and a copied number of a key or value, costs beside a multiplication by a weight.
ATTENTION_COST, COPY_COST = 3.0, 60.0

# The self-check: tokens that its sequences share, and that each has of its own; and, while it lasts, the windows of
# sliding and chunked attention, which it would not reach else.
CHECK_SHARED, CHECK_LENGTHS, CHECK_WINDOW = 20, (9, 4, 13), 6
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# Other names in a config that tell of attention to a part of the tokens only, which the mask would have to know.
UNKNOWN_WINDOWS = ("window_size", "attention_types", "local_attention", "block_size", "attention_window")
# Largest relative error of a token against the sequence run alone; in half precision of the median token, because a
# router may send one token to another expert over its last bit.
CHECK_TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}

# A CPU gains nothing from more tokens than fit into its caches.
MOST_BATCH_TOKENS, MOST_ON_CPU, LEAST_BATCH_TOKENS = 8192, 2048, 256
# Of the free memory, what a batch may take; and where Linux says what a container may use.
MEMORY_SHARE, CONTAINER = 0.4, Path("/sys/fs/cgroup")


class Reader(Protocol):
    """A model of which one place or more is read; see sts_fast.capture.Decoder."""

    model: torch.nn.Module
    device: torch.device
    name: str
    hooks: list[Hook]

    def run(self, **inputs: Any) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Read:
    """What one sequence gives, at each place that is read.

    rows:  per place [n_read, d_in], at the positions asked for, on the place's device
    norms: per place [n_tokens] float64, Euclidean, of every token up to the last one read; NaN where a token has a NaN
        or infinity
    """

    rows: list[torch.Tensor]
    norms: list[Doubles]


@dataclass
class Sequences:
    """Sequences of which some tokens are read, and what they share.

    passes:    the forward passes of the model that they are for
    ids:       each [n_tokens] int32, up to the last token that is read: what follows is of no use
    positions: each [n_read] int32
    n_shared:  tokens at the start that are the same in all, none of which is read
    cache:     the model's keys and values, or states, of these; run when the first batch needs them
    shared_norms: per place [n_shared]
    """

    passes: ForwardPasses
    ids: list[IntArray]
    positions: list[IntArray]
    n_shared: int = 0
    cache: Any = None
    shared_norms: list[Doubles] = field(default_factory=list)

    def n_own(self, index: int) -> int:
        return max(0, len(self.ids[index]) - self.n_shared)


@dataclass(frozen=True)
class _Launched:
    """A batch on its way: on CUDA nothing of it need be there yet."""

    rows: list[list[torch.Tensor]]
    norms: list[torch.Tensor]
    spans: list[tuple[int, int]]
    ready: list[Any]


class ForwardPasses:
    """The forward passes of one model: how sequences are run, how many there were, and how long they took.

    reader:       the model; nothing is kept of what it returns but the rows asked for
    batch_tokens: most tokens of one pass; None: as many as the free memory allows, 256 to 8,192 (2,048 on a CPU)
    say:          is told, in one line each, what was chosen and what went wrong and was put right

    strategy:     how sequences are run; None until the first are. The first of `Strategy` whose activations, of a few
        short sequences of the model's own tokens, equal those of each sequence run alone.
    n_passes, n_tokens, seconds: forward passes run, tokens in them without padding, and the time they took (self-check
        not counted)
    """

    def __init__(
        self, reader: Reader, *, batch_tokens: int | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        self.reader, self.say = reader, say or (lambda line: None)
        self.config = reader.model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.dtype = next(reader.model.parameters()).dtype
        self.batch_tokens = batch_tokens
        self.strategy: Strategy | None = None
        self.why = ""
        self.n_passes = self.n_tokens = 0
        self.seconds = 0.0

    def prepare(self, ids: Sequence[IntArray], positions: Sequence[IntArray]) -> Sequences:
        """Sequences to be read at their positions; [] for a sequence of which nothing is read and nothing run."""
        ends = [int(read.max(initial=-1)) + 1 for read in positions]
        needed = [sequence[:end] for sequence, end in zip(ids, ends, strict=True)]
        check_vocabulary(self.reader, needed)
        if self.strategy is None:
            self._choose([sequence for sequence in ids if len(sequence)])
        sequences = Sequences(self, needed, list(positions))
        if self.strategy != "plain":
            sequences.n_shared = _shared_length(sequences)
        return sequences

    def alone(self, ids: IntArray, positions: IntArray) -> Read:
        """One sequence by itself, from its first token on, whatever the strategy."""
        sequences = Sequences(self, [ids], [positions])
        return self.finish(sequences, self.launch(sequences, [0]))[0]

    def summary(self) -> dict[str, Any]:
        """How the sequences were run, for the record; the self-check is not counted."""
        return {
            "strategy": self.strategy,
            "why": self.why,
            "batch_tokens": self.batch_tokens,
            "n_passes": self.n_passes,
            "n_tokens": self.n_tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.n_tokens / self.seconds, 1) if self.seconds else None,
        }

    def say_summary(self) -> None:
        rate = f", {self.n_tokens / self.seconds:,.0f} tokens/s" if self.seconds else ""
        self.say(f"{self.n_passes:,} forward passes of {self.reader.name}, {self.n_tokens:,} tokens{rate}")

    # One batch --------------------------------------------------------------------------------------------------------

    def launch(self, sequences: Sequences, batch: list[int], rows: list[list[int]] | None = None) -> _Launched:
        """Starts a pass; rows: which sequences of the batch (by their place in it) share a row, if not the cheapest."""
        import torch

        started = time.perf_counter()
        if sequences.n_shared and sequences.cache is None:
            self._run_shared(sequences)
        n_shared = sequences.n_shared
        lengths = [sequences.n_own(i) for i in batch]
        rows = rows or self._layout(lengths, n_shared)
        n_columns = max(1, *(sum(lengths[slot] for slot in row) for row in rows))
        ids = torch.zeros((len(rows), n_columns), dtype=torch.long)
        positions = n_shared + torch.arange(n_columns).repeat(len(rows), 1)
        segments = torch.full((len(rows), n_columns), -1)
        spans = [(0, 0)] * len(batch)
        reads: list[torch.Tensor] = [torch.zeros(0, dtype=torch.long)] * len(batch)
        for r, row in enumerate(rows):
            column = 0
            for slot in row:
                own = sequences.ids[batch[slot]][n_shared:]
                here = slice(column, column + len(own))
                ids[r, here] = torch.from_numpy(own.astype(np.int64))
                positions[r, here] = n_shared + torch.arange(len(own))
                segments[r, here] = slot
                start = r * n_columns + column
                spans[slot] = (start, start + len(own))
                reads[slot] = torch.from_numpy(sequences.positions[batch[slot]].astype(np.int64)) - n_shared + start
                column += len(own)

        device = self.reader.device
        inputs: dict[str, Any] = {"input_ids": _moved(ids, device), "use_cache": bool(n_shared)}
        if n_shared:
            inputs["past_key_values"] = self._cache_for(sequences.cache, len(rows))
        if any(len(row) > 1 for row in rows):
            positions, segments = _moved(positions, device), _moved(segments, device)
            inputs |= {"position_ids": positions, "attention_mask": self._mask(positions, segments, n_shared)}
        activations = self._run(inputs, sum(lengths))

        norms, picked = [], []
        for activation in activations:
            flat = activation.flatten(0, 1)
            norms.append(row_norms(flat).to("cpu", non_blocking=True))
            picked.append([flat[_moved(read, flat.device)] for read in reads])
        # A model may be spread over devices, and none of them need be torch's current one.
        ready = []
        for place in {activation.device for activation in activations if activation.is_cuda}:
            ready.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            ready[-1].record(torch.cuda.current_stream(place))
        self.seconds += time.perf_counter() - started
        return _Launched(picked, norms, spans, ready)

    def finish(self, sequences: Sequences, launched: _Launched) -> list[Read]:
        """What each sequence of a batch gives, once it is there."""
        started = time.perf_counter()
        for event in launched.ready:
            event.synchronize()
        shared = sequences.shared_norms or [np.empty(0)] * len(launched.norms)
        norms = [[before, own.numpy()] for before, own in zip(shared, launched.norms, strict=True)]
        self.seconds += time.perf_counter() - started
        return [
            Read(
                rows=[rows[slot] for rows in launched.rows],
                norms=[np.concatenate([before, own[start:end]]) if end > start else own[:0] for before, own in norms],
            )
            for slot, (start, end) in enumerate(launched.spans)
        ]

    def _run(self, inputs: dict[str, Any], n_tokens: int) -> list[torch.Tensor]:
        activations = self.reader.run(**inputs)
        self.n_passes += 1
        self.n_tokens += n_tokens
        return activations

    def _run_shared(self, sequences: Sequences) -> None:
        """Runs what the sequences share, in pieces of at most batch_tokens."""
        import torch
        from transformers import DynamicCache

        one = next(one for one in sequences.ids if len(one))  # nothing is run of the others
        ids = torch.from_numpy(one[: sequences.n_shared].astype(np.int64))[None]
        # Without its config a cache keeps all keys of sliding windows, so that the model's own masks stay right.
        cache = DynamicCache(config=self.config) if self.strategy == "copied" else DynamicCache()
        parts: list[list[Doubles]] = []
        for piece in torch.split(ids, self.budget(sequences.n_shared), dim=1):
            inputs = {"input_ids": _moved(piece, self.reader.device), "past_key_values": cache, "use_cache": True}
            activations = self._run(inputs, piece.shape[1])
            parts.append([row_norms(activation[0]).cpu().numpy() for activation in activations])
        sequences.shared_norms = [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
        sequences.cache = cache

    def _cache_for(self, cache: Any, n_rows: int) -> Any:
        import torch

        if self.strategy != "copied":
            return _shared_cache(cache)
        copied = copy.deepcopy(cache)
        copied.reorder_cache(torch.zeros(n_rows, dtype=torch.long, device=self.reader.device))
        return copied

    def _mask(self, positions: torch.Tensor, segments: torch.Tensor, n_shared: int) -> Any:
        """What each token sees: of the shared ones and of its own sequence, those up to itself.

        positions, segments: [n_rows, n_columns] place in its sequence, and which sequence (-1: padding)

        Returns [n_rows, 1, n_columns, n_shared + n_columns] for the attention weights to be added to; where layers
        differ in what they see, one for each kind.
        """
        import torch

        shared = torch.arange(n_shared, device=positions.device).expand(len(positions), -1)
        keys, queries = torch.cat([shared, positions], dim=1)[:, None, :], positions[:, :, None]
        same = (segments[:, :, None] == segments[:, None, :]) & (positions[:, None, :] <= queries)
        seen = torch.cat([same.new_ones((*positions.shape, n_shared)), same], dim=2)

        def weights(kind: str) -> torch.Tensor:
            width = getattr(self.config, WINDOWS.get(kind, ""), None)
            visible = seen
            if width and kind == "sliding_attention":
                visible = seen & (queries - keys < width)
            elif width and kind == "chunked_attention":
                visible = seen & (queries // width == keys // width)
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
            return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)[:, None]

        kinds = set(getattr(self.config, "layer_types", None) or ["sliding_attention"])
        return weights(kinds.pop()) if len(kinds) == 1 else {kind: weights(kind) for kind in kinds}

    def _layout(self, lengths: list[int], n_shared: int) -> list[list[int]]:
        """Which sequences share a row: one in each, or, packed, as many as make the arithmetic least."""
        alone = [[slot] for slot in range(len(lengths))]
        if self.strategy != "packed" or len(lengths) == 1:
            return alone
        layouts = [alone] + [_packed(lengths, length) for length in PACKED_LENGTHS]
        return min(layouts, key=lambda rows: self._cost(rows, lengths, n_shared))

    def _cost(self, rows: list[list[int]], lengths: list[int], n_shared: int) -> float:
        """Multiplications per layer, roughly: by weights, of attention, and of keys and values copied."""
        n_columns = max(sum(lengths[slot] for slot in row) for row in rows)
        # A single sequence in a row needs no mask where nothing is shared, and then half of its products.
        n_seen = n_shared + n_columns / (2 if len(rows) == len(lengths) and not n_shared else 1)
        n_weights, d_attention, d_keys = self._sizes()
        per_column = n_weights + ATTENTION_COST * n_seen * 2 * d_attention
        # Keys and values of what is shared are joined with a row's own, and then repeated for each head.
        copied = COPY_COST * (n_shared + n_columns) * 2 * (d_keys + d_attention) if n_shared else 0
        return len(rows) * (n_columns * per_column + copied)

    def _sizes(self) -> tuple[float, int, int]:
        """Weights, width of the queries and width of the keys, of one layer."""
        n_heads = getattr(self.config, "num_attention_heads", 1)
        d_head = getattr(self.config, "head_dim", None) or self.config.hidden_size // n_heads
        n_keys = getattr(self.config, "num_key_value_heads", None) or n_heads
        model = self.reader.model
        n_embedded = getattr(self.config, "vocab_size", 0) * self.config.hidden_size
        n_weights = max(0, sum(parameter.numel() for parameter in model.parameters()) - n_embedded)
        return n_weights / self.config.num_hidden_layers, n_heads * d_head, n_keys * d_head

    # Memory -----------------------------------------------------------------------------------------------------------

    def budget(self, n_shared: int) -> int:
        """Most tokens of a batch behind n_shared that all have in common; from the free memory where not given."""
        if self.batch_tokens is None:
            free = free_memory(self.reader.device)
            most = MOST_ON_CPU if self.reader.device.type == "cpu" else MOST_BATCH_TOKENS
            n_tokens = most if free is None else int(MEMORY_SHARE * free / self._bytes_per_token(n_shared))
            n_tokens = min(max(n_tokens, LEAST_BATCH_TOKENS), most)
            # A power of two, so that a little more or less memory changes no bit of the results.
            self.batch_tokens = 1 << (n_tokens.bit_length() - 1)
        return self.batch_tokens

    def _bytes_per_token(self, n_shared: int) -> int:
        """What a token of a batch takes while a layer runs, generously."""
        width = getattr(self.config, "intermediate_size", None) or 4 * self.config.hidden_size
        experts = getattr(self.config, "num_experts_per_tok", None) or 1
        n_bytes = 4 * (8 * self.config.hidden_size + 4 * width * experts)
        n_seen = n_shared + PACKED_LENGTHS[2]
        n_scores = getattr(self.config, "num_attention_heads", 1) if self._attention() == "eager" else 1
        return int(n_bytes + 3 * 4 * n_seen * n_scores)

    def _attention(self) -> str:
        return str(getattr(self.config, "_attn_implementation", "eager"))

    def halve(self, batch: list[int], n_tokens: int) -> None:
        """Goes on with smaller batches. Raises InputError where this one was a single sequence."""
        import torch

        if len(batch) == 1:
            raise InputError(
                f"a prompt of {n_tokens} tokens does not fit into the memory of {self.reader.device} beside "
                f"{self.reader.name}: show fewer demonstrations, or take --dtype bfloat16"
            )
        if self.reader.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_tokens = max(1, min(self.batch_tokens or n_tokens, n_tokens) // 2)
        self.say(f"out of memory with {n_tokens} tokens in a pass: going on with {self.batch_tokens} (--batch-tokens)")

    # Self-check -------------------------------------------------------------------------------------------------------

    def _choose(self, ids: Sequence[IntArray]) -> None:
        """Takes the first strategy that gives what the model gives each sequence alone."""
        tokens = np.concatenate([sequence[:64] for sequence in ids[:8]] or [np.zeros(1, np.int32)])
        tokens = np.resize(tokens, CHECK_SHARED + sum(CHECK_LENGTHS))
        ends = np.cumsum([CHECK_SHARED, *CHECK_LENGTHS])
        checks = [np.concatenate([tokens[: ends[0]], tokens[a:b]]) for a, b in pairwise(ends)]
        counted = self.n_passes, self.n_tokens
        self.strategy = "plain"
        refused = []
        with _short_windows(self.config):
            expected = [self.alone(one, np.arange(len(one), dtype=np.int32)).rows for one in checks]
            for strategy in get_args(Strategy):
                fault = self._fault(strategy, checks, expected)
                if fault is None:
                    break
                refused.append(f"{strategy} {fault}")
        self.strategy = strategy
        self.n_passes, self.n_tokens = counted
        self.why = "equals each sequence run alone" + (f"; not {'; not '.join(refused)}" if refused else "")
        self.say(f"forward passes of {self.reader.name}: {strategy} ({self.why})")

    def _fault(self, strategy: Strategy, ids: list[IntArray], expected: list[list[torch.Tensor]]) -> str | None:
        """What is wrong with a strategy; None where it gives the activations expected at every token."""
        if strategy == "plain":
            return None
        if strategy == "packed" and (unknown := [n for n in UNKNOWN_WINDOWS if getattr(self.config, n, None)]):
            return f"because of {unknown[0]} in the model's config"
        self.strategy = strategy
        batch = list(range(len(ids)))
        apart = [[slot] for slot in batch]
        # Packed sequences may also get a row each, which the model then masks itself.
        ways = [(n, rows) for n in (CHECK_SHARED, 0) for rows in ([batch], apart)]
        worst = 0.0
        try:
            for n_shared, layout in ways if strategy == "packed" else [(CHECK_SHARED, apart)]:
                read = [np.arange(n_shared, len(one), dtype=np.int32) for one in ids]
                sequences = Sequences(self, ids, read, n_shared)
                for _ in range(2):  # the second time finds the cache as the first has left it
                    found = self.finish(sequences, self.launch(sequences, batch, layout))
                    for one, alone in zip(found, expected, strict=True):
                        for rows, rows_alone in zip(one.rows, alone, strict=True):
                            worst = max(worst, _relative_error(rows, rows_alone[n_shared:]))
        except Exception as error:  # whatever a model says of inputs that it does not know
            if is_out_of_memory(error):
                raise
            return f"({type(error).__name__})"
        tolerance = CHECK_TOLERANCE.get(str(self.dtype).removeprefix("torch."), 6e-2)
        return None if worst <= tolerance else f"(off by {worst:.1g})"


def run_batches(*sides: Sequences, n_done: int = 0) -> Iterator[tuple[list[int], list[list[Read]]]]:
    """Runs the sequences of each side (as without and with demonstrations), shortest first, less the first n_done.

    Yields the indices of a batch and, for each side, what each of them gives. A batch that does not fit into memory is
    run again in halves. On CUDA a batch is on its way while the one before is being used.

    Raises InputError where a single sequence does not fit.
    """
    n_sequences = len(sides[0].ids)
    lengths = np.max([[side.n_own(i) for i in range(n_sequences)] for side in sides], axis=0, initial=0)
    order = [int(i) for i in np.argsort(lengths, kind="stable")][n_done:] if n_sequences else []
    ahead: deque[tuple[list[int], list[_Launched]]] = deque()
    n_ahead = 1 if sides[0].passes.reader.device.type == "cuda" else 0
    while order or ahead:
        if order and len(ahead) <= n_ahead:
            batch = _take(order, lengths, min(side.passes.budget(side.n_shared) for side in sides))
            try:
                ahead.append((batch, [side.passes.launch(side, batch) for side in sides]))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                for passes in {id(side.passes): side.passes for side in sides}.values():
                    passes.halve(batch, int(lengths[batch].sum()))
                continue
            order = order[len(batch) :]
        if len(ahead) > n_ahead or not order:
            batch, launched = ahead.popleft()
            yield batch, [side.passes.finish(side, one) for side, one in zip(sides, launched, strict=True)]


def _shared_cache(cache: Any) -> Any:
    """A cache whose keys and values every row sees before its own, and to which nothing is added."""
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


def check_vocabulary(reader: Reader, ids: Sequence[IntArray]) -> None:
    """Raises InputError for a token that the model's embedding does not have."""
    embedding = getattr(reader.model, "get_input_embeddings", lambda: None)()
    largest = max((int(sequence.max(initial=0)) for sequence in ids), default=0)
    if embedding is not None and largest >= embedding.weight.shape[0]:
        raise InputError(
            f"{reader.name} knows {embedding.weight.shape[0]} tokens, but its tokenizer gives token id {largest}: "
            "the tokenizer belongs to another model"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch has no class of its own for that on the CPU."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error)
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the machine does not say."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        limit = (CONTAINER / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((CONTAINER / "memory.current").read_text(encoding="ascii"))
            lines = (CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines()
            # Pages of files, such as those of checkpoints just read, are given up when memory is asked for.
            files = [int(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file")]
            found.append(int(limit) - used + sum(files))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


def _take(order: list[int], lengths: NDArray[np.int64], batch_tokens: int) -> list[int]:
    """The first of `order` that fit into a batch when each is padded to the longest; at least one."""
    for n, index in enumerate(order):
        if n and (n + 1) * lengths[index] > batch_tokens:
            return order[:n]
    return order


def _packed(lengths: list[int], row_length: int) -> list[list[int]]:
    """Sequences in order, in as many rows of about equal length as hold them at row_length."""
    total = sum(lengths)
    n_rows = max(1, min(len(lengths), -(-total // row_length)))
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    before = 0
    for slot, length in enumerate(lengths):
        rows[min(n_rows - 1, int((before + length / 2) * n_rows / max(1, total)))].append(slot)
        before += length
    return [row for row in rows if row]


def _shared_length(sequences: Sequences) -> int:
    """How many tokens all sequences have in common before the first that is read; 0 where that is not worth it."""
    used = [i for i, sequence in enumerate(sequences.ids) if len(sequence)]
    if len(used) < 2:
        return 0
    first = sequences.ids[used[0]]
    n_shared = min(int(sequences.positions[i].min()) for i in used)
    for i in used:
        other = sequences.ids[i][:n_shared]
        differs = np.flatnonzero(first[: len(other)] != other)
        n_shared = int(differs[0]) if len(differs) else len(other)
    return n_shared if n_shared >= LEAST_SHARED else 0


@contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Windows of attention so short that short sequences reach beyond them."""
    saved = {
        name: width
        for name in WINDOWS.values()
        if isinstance(width := getattr(config, name, None), int) and width > CHECK_WINDOW
    }
    try:
        for name in saved:
            setattr(config, name, CHECK_WINDOW)
        yield
    finally:
        for name, width in saved.items():
            setattr(config, name, width)


def _relative_error(rows: torch.Tensor, expected: torch.Tensor) -> float:
    import torch

    error = torch.linalg.vector_norm(rows.double() - expected.double(), dim=-1)
    relative = error / torch.linalg.vector_norm(expected.double(), dim=-1).clamp_min(1e-12)
    worst = relative.max() if rows.dtype in (torch.float32, torch.float64) else relative.median()
    return float(worst.nan_to_num(torch.inf))


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """[n_tokens] float64 Euclidean norm of each row [n_tokens, d_in]; NaN where it holds a NaN or infinity."""
    import torch

    norms = torch.linalg.vector_norm(rows.float(), dim=-1).double()
    finite = torch.isfinite(rows).all(dim=-1)
    return torch.where(finite, norms, torch.nan)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
