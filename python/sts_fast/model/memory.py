"""Size of forward passes: as many tokens as the free memory allows, and half after running out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sts_fast.errors import InputError, one_line
from sts_fast.ops.devices import device_named, forget_freed, free_bytes

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Result = TypeVar("Result")

# A CPU gains nothing from more tokens than fit into its caches.
MOST_BATCH_TOKENS, MOST_ON_CPU, LEAST_BATCH_TOKENS = 8192, 2048, 256
# Share of these in a pass that a gradient follows, for which the activations of every layer are kept.
GRADIENT_SHARE = 0.5
# Share of the free memory for a batch; folder in which Linux states a container's limits.
MEMORY_SHARE, CONTAINER = 0.4, Path("/sys/fs/cgroup")


class TokenBudget:
    """Most tokens of a forward pass of one model.

    device:   device of the model's inputs
    name:     the model's name in errors
    n_tokens: the budget; None before the free memory was measured
    fixed:    a batch that does not fit is an error, because smaller ones would round otherwise
    say:      receives a line where a pass did not fit and smaller ones follow
    """

    def __init__(
        self,
        device: torch.device,
        name: str,
        *,
        n_tokens: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.device, self.name, self.n_tokens, self.fixed = device, name, n_tokens, False
        self.say = say or (lambda line: None)

    def tokens(self, bytes_per_token: int) -> int:
        """The budget, set from the free memory on first use: 256 to 8,192 tokens (2,048 on a CPU).

        bytes_per_token: memory of one token while a layer runs
        """
        if self.n_tokens is None:
            free = free_memory(self.device)
            most = most_tokens(self.device)
            n_tokens = most if free is None else int(MEMORY_SHARE * free / bytes_per_token)
            n_tokens = min(max(n_tokens, LEAST_BATCH_TOKENS), most)
            # A power of two: a little more or less memory then changes no bit of the results.
            self.n_tokens = 1 << (n_tokens.bit_length() - 1)
        return self.n_tokens

    def halve(self, n_sequences: int, n_tokens: int) -> None:
        """Halves the budget after a batch did not fit. Raises InputError where it was a single sequence."""

        if n_sequences == 1:
            raise InputError(
                f"a prompt of {n_tokens} tokens does not fit into the memory of {self.device} beside {self.name}: "
                "show fewer demonstrations, or give --dtype bfloat16"
            )
        if self.fixed:
            raise InputError(
                f"{n_tokens} tokens in a pass do not fit into the memory of {self.device} beside {self.name}: plan "
                f"again with --batch-tokens {max(1, n_tokens // 2)}"
            )
        forget_freed(self.device)
        self.n_tokens = max(1, min(self.n_tokens or n_tokens, n_tokens) // 2)
        self.say(f"out of memory with {n_tokens} tokens in a pass: going on with {self.n_tokens} (--batch-tokens)")

    def in_batches(
        self,
        lengths: Sequence[int],
        most: int,
        run: Callable[[list[int]], Result],
        chosen: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], Result]]:
        """Yields batches of indices, shortest sequences first, with the result of `run`; halves those that do not fit.

        most:   most tokens of a batch, regardless of the budget
        chosen: indices of the sequences to run; None: all
        """
        order = sorted(range(len(lengths)) if chosen is None else chosen, key=lengths.__getitem__)
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


def most_tokens(device: torch.device, *, gradient: bool = False) -> int:
    """Most tokens of a pass on a device, where memory allows it; gradient: whether a backward pass follows."""
    most = MOST_ON_CPU if device.type == "cpu" else MOST_BATCH_TOKENS
    return int(most * GRADIENT_SHARE) if gradient else most


def usual_batch_tokens(device: str) -> int:
    """Most tokens of a forward pass on a device by its name, which this machine need not have, whatever its memory."""
    return most_tokens(device_named(device))


def take(order: list[int], lengths: NDArray[np.int64], batch_tokens: int) -> list[int]:
    """The first of `order` that fit into a batch when each is padded to the longest; at least one."""
    for n, index in enumerate(order):
        if n and (n + 1) * lengths[index] > batch_tokens:
            return order[:n]
    return order


def is_out_of_memory(error: Exception) -> bool:
    """True if memory ran out; torch has no error class for that on the CPU."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error)
    )


@contextmanager
def running(name: str) -> Iterator[None]:
    """Turns an error of a model's own code into an InputError; one of memory is raised as it is.

    name: the model's name in errors
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a model can raise anything
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{name} fails when it is run ({type(error).__name__}: {one_line(error)}): try --dtype float32, another "
            "--device, or the versions of torch and transformers that the model was made with"
        ) from error


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the machine does not report them."""
    if device.type != "cpu":
        return free_bytes(device)
    amounts = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        amounts += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        limit = (CONTAINER / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((CONTAINER / "memory.current").read_text(encoding="ascii"))
            lines = (CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines()
            # Cached pages of files, such as checkpoints just read, are freed when memory is needed.
            files = [int(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file")]
            amounts.append(int(limit) - used + sum(files))
    except (OSError, ValueError, IndexError):
        pass
    return min(amounts, default=None)
