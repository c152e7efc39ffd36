"""Allotments against cases by hand, and the best one against a general solver."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from sts_fast.mix.allot import EVENLY, fill, least_loss, whole_examples
from sts_fast.mix.flow import Flow


def shares(*values: float) -> NDArray[np.float64]:
    return np.asarray(values, np.float64)


@pytest.mark.parametrize(
    ("wanted", "most", "expected"),
    [
        (shares(1, 1, 2), shares(1, 1, 1), shares(0.25, 0.25, 0.5)),
        (shares(1, 1, 2), shares(1, 1, 0.2), shares(0.4, 0.4, 0.2)),
        (shares(6, 3, 1), shares(0.2, 0.5, 1), shares(0.2, 0.5, 0.3)),
        (shares(1, 0, 0), shares(0.4, 1, 1), shares(0.4, 0.3, 0.3)),
        (shares(0, 0), shares(3, 1), shares(0.75, 0.25)),
        (shares(5, 1, 1), shares(0, 0.5, 0.5), shares(0, 0.5, 0.5)),
    ],
)
def test_what_a_domain_lacks_goes_to_the_others(
    wanted: NDArray[np.float64], most: NDArray[np.float64], expected: NDArray[np.float64]
) -> None:
    assert fill(wanted, most) == pytest.approx(expected)


def test_whole_examples_add_up_and_none_gives_more_than_it_has() -> None:
    found = whole_examples(shares(0.46, 0.34, 0.2), 10, np.asarray([10, 3, 10]))
    assert found.tolist() == [5, 3, 2]
    assert whole_examples(shares(1 / 3, 1 / 3, 1 / 3), 10, np.asarray([9, 9, 9])).tolist() == [4, 3, 3]
    rng = np.random.default_rng(0)
    for _ in range(100):
        available = rng.integers(0, 30, 12)
        budget = int(rng.integers(1, available.sum() + 1))
        given = whole_examples(fill(rng.exponential(size=12), available / budget), budget, available)
        assert given.sum() == budget
        assert (given >= 0).all()
        assert (given <= available).all()


@pytest.mark.parametrize("seed", range(4))
def test_best_shares_are_those_of_a_general_solver(seed: int) -> None:
    n, train_share = 6, 0.6
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(n, 5))
    flow = Flow.of(M @ M.T, rng.uniform(0.1, 1, n), 0, 0.1)
    weights = np.concatenate([[1.0], rng.uniform(0.1, 0.3, n - 1)])
    most = np.asarray([0, 0.5, 0.5, 0.15, 1, 1])
    own = train_share * np.eye(n)[0]

    def value(x: NDArray[np.float64]) -> float:
        return float(weights @ flow.losses(own + (1 - train_share) * x))

    found = least_loss(flow, 0, train_share, weights, most)
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    assert (found <= most + 1e-12).all()
    start = fill((most > 0).astype(np.float64), most)
    bounds = list(zip(EVENLY * start, most, strict=True))
    solver = minimize(
        value, start, method="SLSQP", bounds=bounds,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1}, options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    assert value(found) <= solver.fun + 1e-4 * abs(solver.fun)
    assert np.array_equal(found, least_loss(flow, 0, train_share, weights, most))
