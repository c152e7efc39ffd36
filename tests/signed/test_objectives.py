"""What RL lowers, against its definition written out group by group in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sts_fast.signed.objectives import AnswerLoss, PolicyLoss, group_advantages

GROUP_OF = np.repeat([0, 1, 2, 3], [4, 1, 3, 4])


@pytest.fixture
def nlls() -> tuple[np.ndarray, np.ndarray]:
    base, now = np.random.default_rng(0).exponential(size=(2, len(GROUP_OF)))
    return base, now


def literal_loss(advantages: np.ndarray, nll: torch.Tensor, base: np.ndarray) -> torch.Tensor:
    """The advantage of each group's best completion, less what its completions expect, weighted by likelihood ratio."""
    lacking = []
    for group in np.unique(GROUP_OF):
        at = np.flatnonzero(group == GROUP_OF)
        ratio = torch.exp(torch.from_numpy(base[at]) - nll[at])
        A = torch.from_numpy(advantages[at])
        lacking.append(A.max() - (ratio * A).sum() / ratio.sum())
    return torch.stack(lacking).mean()


def test_advantages_are_those_of_grpo() -> None:
    rewards = np.random.default_rng(1).choice([0.0, 0.5, 1.0], len(GROUP_OF))
    rewards[GROUP_OF == 2] = 0.1 + 0.2  # all the same, and no exact fraction
    found = group_advantages(rewards, GROUP_OF)
    for group in (0, 3):
        r = torch.from_numpy(rewards[group == GROUP_OF])
        assert np.allclose(found[group == GROUP_OF], (r - r.mean()) / (r.std() + 1e-4), rtol=1e-12)
    assert not found[np.isin(GROUP_OF, (1, 2))].any()
    assert found[GROUP_OF == 0].any()
    assert len(group_advantages(np.zeros(0), np.zeros(0, np.int64))) == 0


def test_policy_loss_and_its_slopes_are_the_definition_and_its_derivative(nlls: tuple[np.ndarray, np.ndarray]) -> None:
    base, now = nlls
    advantages = group_advantages(np.random.default_rng(2).random(len(GROUP_OF)), GROUP_OF)
    policy = PolicyLoss(advantages, GROUP_OF)
    for nll in (base, now, now + 2000):  # however small the likelihoods, ratios have a sum
        asked = torch.from_numpy(nll).requires_grad_()
        expected = literal_loss(advantages, asked - (2000 if nll.min() > 1000 else 0), base)
        assert policy.loss(nll, base) == pytest.approx(expected.item(), rel=1e-9)
        [slopes] = torch.autograd.grad(expected, asked)
        assert np.allclose(policy.slopes(nll, base), slopes, rtol=1e-9, atol=1e-15)
    # At the base model: GRPO's policy gradient, mean over groups of the mean of A_i grad log p_i.
    mean_of = np.bincount(GROUP_OF)[GROUP_OF] * 4
    assert np.allclose(policy.slopes(base, base), advantages / mean_of, rtol=1e-9, atol=1e-15)


def test_the_first_completions_are_those_of_whole_groups() -> None:
    policy = PolicyLoss(np.arange(12.0), GROUP_OF)
    for most, n in ((1, 4), (4, 4), (6, 5), (7, 5), (8, 8), (100, 12)):
        taken, of_these = policy.first(most)
        assert taken == n
        assert np.array_equal(of_these.advantages, np.arange(n))
        assert np.array_equal(of_these.group_of, GROUP_OF[:n])


def test_the_loss_of_answers_is_their_mean(nlls: tuple[np.ndarray, np.ndarray]) -> None:
    base, now = nlls
    assert AnswerLoss().loss(now, base) == pytest.approx(now.mean())
    assert np.allclose(AnswerLoss().slopes(now, base), 1 / len(now))
