"""Domain means from a few prompts, against conditioning of the joint normal distribution and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

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


def test_direct_estimates_by_hand() -> None:
    # Apart from their means, x is -1 and 1 in both, y -1.5 and 1.5 in one: the slope is 3 / 4.
    domains = [
        Domain(np.array([1.0, 4.0]), np.array([0.0, 2.0]), np.array([0.0, 2.0, 4.0, 6.0])),
        Domain(np.array([5.0, 5.0]), np.array([1.0, 3.0]), np.array([1.0, 3.0])),
    ]
    slope = 3 / 4
    found = domain_means(domains)
    np.testing.assert_allclose(found.values, [2.5 + slope * (3 - 1), 5.0])
    squares = np.array([2 * (1.5 - slope) ** 2, 2 * slope**2])
    variance = (squares + 3 * squares.mean()) / (1 + 3) / 2 + slope**2 * np.array([5 / 4, 1 / 2])
    np.testing.assert_allclose(found.stderr, np.sqrt(variance))
    assert list(found.own_share) == [1, 1]


def test_means_are_those_of_the_joint_normal_distribution() -> None:
    domains = made_up(np.random.default_rng(1), 7, 4, 12)
    found = domain_means(domains)
    direct, variance = direct_means(domains)
    mean, stderr = by_conditioning(direct, variance, np.asarray([domain.x_all.mean() for domain in domains]))
    np.testing.assert_allclose(found.values, mean, rtol=1e-4)
    np.testing.assert_allclose(found.stderr, stderr, rtol=1e-3)
    assert ((found.own_share > 0) & (found.own_share < 1)).all()


@pytest.mark.parametrize("between", [0.0, 0.3, 2.0])
def test_errors_are_smaller_than_those_of_plain_means_and_intervals_hold(between: float) -> None:
    rng = np.random.default_rng(2)
    errors, plain, covered = [], [], []
    for _ in range(200):
        n_all = 400  # so many that their mean is the truth
        domains = made_up(rng, 12, 5, n_all, between=between)
        truth = np.empty(len(domains))
        for d, domain in enumerate(domains):
            y = 0.5 * domain.x_all - 1 + rng.normal(0, between) + rng.normal(0, 0.8, n_all)
            truth[d] = y.mean()
            domains[d] = Domain(y[:5], domain.x, domain.x_all)
        found = domain_means(domains)
        errors.append(found.values - truth)
        plain.append([domain.y.mean() for domain in domains] - truth)
        covered.append(abs(errors[-1]) < 1.96 * found.stderr)
    assert np.square(errors).mean() < 0.75 * np.square(plain).mean()
    assert 0.92 < np.mean(covered) < 0.98


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
