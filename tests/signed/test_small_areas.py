"""Domain means from a few prompts, against conditioning of the joint normal distribution and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from sts_fast.signed import small_areas
from sts_fast.signed.small_areas import Domain, direct_means, domain_means

Doubles = NDArray[np.float64]


def made_up(rng: np.random.Generator, n_domains: int, n_read: int, n_all: int, *, between: float = 0.3) -> list[Domain]:
    domains = []
    for _ in range(n_domains):
        x = rng.normal(rng.normal(3, 1), 1, n_all)
        y = 0.5 * x - 1 + rng.normal(0, between) + rng.normal(0, 0.8, n_all)
        domains.append(Domain(y[:n_read], x[:n_read], x))
    return domains


def by_conditioning(direct: Doubles, variance: Doubles, X: Doubles) -> tuple[Doubles, Doubles]:
    """Mean and standard error of each domain's mean, where β has a very wide prior and A a flat one, on a fine grid."""
    Z = np.stack([np.ones(len(X)), (X - X.mean()) / X.std()], axis=1)
    wide = 1e4 * Z @ Z.T
    steps = np.linspace(-14, 14, 3000)
    density, means, squares = np.empty(len(steps)), np.empty((len(steps), len(X))), np.empty((len(steps), len(X)))
    for k, A in enumerate(np.exp(steps)):
        of_means = wide + A * np.eye(len(X))
        of_direct = of_means + np.diag(variance)
        density[k] = A * np.exp(stats.multivariate_normal.logpdf(direct, np.zeros(len(X)), of_direct) + 40)
        gain = np.linalg.solve(of_direct, of_means).T
        means[k] = gain @ direct
        squares[k] = np.diag(of_means - gain @ of_means) + means[k] ** 2
    density /= density.sum()
    mean = density @ means
    return mean, np.sqrt(density @ squares - mean**2)


def test_direct_estimates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Apart from their means, x is -1 and 1 in both, y -1.5 and 1.5 in one: the slope is 3 / 4.
    domains = [
        Domain(np.array([1.0, 4.0]), np.array([0.0, 2.0]), np.array([0.0, 2.0, 4.0, 6.0])),
        Domain(np.array([5.0, 5.0]), np.array([1.0, 3.0]), np.array([1.0, 3.0])),
    ]
    monkeypatch.setattr(small_areas, "LEAST_FOR_SLOPE", 1)
    slope = 3 / 4
    found = domain_means(domains)
    np.testing.assert_allclose(found.values, [2.5 + slope * (3 - 1), 5.0])
    squares = np.array([2 * (1.5 - slope) ** 2, 2 * slope**2]) * 2 / 1
    common = squares.mean()
    variance = (squares + 3 * common) / (1 + 3) / 2 + slope**2 * np.array([5 / 4, 1 / 2])
    variance += np.array([2.0, 0.0]) ** 2 * common / 4
    np.testing.assert_allclose(found.stderr, np.sqrt(variance))
    assert list(found.freedom) == [1, 1]
    assert list(found.own_share) == [1, 1]
    half = stats.t.ppf(0.975, 1) * found.stderr[1]
    np.testing.assert_allclose(found.interval(1), [5 - half, 5 + half])
    # Of too few prompts no slope is learned.
    monkeypatch.setattr(small_areas, "LEAST_FOR_SLOPE", 3)
    np.testing.assert_allclose(domain_means(domains).values, [2.5, 5.0])
    assert list(domain_means(domains).freedom) == [2, 2]


def test_means_are_those_of_the_joint_normal_distribution() -> None:
    domains = made_up(np.random.default_rng(1), 7, 4, 12)
    found = domain_means(domains)
    direct, variance, _ = direct_means(domains)
    mean, stderr = by_conditioning(direct, variance, np.asarray([domain.x_all.mean() for domain in domains]))
    np.testing.assert_allclose(found.values, mean, rtol=1e-4)
    np.testing.assert_allclose(found.stderr, stderr, rtol=1e-3)
    assert ((found.own_share > 0) & (found.own_share < 1)).all()


@pytest.mark.parametrize(
    ("n_domains", "n_read", "between"),
    [(1, 2, 0.3), (1, 4, 0.3), (1, 16, 0.3), (2, 4, 0.3), (4, 2, 0.3), (5, 2, 0.3), (12, 5, 0.0), (12, 5, 2.0)],
)
def test_intervals_hold(n_domains: int, n_read: int, between: float) -> None:
    rng = np.random.default_rng(2)
    errors, plain, covered = [], [], []
    for _ in range(720 // n_domains):
        mean_x, u = rng.normal(3, 1, n_domains), rng.normal(0, between, n_domains)
        x_all = rng.normal(mean_x[:, None], 1, (n_domains, 40))
        y = 0.5 * x_all - 1 + u[:, None] + rng.normal(0, 0.8, x_all.shape)
        found = domain_means([Domain(y[d, :n_read], x_all[d, :n_read], x_all[d]) for d in range(n_domains)])
        truth = 0.5 * mean_x - 1 + u
        errors.append(found.values - truth)
        plain.append(y[:, :n_read].mean(axis=1) - truth)
        covered += [low <= truth[d] <= high for d in range(n_domains) for low, high in [found.interval(d)]]
    assert np.mean(covered) > 0.91
    if n_domains >= 8:
        assert np.mean(covered) < 0.995
        assert np.square(errors).mean() < 0.9 * np.square(plain).mean()


def test_the_smallest_numbers_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    domains = made_up(rng, 6, 4, 9)
    tiny = domain_means([Domain(*(1e-90 * part for part in (of.y, of.x, of.x_all))) for of in domains])
    np.testing.assert_allclose(tiny.values * 1e90, domain_means(domains).values, rtol=1e-9)
    lost = domain_means([Domain(*(1e-160 * part for part in (of.y, of.x, of.x_all))) for of in domains])
    assert np.isfinite(lost.values).all()


def test_means_that_are_all_the_same() -> None:
    same = [Domain(np.zeros(3), np.ones(3), np.ones(5)) for _ in range(6)]
    found = domain_means(same)
    assert not found.values.any()
    assert not found.stderr.any()
    # Where x tells nothing apart, they are drawn to their common mean.
    rng = np.random.default_rng(0)
    found = domain_means([Domain(rng.normal(size=4), np.ones(4), np.ones(6)) for _ in range(6)])
    assert np.isfinite(found.values).all()
    assert found.values.std() < 0.5
