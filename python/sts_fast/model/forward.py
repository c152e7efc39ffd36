"""Forward passes in which nothing is computed twice: the shared start of all sequences is run once."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np

from sts_fast.model.hooks import Hook
from sts_fast.model.memory import TokenBudget, is_out_of_memory, take
from sts_fast.model.packing import (
    attention_masks,
    bytes_per_token,
    cheapest_rows,
    check_vocabulary,
    lay_out,
    layer_sizes,
    moved,
    shared_cache,
    shared_length,
    short_windows,
)

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import Doubles, IntArray

# In the order in which they are tried, fastest first:
#   packed  several sequences per row, separated by a mask, after the keys and values of the shared start
#   cached  one sequence per row, padded on the right, after the same keys and values
#   copied  one sequence per row, each after a copy of the model's own cache (linear attention changes its state)
#   plain   one sequence per row, from its first token
Strategy = Literal["packed", "cached", "copied", "plain"]

# The self-check: tokens that its sequences share, and tokens of each alone. Meanwhile the windows of sliding and
# chunked attention are cut to CHECK_WINDOW, because such short sequences would not exceed them.
CHECK_SHARED, CHECK_LENGTHS, CHECK_WINDOW = 20, (9, 4, 13), 6
# Other config keys of attention to a part of the tokens, which the mask does not know.
UNKNOWN_WINDOWS = ("window_size", "attention_types", "local_attention", "block_size", "attention_window")
# Largest relative error of a token against the sequence run alone. In half precision the median token counts, because
# the last bit may make a router send a token to another expert.
CHECK_TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}


class Runnable(Protocol):
    """A model that is run up to its last hook; see sts_fast.model.language_model.LanguageModel."""

    model: torch.nn.Module
    device: torch.device
    name: str
    hooks: list[Hook]

    def run(self, **inputs: Any) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Read:
    """Activations of one sequence at each hook.

    rows:  per hook [n_read, d_in], at the positions to read, on the hook's device
    norms: per hook [n_tokens] float64, Euclidean, of every token up to the last one read; NaN where a token has a NaN
           or infinity
    """

    rows: list[torch.Tensor]
    norms: list[Doubles]


@dataclass
class Sequences:
    """Sequences of which some tokens are read, and their shared start.

    passes:    the forward passes of the model that runs them
    ids:       each [n_tokens] int32, up to the last token that is read
    positions: each [n_read] int32, the tokens to read
    n_shared:  number of tokens at the start that are the same in all, none of which is read
    cache:     the model's keys and values, or states, of the shared start; made for the first batch
    shared_norms: per hook [n_shared]
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
    """A batch that was started; on CUDA its results may not be ready yet."""

    rows: list[list[torch.Tensor]]
    norms: list[torch.Tensor]
    spans: list[tuple[int, int]]
    ready: list[Any]


