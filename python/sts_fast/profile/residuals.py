"""Sums over the residual stream itself, for controls that need no SAE; they add up exactly, in whatever order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.profile.projection import projection

if TYPE_CHECKING:
    from sts_fast.model.reader import PairedRows
    from sts_fast.statistics import Counts, Doubles

# float64s of an exact sum: 159 bits hold any sum of numbers that lie less than 2^100 apart.
PARTS = 3


class ExactSum:
    """An array of sums of float64 that do not depend on the order of their terms.

    parts: [PARTS, ...] float64 whose sum is the sum, the largest first
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.parts: Doubles = np.zeros((PARTS, *shape))

    def add(self, terms: Doubles) -> None:
        """terms: [...], one for each sum. What one part rounds off (Knuth's two-sum) is added to the next."""
        for part in self.parts:
            total = part + terms
            added = total - part
            terms = (part - (total - added)) + (terms - added)
            part[...] = total

    def merge(self, other: ExactSum) -> None:
        for part in other.parts:
            self.add(part)

    def settled(self) -> Doubles:
        """[PARTS, ...] the same sum in parts that do not depend on the order of its terms: each rounds what is left."""
        settled = ExactSum(self.parts.shape[1:])
        for _ in range(2):
            for part in self.parts[::-1]:
                settled.add(part)
            self.parts[...] = settled.parts
            settled.parts[...] = 0
        return self.parts

    @property
    def value(self) -> Doubles:
        """[...] the sum, rounded once."""
        value: Doubles = self.settled()[0]
        return value


@dataclass(frozen=True)
class ResidualSums:
    """Sums over a set's tokens at the hook; d is the width of the residual stream, y_t = Q^T x_t its projection.

    base, abs_base, sq_base: [d] of x, |x| and x^2, over the tokens read without demonstrations
    sq_shift: [d] of the squared difference, over pairs
    y, yy:    [r] of y and [r, r] of y y^T, over the tokens read without demonstrations
    counts:   [2] int64 number of these tokens, and of the pairs
    """

    base: ExactSum
    abs_base: ExactSum
    sq_base: ExactSum
    sq_shift: ExactSum
    y: ExactSum
    yy: ExactSum
    counts: Counts
    Q: Doubles

    @classmethod
    def zero(cls, d_in: int) -> ResidualSums:
        Q = projection(d_in)
        r = Q.shape[1]
        base, abs_base, sq_base, sq_shift = (ExactSum((d_in,)) for _ in range(4))
        y, yy = ExactSum((r,)), ExactSum((r, r))
        return cls(base, abs_base, sq_base, sq_shift, y, yy, np.zeros(2, np.int64), Q)

    def update(self, rows: PairedRows) -> None:
        """Adds a batch, prompt by prompt, so that the sums do not depend on how prompts are batched."""
        for base, paired, demos in _by_prompt(rows):
            self.base.add(base.sum(axis=0))
            self.abs_base.add(np.abs(base).sum(axis=0))
            self.sq_base.add((base * base).sum(axis=0))
            self.sq_shift.add(((demos - paired) ** 2).sum(axis=0))
            y = base @ self.Q
            self.y.add(y.sum(axis=0))
            self.yy.add(np.einsum("ti,tj->ij", y, y))
            self.counts[...] += (len(base), len(paired))

    def plain(self) -> ResidualSums:
        """Without pairs."""
        sq_shift = ExactSum(self.sq_shift.parts.shape[1:])
        return replace(self, sq_shift=sq_shift, counts=np.asarray([self.n_tokens, 0], np.int64))

    def merge(self, other: ResidualSums) -> None:
        for name in SUMS:
            getattr(self, name).merge(getattr(other, name))
        self.counts[...] += other.counts

    @property
    def n_tokens(self) -> int:
        return int(self.counts[0])

    @property
    def n_pairs(self) -> int:
        return int(self.counts[1])

    @property
    def mean(self) -> Doubles:
        """[d] mean residual of the tokens read; zeros where there were none, as in the means below."""
        return self.base.value / max(self.n_tokens, 1)

    @property
    def projected_mean(self) -> Doubles:
        """[r] E y"""
        return self.y.value / max(self.n_tokens, 1)

    @property
    def covariance(self) -> Doubles:
        """[r, r] E (y - E y)(y - E y)^T"""
        return self.yy.value / max(self.n_tokens, 1) - np.outer(self.projected_mean, self.projected_mean)


SUMS = ("base", "abs_base", "sq_base", "sq_shift", "y", "yy")


def _by_prompt(rows: PairedRows) -> Iterator[tuple[Doubles, Doubles, Doubles]]:
    """Of each prompt its rows of `base`, of `paired` and of `demos`, as float64."""
    base, demos = rows.base.double().cpu().numpy(), rows.demos.double().cpu().numpy()
    n_base = np.cumsum([0, *(int(kept.sum()) for kept in rows.kept)])
    n_pairs = np.cumsum([0, *(int(kept.sum()) for kept in rows.kept_paired)])
    for i in range(len(rows.prompts)):
        pairs = slice(n_pairs[i], n_pairs[i + 1])
        yield base[n_base[i] : n_base[i + 1]], base[rows.pair_at[pairs]], demos[pairs]
