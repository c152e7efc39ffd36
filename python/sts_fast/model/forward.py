"""Forward passes in which nothing is computed twice: the shared start of all sequences is run once."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, get_args

import numpy as np

from sts_fast.model.agreement import (
    CHECK_LONGEST,
    CHECK_SHARED,
    CHECK_WINDOW,
    check_sequences,
    relative_error,
    tolerance,
)
from sts_fast.model.hooks import Hook
from sts_fast.model.lengths import ANY_LENGTH, EACH_LENGTH, LengthRule, Regime, length_rule
from sts_fast.model.memory import TokenBudget, is_out_of_memory, take
from sts_fast.model.packing import (
    UNKNOWN_WINDOWS,
    as_cache,
    attention_masks,
    bytes_per_token,
    cheapest_rows,
    check_vocabulary,
    lay_out,
    layer_sizes,
    row_norms,
    shared_cache,
    shared_length,
    short_windows,
)
from sts_fast.ops.devices import moved

if TYPE_CHECKING:
    import torch

    from sts_fast.statistics import Doubles, IntArray

# In the order in which they are tried, fastest first:
#   packed  several sequences per row, separated by a mask, after the keys and values of the shared start
#   cached  one sequence per row, padded on the right, after the same keys and values
#   copied  one sequence per row, each after a copy of the model's own cache (linear attention changes its state)
#   plain   one sequence per row, from its first token
Strategy = Literal["packed", "cached", "copied", "plain"]


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
    ids:       each [n_tokens] int32, up to the last token that is read, or further where `lengths` needs the rest
    positions: each [n_read] int32, the tokens to read
    lengths:   rule by which sequences may be run together
    n_shared:  number of tokens at the start that are the same in all, none of which is read
    cache:     the model's keys and values, or states, of the shared start; made for the first batch
    shared_norms: per hook [n_shared]
    """

    passes: ForwardPasses
    ids: list[IntArray]
    positions: list[IntArray]
    lengths: LengthRule = ANY_LENGTH
    n_shared: int = 0
    cache: Any = None
    shared_norms: list[Doubles] = field(default_factory=list)

    def regime(self, index: int) -> Regime:
        """Equal for sequences that may be run together; those that are not run may be run with any."""
        return self.lengths.regime(len(self.ids[index]) or self.n_shared)

    def n_before(self, index: int) -> int:
        """Number of tokens of the shared start that a sequence is run behind: all or none."""
        return self.n_shared if self.regime(index) == self.lengths.regime(self.n_shared) else 0

    def n_own(self, index: int) -> int:
        return max(0, len(self.ids[index]) - self.n_before(index))


@dataclass(frozen=True)
class _Launched:
    """A batch that was started; on CUDA its results may not be ready yet."""

    rows: list[list[torch.Tensor]]
    norms: list[torch.Tensor]
    spans: list[tuple[int, int]]
    shared_norms: list[Doubles]
    ready: list[Any]


class PassRecord(TypedDict):
    """Strategy, sizes and time of the forward passes, for scores.json; the strategy is None where there were none."""

    strategy: str | None
    why: str
    batch_tokens: int | None
    n_passes: int
    n_tokens: int
    seconds: float
    tokens_per_second: float | None


