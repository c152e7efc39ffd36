"""Rows of a profile: for each prompt the features that fire in it, and their sums over its tokens."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sts_fast.errors import InputError
from sts_fast.model.reader import PairedRows
from sts_fast.ops.encode import encode
from sts_fast.ops.sum_by_prompt import sum_by_prompt
from sts_fast.sae import SAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from sts_fast.statistics import Bools, Counts, Doubles, Floats, Indices, IntArray

Quantity = Literal["n_fired", "sum_h", "sum_sq_h", "sum_shift", "sum_sq_shift"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
# An array of more bytes lies in a file. Prompts, and entries, that are worked on at a time.
MOST_BYTES, BLOCK_PROMPTS, BLOCK_ENTRIES = 2**27, 4096, 2**22


@dataclass(frozen=True)
class SparseSums:
    """Some quantities of n prompts by feature, in compressed sparse row form; see PromptRows.

    values: by quantity, [n_entries]
    """

    d_sae: int
    indptr: Indices
    indices: IntArray
    values: Mapping[Quantity, Doubles]

    def totals(self, quantity: Quantity) -> Doubles:
        """[d_sae] float64 sum over all prompts, in their order."""
        totals, values = np.zeros(self.d_sae), self.values[quantity]
        for start in range(0, len(values), BLOCK_ENTRIES):
            block = slice(start, start + BLOCK_ENTRIES)
            totals += np.bincount(self.indices[block], values[block], minlength=self.d_sae)
        return totals

    def matrix(self, quantity: Quantity) -> csr_array:
        """[n, d_sae] one quantity as a matrix of scipy, which shares the memory of these rows."""
        from scipy.sparse import csr_array

        values: Any = self.values[quantity]
        return csr_array((values, self.indices, self.indptr), shape=(len(self.indptr) - 1, self.d_sae))

    def of_features(self, wanted: Bools) -> SparseSums:
        """The entries of some features, wanted: [d_sae]."""
        entries = np.flatnonzero(wanted[self.indices])
        values = {quantity: of[entries] for quantity, of in self.values.items()}
        return SparseSums(self.d_sae, np.searchsorted(entries, self.indptr), self.indices[entries], values)


@dataclass(frozen=True)
class PromptRows:
    """Sums over the tokens of each of n prompts, in compressed sparse row form.

    d_sae:        features of the SAE
    indptr:       [n + 1] int64, prompt p has the entries indptr[p] to indptr[p + 1]
    indices:      [n_entries] int32, feature, ascending within a prompt: every one that fires on one of its tokens,
                  without demonstrations or with them
    n_fired:      [n_entries] int32, tokens read without demonstrations on which it fires
    sum_h, sum_sq_h: [n_entries] float64, over these, of its activation h and of h^2
    sum_shift, sum_sq_shift: [n_entries] float64, over pairs of tokens, of h(demos, x) - h(x) and its square
                  (sums of squares are rounded to 40 bits, a relative error below 5e-13)
    strongest:    [n_entries] float32, its largest h without demonstrations; 0 where it fires with them alone
    strongest_at: [n_entries] int32, the first of the tokens read with it, counted from 0; -1 where there is none

    Prompts know nothing of each other: rows of disjoint prompts, one behind the other, are the rows of all.
    """

    d_sae: int
    indptr: Indices
    indices: IntArray
    n_fired: IntArray
    sum_h: Doubles
    sum_sq_h: Doubles
    sum_shift: Doubles
    sum_sq_shift: Doubles
    strongest: Floats
    strongest_at: IntArray

    @classmethod
    def of(cls, sae: SAE, rows: PairedRows) -> PromptRows:
        """Of a batch of tokens at the SAE's hook, in the order of `rows.prompts`."""
        sums = sum_by_prompt(
            encode(sae, rows.base),
            _starts([int(kept.sum()) for kept in rows.kept]),
            encode(sae, rows.demos),
            _starts([int(kept.sum()) for kept in rows.kept_paired]),
            rows.pair_at,
        )
        exact = cls(sae.d_sae, *sums)
        return replace(exact, sum_sq_h=rounded(exact.sum_sq_h), sum_sq_shift=rounded(exact.sum_sq_shift))

    @classmethod
    def joined(cls, parts: Sequence[PromptRows]) -> PromptRows:
        """One behind the other; there must be at least one."""
        starts = np.cumsum([0, *(len(part.indices) for part in parts)])
        indptr = [part.indptr[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
        entries = []
        for name in ENTRIES:
            arrays = [getattr(part, name) for part in parts]
            entries.append(np.concatenate(arrays, out=_room(int(starts[-1]), arrays[0].dtype)))
        return cls(parts[0].d_sae, np.concatenate([*indptr, starts[-1:]]).astype(np.int64), *entries)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def take(self, prompts: Indices) -> PromptRows:
        """Some of the prompts, in the given order."""
        sizes = np.diff(self.indptr)[prompts]
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        taken = {name: _room(int(indptr[-1]), getattr(self, name).dtype) for name in ENTRIES}
        for start in range(0, len(prompts), BLOCK_PROMPTS):
            block = slice(start, start + BLOCK_PROMPTS)
            first, last = indptr[start], indptr[min(start + BLOCK_PROMPTS, len(prompts))]
            at = np.arange(first, last) + np.repeat(self.indptr[:-1][prompts[block]] - indptr[:-1][block], sizes[block])
            for name, values in taken.items():
                values[first:last] = getattr(self, name)[at]
        return PromptRows(self.d_sae, indptr, **taken)

    def plain(self) -> PromptRows:
        """Without what demonstrations do: the features that fire without them, and no shift."""
        fires = self.n_fired > 0
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(fires)])
        kept = {name: getattr(self, name)[fires] for name in ENTRIES}
        nothing = np.zeros(int(fires.sum()))
        return PromptRows(
            self.d_sae, starts[self.indptr], **{**kept, "sum_shift": nothing, "sum_sq_shift": nothing.copy()}
        )

    @property
    def prompt_of(self) -> Indices:
        """[n_entries] the prompt of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    @property
    def sums(self) -> SparseSums:
        """All quantities, which share the memory of these rows."""
        return SparseSums(self.d_sae, self.indptr, self.indices, {name: getattr(self, name) for name in QUANTITIES})

    def totals(self, quantity: Quantity) -> Doubles:
        """See SparseSums."""
        return self.sums.totals(quantity)

    def matrix(self, quantity: Quantity) -> csr_array:
        """See SparseSums."""
        return self.sums.matrix(quantity)


def rounded(sums: Doubles) -> Doubles:
    """Sums that are not below zero, to 40 bits behind the first one; the other 12 would be noise that files keep."""
    bits = sums.view(np.int64)
    rounded: Doubles = ((bits + 2**11) & -(2**12)).view(np.float64)
    return rounded


def _room(n: int, dtype: Any) -> Any:
    """[n] for values of one kind; many lie in a file without a name, which the system keeps in memory as it can.

    Raises InputError where the disk has no room for them.
    """
    n_bytes = n * np.dtype(dtype).itemsize
    if n_bytes <= MOST_BYTES:
        return np.empty(n, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # a full disk would otherwise end the process when the file is written
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            return np.memmap(file, dtype, "r+" if file.seek(0, 2) else "w+", shape=(n,))
    except OSError as error:
        raise InputError(
            f"no room for {n_bytes / 1e9:.1f} GB of a profile's rows in {tempfile.gettempdir()} "
            f"({error.strerror or error}): set TMPDIR to a larger disk, or lower --limit"
        ) from error


# By name, the type of the arrays with a number for each entry.
ENTRIES = {
    **dict.fromkeys(("indices", "n_fired"), np.int32),
    **dict.fromkeys(("sum_h", "sum_sq_h", "sum_shift", "sum_sq_shift"), np.float64),
    "strongest": np.float32,
    "strongest_at": np.int32,
}


def _starts(sizes: Sequence[int]) -> Counts:
    return np.cumsum([0, *sizes], dtype=np.int64)
