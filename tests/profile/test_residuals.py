"""Sums over the residual stream against numpy, and their exactness against Python's fsum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sts_fast.model.reader import PairedRows
from sts_fast.profile.residuals import ExactSum, ResidualSums

Doubles = NDArray[np.float64]

D_IN = 80  # wider than the projection


def rows_of(base: list[torch.Tensor], pairs: list[list[int]], demos: list[torch.Tensor]) -> PairedRows:
    """Of one prompt each; pairs: which of a prompt's rows have a partner."""
    starts = np.cumsum([0, *map(len, base)])[:-1]
    return PairedRows(
        prompts=list(range(len(base))),
        base=torch.cat(base),
        base_of=np.repeat(np.arange(len(base)), [len(rows) for rows in base]),
        demos=torch.cat(demos),
        pair_at=np.concatenate([start + np.asarray(at, np.int64) for start, at in zip(starts, pairs, strict=True)]),
        kept=[np.ones(len(rows), bool) for rows in base],
        kept_paired=[np.ones(len(at), bool) for at in pairs],
    )


def prompts(n: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, list[int], torch.Tensor]]:
    """Some of them without pairs, one without any token."""
    generator, made = torch.Generator().manual_seed(0), []
    for i in range(n):
        base = torch.randn(0 if i == 3 else 4 + i, D_IN, generator=generator).to(dtype)
        pairs = [] if i % 3 == 0 else [1, 3]
        made.append((base, pairs, torch.randn(len(pairs), D_IN, generator=generator).to(dtype)))
    return made


def sums_of(some: list[tuple[torch.Tensor, list[int], torch.Tensor]]) -> ResidualSums:
    sums = ResidualSums.zero(D_IN)
    base, pairs, demos = zip(*some, strict=True)
    sums.update(rows_of([*base], [*pairs], [*demos]))
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_equal_numpy(dtype: torch.dtype) -> None:
    made = prompts(7, dtype)
    sums = sums_of(made)
    base = np.concatenate([rows.double().numpy() for rows, _, _ in made])
    paired = np.concatenate([rows.double().numpy()[pairs] for rows, pairs, _ in made])
    demos = np.concatenate([rows.double().numpy() for _, _, rows in made])
    assert (sums.n_tokens, sums.n_pairs) == (len(base), len(demos))
    np.testing.assert_allclose(sums.mean, base.mean(axis=0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(sums.abs_base.value, np.abs(base).sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sums.sq_base.value, (base**2).sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sums.sq_shift.value, ((demos - paired) ** 2).sum(axis=0), rtol=1e-12)
    y = base @ sums.Q
    np.testing.assert_allclose(sums.projected_mean, y.mean(axis=0), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(sums.covariance, np.cov(y.T, ddof=0), rtol=1e-9, atol=1e-12)


def test_sums_do_not_depend_on_order_and_batches() -> None:
    made = prompts(9)
    whole = sums_of(made)
    for order in ([*range(9)][::-1], [4, 0, 8, 2, 6, 1, 3, 5, 7]):
        parts = [sums_of([made[i] for i in order[:2]]), sums_of([made[i] for i in order[2:]])]
        parts[1].merge(parts[0])
        for name in ("base", "abs_base", "sq_base", "sq_shift", "y", "yy"):
            assert np.array_equal(getattr(parts[1], name).settled(), getattr(whole, name).settled())
        assert parts[1].counts.tolist() == whole.counts.tolist()


def test_sums_are_rounded_once() -> None:
    """Terms of every size from 1e-30 to 1e30 that nearly cancel."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        terms = rng.standard_normal(40) * 10.0 ** rng.integers(-30, 31, 40)
        terms = rng.permutation(np.concatenate([terms, -terms * (1 + 1e-13)]))
        total = ExactSum((1,))
        for term in terms:
            total.add(np.asarray([term]))
        assert total.value[0] == pytest.approx(math.fsum(terms), rel=1e-15)


def test_sums_are_float64() -> None:
    """In float32, 1e8 + 8 and 1e8 differ by their last digit, and 64 + 2^-46 does not exist."""
    sums = ResidualSums.zero(1)
    base, demos = torch.tensor([[1e8], [1.0]]), torch.tensor([[1e8 + 8], [1.0 + 2**-23]])
    sums.update(rows_of([base], [[0, 1]], [demos]))
    assert sums.sq_shift.value.tolist() == [64 + 2.0**-46]
    assert sums.mean.tolist() == [(1e8 + 1) / 2]


def test_nothing_read_has_mean_zero() -> None:
    sums = ResidualSums.zero(3)
    assert sums.mean.tolist() == [0.0, 0.0, 0.0]
    sums.update(rows_of([torch.zeros(0, 3)], [[]], [torch.zeros(0, 3)]))
    assert sums.mean.tolist() == [0.0, 0.0, 0.0]
    assert not sums.covariance.any()