class ForwardPasses:
    """The forward passes of one model, with their strategy, number and time.

    runnable:     the model; only the rows at the positions to read are kept of its results
    batch_tokens: most tokens of one pass; None: as many as the free memory allows, 256 to 8,192 (2,048 on a CPU)
    say:          receives one line for each choice made and each problem that was solved

    strategy:     way of running sequences, None before the first: the first of `Strategy` whose activations, on a few
                  short sequences of the prompts' tokens, and then on the shortest and longest prompts, equal those of
                  each sequence run alone
    lengths:      rule by which sequences may be run together
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
        self.lengths = length_rule(self.config)
        self.strategy: Strategy | None = None
        self.why = ""
        self._refused: list[str] = []
        self._longest_checked = CHECK_LONGEST
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
        to_run = [sequence for sequence, read in zip(ids, positions, strict=True) if len(read)]
        check_vocabulary(self.runnable.model, to_run, name=self.runnable.name)
        if self.strategy is None:
            self._choose([sequence for sequence in ids if len(sequence)])
        if self._stream is not None:
            import torch

            self._stream.wait_stream(torch.cuda.current_stream(self.runnable.device))  # it may have changed the weights
        sequences = self._sequences(ids, positions)
        longest = max(map(len, to_run), default=0)
        if longest > self._longest_checked:
            self._longest_checked = longest
            sequences = self._checked_at_extremes(sequences, ids)
        return sequences

    def _sequences(self, ids: Sequence[IntArray], positions: Sequence[IntArray]) -> Sequences:
        ends = [int(read.max(initial=-1)) + 1 for read in positions]
        needed = [self.lengths.needed(sequence, end) for sequence, end in zip(ids, ends, strict=True)]
        sequences = Sequences(self, needed, list(positions), self.lengths)
        if self.strategy != "plain":
            sequences.n_shared = shared_length(needed, positions)
            if sum(len(sequence) > 0 and sequences.n_before(i) > 0 for i, sequence in enumerate(needed)) < 2:
                sequences.n_shared = 0
        return sequences

    def alone(self, ids: IntArray, positions: IntArray) -> Read:
        """Runs one sequence by itself from its first token, regardless of the strategy."""
        sequences = Sequences(self, [self.lengths.needed(ids, int(positions.max(initial=-1)) + 1)], [positions])
        return self.finish(sequences, [0], self.launch(sequences, [0]))[0]

    def summary(self) -> PassRecord:
        """The self-check is not counted."""
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
        """Starts a pass of sequences of one regime.

        rows: indices in the batch of the sequences of each row, by default the cheapest layout
        """
        import torch

        started = time.perf_counter()
        with self._own_stream():
            n_shared = sequences.n_before(batch[0])
            if n_shared and sequences.cache is None:
                self._run_shared(sequences)
            lengths = [sequences.n_own(i) for i in batch]
            own = [sequences.ids[i][n_shared:] for i in batch]
            laid_out = lay_out(own, rows or self._layout(lengths, n_shared), n_shared)
            starts = np.repeat([start for start, _ in laid_out.spans], [len(sequences.positions[i]) for i in batch])
            read = np.concatenate([sequences.positions[i] for i in batch]) - n_shared + starts

            device = self.runnable.device
            inputs: dict[str, Any] = {"input_ids": moved(laid_out.ids, device), "use_cache": bool(n_shared)}
            if n_shared:
                inputs |= as_cache(self.runnable.model, self._cache_for(sequences.cache, len(laid_out.ids)))
            if laid_out.shares_rows:
                positions, segments = moved(laid_out.positions, device), moved(laid_out.segments, device)
                masks = attention_masks(self.config, self.dtype, positions, segments, n_shared)
                inputs |= {"position_ids": positions, "attention_mask": masks}
            activations = self._run(inputs, sum(lengths))

            norms, picked = [], []
            for activation in activations:
                flat = activation.flatten(0, 1)
                norms.append(row_norms(flat).to("cpu", non_blocking=flat.is_cuda))
                rows_read = flat[moved(torch.from_numpy(read.astype(np.int64)), flat.device)]
                picked.append(list(torch.split(rows_read, [len(sequences.positions[i]) for i in batch])))
            # A model may be spread over several devices, and none of them may be torch's current one.
            ready = []
            for place in {activation.device for activation in activations if activation.is_cuda}:
                ready.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
                ready[-1].record(torch.cuda.current_stream(place))
        self.seconds += time.perf_counter() - started
        shared_norms = sequences.shared_norms if n_shared else [np.empty(0)] * len(norms)
        return _Launched(picked, norms, laid_out.spans, shared_norms, ready)

    def finish(self, sequences: Sequences, batch: list[int], launched: _Launched) -> list[Read]:
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
        norms = [(before, own.numpy()) for before, own in zip(launched.shared_norms, launched.norms, strict=True)]
        ends = [int(sequences.positions[i].max(initial=-1)) + 1 for i in batch]
        self.seconds += time.perf_counter() - started
        return [
            Read(
                rows=[rows[slot] for rows in launched.rows],
                norms=[np.concatenate([before, own[start:end]])[: ends[slot]] for before, own in norms],
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
        """Runs the shared start of the sequences, in pieces of at most batch_tokens where their lengths allow it."""
        import torch
        from transformers import DynamicCache

        sequence = next(sequence for sequence in sequences.ids if len(sequence))  # empty ones are not run
        ids = torch.from_numpy(sequence[: sequences.n_shared].astype(np.int64))[None]
        # Without a config, the cache keeps all keys of sliding windows, as the model's own masks expect.
        cache = DynamicCache(config=self.config) if self.strategy == "copied" else DynamicCache()
        parts: list[list[Doubles]] = []
        n_tokens, regime = self.budget(sequences.n_shared), sequences.lengths.regime
        if regime(n_tokens) != regime(sequences.n_shared):
            n_tokens = sequences.n_shared
        for piece in torch.split(ids, n_tokens, dim=1):
            inputs = {"input_ids": moved(piece, self.runnable.device), "use_cache": True}
            activations = self._run(inputs | as_cache(self.runnable.model, cache), piece.shape[1])
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
        checks = check_sequences(ids)
        self.strategy = "plain"
        with self._uncounted(), short_windows(self.config, CHECK_WINDOW):
            expected = [self.alone(check, np.arange(len(check), dtype=np.int32)).rows for check in checks]
            for strategy in get_args(Strategy):
                fault = self._fault(strategy, checks, expected)
                if fault is None:
                    break
                self._refused.append(f"{strategy} {fault}")
        self.strategy = strategy
        self._say_choice()

    def _say_choice(self) -> None:
        self.why = f"equals each sequence run alone{''.join(f'; not {refused}' for refused in self._refused)}"
        self.say(f"forward passes of {self.runnable.name}: {self.strategy} ({self.why})")

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        counted = self.n_passes, self.n_tokens, self.seconds
        try:
            yield
        finally:
            self.n_passes, self.n_tokens, self.seconds = counted

    def _checked_at_extremes(self, sequences: Sequences, ids: Sequence[IntArray]) -> Sequences:
        """The sequences, in the first way in which the shortest and the longest equal themselves run alone.

        Whatever a model makes depend on length is found here: then only equal lengths are run together, without a
        shared start.
        """
        alone: dict[int, list[torch.Tensor]] = {}
        with self._uncounted():
            while (fault := self._fault_at_extremes(sequences, ids, alone)) is not None:
                if self.strategy != "plain":
                    self._refused.append(f"{self.strategy} {fault}")
                    ways = get_args(Strategy)
                    self.strategy = ways[ways.index(self.strategy) + 1]
                elif self.lengths != EACH_LENGTH:
                    self._refused.append(f"different lengths together {fault}")
                    self.lengths = EACH_LENGTH
                else:
                    break  # the model differs from itself: no way is closer
                sequences = self._sequences(ids, sequences.positions)
                self._say_choice()
        return sequences

    def _fault_at_extremes(
        self, sequences: Sequences, ids: Sequence[IntArray], alone: dict[int, list[torch.Tensor]]
    ) -> str | None:
        """Reason to reject the current way; None where the shortest and longest sequence equal themselves run alone.

        alone: their activations run alone, by index; filled by the first call
        """
        given = sorted((i for i, sequence in enumerate(sequences.ids) if len(sequence)), key=lambda i: len(ids[i]))
        shortest, longest, worst = given[0], given[-1], 0.0
        trial = replace(sequences, cache=None, shared_norms=[])
        # As many in the batch as the run may put there, because a row of many may look like a long one.
        alike = [i for i in given[::-1] if trial.regime(i) == trial.regime(longest)]
        full = alike[: max(1, self.budget(trial.n_shared) // max(1, *map(trial.n_own, alike)))]
        batches = [[*full[: max(1, len(full) - 1)], alike[-1]] if len(alike) > 1 < len(full) else full[:1]]
        batches += [] if shortest in batches[0] else [[shortest]]
        try:
            for i in {shortest, longest} - set(alone):
                alone[i] = self._read_of(Sequences(self, [ids[i]], [sequences.positions[i]]), [0])[0].rows
            for batch in batches:
                for i, read in zip(batch, self._read_of(trial, batch), strict=True):
                    for rows, expected in zip(read.rows, alone.get(i, []), strict=i in alone):
                        worst = max(worst, relative_error(rows, expected, typical=True))
        except Exception as error:  # a model can raise anything for inputs that it does not support
            if is_out_of_memory(error) and self.memory.fixed:
                raise
            if is_out_of_memory(error):
                return None  # the run itself finds out what fits
            if self.strategy == "plain":
                raise
            return f"({type(error.__cause__ or error).__name__})"
        return None if worst <= tolerance(self.dtype) else f"(off by {worst:.1g} at {len(ids[longest])} tokens)"

    def _read_of(self, sequences: Sequences, batch: list[int]) -> list[Read]:
        return self.finish(sequences, batch, self.launch(sequences, batch))

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
                sequences = Sequences(self, ids, read, n_shared=n_shared)
                for _ in range(2):  # the second time uses the cache as the first left it
                    reads = self.finish(sequences, batch, self.launch(sequences, batch, layout))
                    for batched, alone in zip(reads, expected, strict=True):
                        for rows, rows_alone in zip(batched.rows, alone, strict=True):
                            worst = max(worst, relative_error(rows, rows_alone[n_shared:]))
        except Exception as error:  # a model can raise anything for inputs that it does not support
            if is_out_of_memory(error):
                raise
            return f"({type(error.__cause__ or error).__name__})"
        return None if worst <= tolerance(self.dtype) else f"(off by {worst:.1g})"


def run_batches(*sides: Sequences, n_done: int = 0) -> Iterator[tuple[list[int], list[list[Read]]]]:
    """Runs the sequences of each side (such as without and with demonstrations), shortest first.

    n_done: number of sequences to skip, the shortest ones

    Yields the indices of a batch and, for each side, the activations of its sequences. A batch that does not fit into
    memory is run again in halves. Sequences of different regimes (see LengthRule) are in different batches. On CUDA the
    next batch is computed while the current one is being used.

    Raises InputError where a single sequence does not fit.
    """
    n_sequences = len(sides[0].ids)
    lengths = np.max([[side.n_own(i) for i in range(n_sequences)] for side in sides], axis=0, initial=0)
    regimes = [tuple(side.regime(i) for side in sides) for i in range(n_sequences)]
    order = sorted(range(n_sequences), key=lambda i: (regimes[i], lengths[i]))[n_done:]
    ahead: deque[tuple[list[int], list[_Launched]]] = deque()
    n_ahead = 1 if sides[0].passes.runnable.device.type == "cuda" else 0
    while order or ahead:
        if order and len(ahead) <= n_ahead:
            n_alike = next((n for n, i in enumerate(order) if regimes[i] != regimes[order[0]]), len(order))
            batch = take(order[:n_alike], lengths, min(side.passes.budget(side.n_shared) for side in sides))
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
            started = zip(sides, launched, strict=True)
            yield batch, [side.passes.finish(side, batch, of_side) for side, of_side in started]