class ForwardPasses:
    """The forward passes of one model, with their strategy, number and time.

    runnable:     the model; only the rows at the positions to read are kept of its results
    batch_tokens: most tokens of one pass; None: as many as the free memory allows, 256 to 8,192 (2,048 on a CPU)
    say:          receives one line for each choice made and each problem that was solved

    strategy:     way of running sequences, None before the first: the first of `Strategy` whose activations, on a few
                  short sequences of the prompts' tokens, equal those of each sequence run alone
    n_passes, n_tokens, seconds: forward passes, their tokens without padding, and their time; the self-check is not
                  counted
    """

    def __init__(
        self, runnable: Runnable, *, batch_tokens: int | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        self.runnable, self.say = runnable, say or (lambda line: None)
        self.memory = TokenBudget(
            runnable.device, runnable.name, n_tokens=batch_tokens, say=lambda line: self.say(line)
        )
        self.config = runnable.model.config.get_text_config()  # type: ignore[union-attr, operator]
        self.dtype = next(runnable.model.parameters()).dtype
        self.strategy: Strategy | None = None
        self.why = ""
        self.n_passes = self.n_tokens = 0
        self.seconds = 0.0
        self._stream: Any = None

    @property
    def batch_tokens(self) -> int | None:
        return self.memory.n_tokens

    @batch_tokens.setter
    def batch_tokens(self, n_tokens: int | None) -> None:
        self.memory.n_tokens = n_tokens

    def prepare(self, ids: Sequence[IntArray], positions: Sequence[IntArray]) -> Sequences:
        """Sequences to be read at their positions; a sequence without positions is not run."""
        ends = [int(read.max(initial=-1)) + 1 for read in positions]
        needed = [sequence[:end] for sequence, end in zip(ids, ends, strict=True)]
        check_vocabulary(self.runnable.model, needed, name=self.runnable.name)
        if self.strategy is None:
            self._choose([sequence for sequence in ids if len(sequence)])
        if self._stream is not None:
            import torch

            self._stream.wait_stream(torch.cuda.current_stream(self.runnable.device))  # it may have changed the weights
        sequences = Sequences(self, needed, list(positions))
        if self.strategy != "plain":
            sequences.n_shared = shared_length(sequences.ids, sequences.positions)
        return sequences

    def alone(self, ids: IntArray, positions: IntArray) -> Read:
        """Runs one sequence by itself from its first token, regardless of the strategy."""
        sequences = Sequences(self, [ids], [positions])
        return self.finish(sequences, self.launch(sequences, [0]))[0]

    def summary(self) -> dict[str, Any]:
        """Strategy, sizes and time of the passes for scores.json; the self-check is not counted."""
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
        self.say(f"{self.n_passes:,} forward passes of {self.runnable.name}, {self.n_tokens:,} tokens{rate}")

    # One batch --------------------------------------------------------------------------------------------------------

    def launch(self, sequences: Sequences, batch: list[int], rows: list[list[int]] | None = None) -> _Launched:
        """Starts a pass; rows: indices in the batch of the sequences of each row, by default the cheapest layout."""
        import torch

        started = time.perf_counter()
        with self._own_stream():
            if sequences.n_shared and sequences.cache is None:
                self._run_shared(sequences)
            n_shared = sequences.n_shared
            lengths = [sequences.n_own(i) for i in batch]
            own = [sequences.ids[i][n_shared:] for i in batch]
            laid_out = lay_out(own, rows or self._layout(lengths, n_shared), n_shared)
            starts = np.repeat([start for start, _ in laid_out.spans], [len(sequences.positions[i]) for i in batch])
            read = np.concatenate([sequences.positions[i] for i in batch]) - n_shared + starts

            device = self.runnable.device
            inputs: dict[str, Any] = {"input_ids": moved(laid_out.ids, device), "use_cache": bool(n_shared)}
            if n_shared:
                inputs["past_key_values"] = self._cache_for(sequences.cache, len(laid_out.ids))
            if laid_out.shares_rows:
                positions, segments = moved(laid_out.positions, device), moved(laid_out.segments, device)
                masks = attention_masks(self.config, self.dtype, positions, segments, n_shared)
                inputs |= {"position_ids": positions, "attention_mask": masks}
            activations = self._run(inputs, sum(lengths))

            norms, picked = [], []
            for activation in activations:
                flat = activation.flatten(0, 1)
                norms.append(row_norms(flat).to("cpu", non_blocking=True))
                rows_read = flat[moved(torch.from_numpy(read.astype(np.int64)), flat.device)]
                picked.append(list(torch.split(rows_read, [len(sequences.positions[i]) for i in batch])))
            # A model may be spread over several devices, and none of them may be torch's current one.
            ready = []
            for place in {activation.device for activation in activations if activation.is_cuda}:
                ready.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
                ready[-1].record(torch.cuda.current_stream(place))
        self.seconds += time.perf_counter() - started
        return _Launched(picked, norms, laid_out.spans, ready)

    def finish(self, sequences: Sequences, launched: _Launched) -> list[Read]:
        """Waits for a batch and returns the activations of each of its sequences."""
        import torch

        started = time.perf_counter()
        for event in launched.ready:
            event.synchronize()
        for rows in launched.rows:
            for first in rows[:1]:  # the others are views of the same memory
                if first.is_cuda:
                    # The caller's stream reads this memory: the model's must not write there before.
                    first.record_stream(torch.cuda.current_stream(first.device))
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

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Gives the model its own CUDA stream; the use of one batch then need not wait for the next."""
        import torch

        device = self.runnable.device
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the weights may still be in transfer
        with torch.cuda.stream(self._stream):
            yield

    def _run(self, inputs: dict[str, Any], n_tokens: int) -> list[torch.Tensor]:
        activations = self.runnable.run(**inputs)
        self.n_passes += 1
        self.n_tokens += n_tokens
        return activations

    def _run_shared(self, sequences: Sequences) -> None:
        """Runs the shared start of the sequences, in pieces of at most batch_tokens."""
        import torch
        from transformers import DynamicCache

        sequence = next(sequence for sequence in sequences.ids if len(sequence))  # empty ones are not run
        ids = torch.from_numpy(sequence[: sequences.n_shared].astype(np.int64))[None]
        # Without a config, the cache keeps all keys of sliding windows, as the model's own masks expect.
        cache = DynamicCache(config=self.config) if self.strategy == "copied" else DynamicCache()
        parts: list[list[Doubles]] = []
        for piece in torch.split(ids, self.budget(sequences.n_shared), dim=1):
            inputs = {"input_ids": moved(piece, self.runnable.device), "past_key_values": cache, "use_cache": True}
            activations = self._run(inputs, piece.shape[1])
            parts.append([row_norms(activation[0]).cpu().numpy() for activation in activations])
        sequences.shared_norms = [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]
        sequences.cache = cache

    def _cache_for(self, cache: Any, n_rows: int) -> Any:
        import torch

        if self.strategy != "copied":
            return shared_cache(cache)
        copied = copy.deepcopy(cache)
        copied.reorder_cache(torch.zeros(n_rows, dtype=torch.long, device=self.runnable.device))
        return copied

    def _layout(self, lengths: list[int], n_shared: int) -> list[list[int]]:
        """Indices of the sequences in each row: one, or for `packed` the cheapest layout."""
        if self.strategy != "packed" or len(lengths) == 1:
            return [[slot] for slot in range(len(lengths))]
        return cheapest_rows(lengths, n_shared, layer_sizes(self.runnable.model, self.config))

    def budget(self, n_shared: int) -> int:
        """Most tokens of a batch after n_shared shared ones."""
        return self.memory.tokens(bytes_per_token(self.config, n_shared))

    # Self-check -------------------------------------------------------------------------------------------------------

    def _choose(self, ids: Sequence[IntArray]) -> None:
        """Chooses the first strategy whose activations equal those of each sequence run alone."""
        tokens = np.concatenate([sequence[:64] for sequence in ids[:8]] or [np.zeros(1, np.int32)])
        tokens = np.resize(tokens, CHECK_SHARED + sum(CHECK_LENGTHS))
        ends = np.cumsum([CHECK_SHARED, *CHECK_LENGTHS])
        checks = [np.concatenate([tokens[: ends[0]], tokens[a:b]]) for a, b in pairwise(ends)]
        counted = self.n_passes, self.n_tokens
        self.strategy = "plain"
        refused = []
        with short_windows(self.config, CHECK_WINDOW):
            expected = [self.alone(check, np.arange(len(check), dtype=np.int32)).rows for check in checks]
            for strategy in get_args(Strategy):
                fault = self._fault(strategy, checks, expected)
                if fault is None:
                    break
                refused.append(f"{strategy} {fault}")
        self.strategy = strategy
        self.n_passes, self.n_tokens = counted
        self.why = "equals each sequence run alone" + (f"; not {'; not '.join(refused)}" if refused else "")
        self.say(f"forward passes of {self.runnable.name}: {strategy} ({self.why})")

    def _fault(self, strategy: Strategy, ids: list[IntArray], expected: list[list[torch.Tensor]]) -> str | None:
        """Reason to reject a strategy; None where it gives the expected activations at every token."""
        if strategy == "plain":
            return None
        if strategy == "packed" and (unknown := [n for n in UNKNOWN_WINDOWS if getattr(self.config, n, None)]):
            return f"because of {unknown[0]} in the model's config"
        self.strategy = strategy
        batch = list(range(len(ids)))
        apart = [[slot] for slot in batch]
        # Packed sequences may also get a row each; the model then masks them itself.
        ways = [(n, rows) for n in (CHECK_SHARED, 0) for rows in ([batch], apart)]
        worst = 0.0
        try:
            for n_shared, layout in ways if strategy == "packed" else [(CHECK_SHARED, apart)]:
                read = [np.arange(n_shared, len(sequence), dtype=np.int32) for sequence in ids]
                sequences = Sequences(self, ids, read, n_shared)
                for _ in range(2):  # the second time uses the cache as the first left it
                    reads = self.finish(sequences, self.launch(sequences, batch, layout))
                    for batched, alone in zip(reads, expected, strict=True):
                        for rows, rows_alone in zip(batched.rows, alone, strict=True):
                            worst = max(worst, _relative_error(rows, rows_alone[n_shared:]))
        except Exception as error:  # a model can raise anything for inputs that it does not support
            if is_out_of_memory(error):
                raise
            return f"({type(error).__name__})"
        tolerance = CHECK_TOLERANCE.get(str(self.dtype).removeprefix("torch."), 6e-2)
        return None if worst <= tolerance else f"(off by {worst:.1g})"


def run_batches(*sides: Sequences, n_done: int = 0) -> Iterator[tuple[list[int], list[list[Read]]]]:
    """Runs the sequences of each side (such as without and with demonstrations), shortest first.

    n_done: number of sequences to skip, the shortest ones

    Yields the indices of a batch and, for each side, the activations of its sequences. A batch that does not fit into
    memory is run again in halves. On CUDA the next batch is computed while the current one is being used.

    Raises InputError where a single sequence does not fit.
    """
    n_sequences = len(sides[0].ids)
    lengths = np.max([[side.n_own(i) for i in range(n_sequences)] for side in sides], axis=0, initial=0)
    order = [int(i) for i in np.argsort(lengths, kind="stable")][n_done:] if n_sequences else []
    ahead: deque[tuple[list[int], list[_Launched]]] = deque()
    n_ahead = 1 if sides[0].passes.runnable.device.type == "cuda" else 0
    while order or ahead:
        if order and len(ahead) <= n_ahead:
            batch = take(order, lengths, min(side.passes.budget(side.n_shared) for side in sides))
            try:
                ahead.append((batch, [side.passes.launch(side, batch) for side in sides]))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                for passes in {id(side.passes): side.passes for side in sides}.values():
                    passes.memory.halve(len(batch), int(lengths[batch].sum()))
                continue
            order = order[len(batch) :]
        if len(ahead) > n_ahead or not order:
            batch, launched = ahead.popleft()
            yield batch, [side.passes.finish(side, started) for side, started in zip(sides, launched, strict=True)]


def _relative_error(rows: torch.Tensor, expected: torch.Tensor) -> float:
    import torch

    error = torch.linalg.vector_norm(rows.double() - expected.double(), dim=-1)
    relative = error / torch.linalg.vector_norm(expected.double(), dim=-1).clamp_min(1e-12)
    worst = relative.max() if rows.dtype in (torch.float32, torch.float64) else relative.median()
    return float(worst.nan_to_num(torch.inf))


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """[n_tokens] float64 Euclidean norm of each row [n_tokens, d_in]; NaN where it contains NaN or infinity."""
    import torch

    norms = torch.linalg.vector_norm(rows.float(), dim=-1).double()
    finite = torch.isfinite(rows).all(dim=-1)
    return torch.where(finite, norms, torch.nan)
