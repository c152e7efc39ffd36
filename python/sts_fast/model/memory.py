"""How many tokens a forward pass may have: as many as the free memory allows, and half where that was too many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sts_fast.errors import InputError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Result = TypeVar("Result")

# A CPU gains nothing from more tokens than fit into its caches.
MOST_BATCH_TOKENS, MOST_ON_CPU, LEAST_BATCH_TOKENS = 8192, 2048, 256
# Of the free memory, what a batch may take; and where Linux says what a container may use.
MEMORY_SHARE, CONTAINER = 0.4, Path("/sys/fs/cgroup")


class TokenBudget:
    """Most tokens of a forward pass of one model.

    device, name: where the model takes its inputs, and how errors call it
    n_tokens: the budget; None until the free memory is asked for one
    say:      is told where a pass did not fit and smaller ones follow
    """

    def __init__(
        self,
        device: torch.device,
        name: str,
        *,
        n_tokens: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.device, self.name, self.n_tokens = device, name, n_tokens
        self.say = say or (lambda line: None)

    def tokens(self, bytes_per_token: int) -> int:
        """The budget; the first time, what fits of tokens that take so many bytes each, 256 to 8,192 (CPU: 2,048)."""
        if self.n_tokens is None:
            free = free_memory(self.device)
            most = MOST_ON_CPU if self.device.type == "cpu" else MOST_BATCH_TOKENS
            n_tokens = most if free is None else int(MEMORY_SHARE * free / bytes_per_token)
            n_tokens = min(max(n_tokens, LEAST_BATCH_TOKENS), most)
            # A power of two, so that a little more or less memory changes no bit of the results.
            self.n_tokens = 1 << (n_tokens.bit_length() - 1)
        return self.n_tokens

    def halve(self, n_sequences: int, n_tokens: int) -> None:
        """Goes on with smaller batches. Raises InputError where this one was a single sequence."""
        import torch

        if n_sequences == 1:
            raise InputError(
                f"a prompt of {n_tokens} tokens does not fit into the memory of {self.device} beside {self.name}: "
                "show fewer demonstrations, or take --dtype bfloat16"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.n_tokens = max(1, min(self.n_tokens or n_tokens, n_tokens) // 2)
        self.say(f"out of memory with {n_tokens} tokens in a pass: going on with {self.n_tokens} (--batch-tokens)")

    def in_batches(
        self, lengths: Sequence[int], most: int, run: Callable[[list[int]], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        """Batches of sequences, shortest first, and what `run` gives of each; what does not fit is run in halves.

        most: tokens of a batch, whatever the budget
        """
        order = np.argsort(lengths, kind="stable").tolist()
        while order:
            n_tokens = most if self.n_tokens is None else min(most, self.n_tokens)
            batch = take(order, np.asarray(lengths), n_tokens)
            try:
                result = run(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.halve(len(batch), sum(lengths[i] for i in batch))
                continue
            order = order[len(batch) :]
            yield batch, result


def take(order: list[int], lengths: NDArray[np.int64], batch_tokens: int) -> list[int]:
    """The first of `order` that fit into a batch when each is padded to the longest; at least one."""
    for n, index in enumerate(order):
        if n and (n + 1) * lengths[index] > batch_tokens:
            return order[:n]
    return order


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
