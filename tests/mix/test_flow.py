"""Losses under a mixture against the differential equation as it is written, solved by scipy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from sts_fast.mix.flow import Flow

Doubles = NDArray[np.float64]

N = 9


@pytest.fixture(params=[0, 1])
def sets(request: pytest.FixtureRequest) -> tuple[Doubles, Doubles]:
    """K and losses of sets of which some help and some harm each other, one of them nearly solved."""
    rng = np.random.default_rng(request.param)
    M = rng.normal(size=(N, 6)) * rng.uniform(0.3, 2, (N, 1))
    loss = rng.uniform(0.05, 1.5, N)
    loss[-1] = 0.002
    M[-1] *= 0.01
    return M @ M.T, loss


def solved(K: Doubles, loss: Doubles, shares: Doubles, time: float) -> Doubles:
    def slope(_: float, L: Doubles) -> Doubles:
        wrong = -np.expm1(-L) / -np.expm1(-loss)
        return -wrong * ((shares * wrong) @ K)

    found = solve_ivp(slope, (0, time), loss, rtol=1e-9, atol=1e-12, method="LSODA")
    return np.asarray(found.y[:, -1])


def mixture(train_share: float) -> Doubles:
    shares = np.full(N, (1 - train_share) / (N - 1))
    shares[0] = train_share
    return shares


@pytest.mark.parametrize("loss_left", [0.5, 0.05])
@pytest.mark.parametrize("train_share", [1.0, 0.6])
def test_losses_solve_the_equation(sets: tuple[Doubles, Doubles], loss_left: float, train_share: float) -> None:
    K, loss = sets
    flow, shares = Flow.of(K, loss, 0, loss_left), mixture(train_share)
    expected = solved(K, loss, shares, float(flow.time))
    error = np.abs(flow.losses(shares) - expected)
    assert error.max() < 0.03 * np.abs(expected - loss).max()


def test_training_alone_lasts_until_the_share_of_the_loss_is_left(sets: tuple[Doubles, Doubles]) -> None:
    K, loss = sets
    for train in range(N):
        flow = Flow.of(K, loss, train, 0.1)
        exact = solved(K[train : train + 1, train : train + 1], loss[train : train + 1], np.ones(1), float(flow.time))
        assert exact[0] / loss[train] == pytest.approx(0.1, rel=1e-4)
        assert flow.losses(np.eye(N)[train])[train] / loss[train] == pytest.approx(0.1, rel=0.03)


def test_gradient_is_that_of_the_value(sets: tuple[Doubles, Doubles]) -> None:
    flow, shares = Flow.of(*sets, 0, 0.05), mixture(0.6)
    weights = np.linspace(0.5, 2, N)
    value, gradient = flow.value_and_gradient(shares, weights)
    assert value == pytest.approx(weights @ flow.losses(shares))
    step = 1e-6 * np.eye(N)
    numeric = [
        (weights @ flow.losses(shares + step[i]) - weights @ flow.losses(shares - step[i])) / 2e-6 for i in range(N)
    ]
    assert gradient == pytest.approx(np.asarray(numeric), rel=1e-4, abs=1e-6)


def test_resamplings_are_each_what_they_are_alone(sets: tuple[Doubles, Doubles]) -> None:
    K, loss = sets
    several = Flow.lasting(np.stack([K, 1.3 * K]), np.stack([loss, 0.9 * loss]), np.asarray([2.0, 0.7]))
    found = several.losses(mixture(0.6))
    for i, (one, other, time) in enumerate(((K, loss, 2.0), (1.3 * K, 0.9 * loss, 0.7))):
        assert found[i] == pytest.approx(Flow.lasting(one, other, np.asarray(time)).losses(mixture(0.6)), rel=1e-12)


def test_no_loss_becomes_negative_or_boundless_however_long_the_training() -> None:
    rivals = np.asarray([[1.0, -0.9], [-0.9, 1.0]])
    flow = Flow.of(rivals, np.asarray([0.3, 0.3]), 0, 1e-4)
    alone = flow.losses(np.asarray([1.0, 0.0]))
    both = flow.losses(np.asarray([0.5, 0.5]))
    assert 0 < alone[0] < 1e-4
    assert np.isfinite(alone[1])
    assert alone[1] > 1
    assert (both > 0).all()
    assert both[1] < 0.3
