"""Losses that training lowers: of given answers in fine-tuning, of a policy's own completions in RL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles, Indices

# Added to a group's standard deviation, so that rewards that differ by rounding alone do not count as different.
EPSILON = 1e-4


def group_advantages(rewards: Doubles, group_of: Indices) -> Doubles:
    """[n] float64 A_i = (r_i - mean_g) / (std_g + 1e-4) of each completion within its prompt's group g.

    rewards: [n]; group_of: [n] number of each completion's group, from 0

    GRPO, eq. 3 of arXiv 2402.03300, with the unbiased standard deviation that TRL and verl use. Where all rewards of a
    group are the same, or it has only one, every advantage is exactly zero.
    """
    n = np.bincount(group_of)
    mean = np.bincount(group_of, rewards) / np.maximum(n, 1)
    apart = rewards - mean[group_of]
    spread = np.sqrt(np.bincount(group_of, apart**2) / np.maximum(n - 1, 1))
    advantages: Doubles = np.where(
        group_spread(rewards, group_of)[group_of] > 0, apart / (spread + EPSILON)[group_of], 0.0
    )
    return advantages


def group_spread(values: Doubles, group_of: Indices) -> Doubles:
    """[n_groups] largest less smallest of each group's values [n]; group_of as in group_advantages."""
    n_groups = int(group_of.max(initial=-1)) + 1
    lowest, highest = np.full(n_groups, np.inf), np.full(n_groups, -np.inf)
    np.minimum.at(lowest, group_of, values)
    np.maximum.at(highest, group_of, values)
    spread: Doubles = highest - lowest
    return spread


@dataclass(frozen=True)
class AnswerLoss:
    """L = mean over prompts of nll_i, the mean negative log-likelihood of an answer's tokens."""

    def loss(self, nll: Doubles, base_nll: Doubles) -> float:
        return float(nll.mean())

    def slopes(self, nll: Doubles, base_nll: Doubles) -> Doubles:
        """[n_prompts] dL/dnll_i"""
        return np.full(len(nll), 1 / len(nll))

    def first(self, most: int) -> tuple[int | None, AnswerLoss]:
        """The number of prompts to use where `most` are enough, and their loss."""
        return most, self


@dataclass(frozen=True)
class PolicyLoss:
    """Shortfall of a policy's expected advantage against its best completion of each prompt.

    Training is taken to move probability only among the completions.

    advantages: [n] A_i of each completion
    group_of:   [n] number of the prompt it answers: 0, 0, .., 1, 1, .., completions of one prompt side by side

        L = mean_g (max_i A_i - sum_i w_i A_i),    w_i = rho_i / sum_i rho_i,    rho_i = exp(nll_i(base) - nll_i),

    sums over the completions i of a prompt g. rho is the likelihood ratio of a completion, per token (as in GSPO,
    arXiv 2507.18071), and sum_i w_i A_i estimates the advantage that the changed policy expects from the base policy's
    own samples. At the base model all w_i are the same, and the gradient of -L is that of GRPO's first step (eq. 3 of
    arXiv 2402.03300 without its KL term): mean_g mean_i A_i grad mean_t log p(token t of completion i).
    """

    advantages: Doubles
    group_of: Indices

    def loss(self, nll: Doubles, base_nll: Doubles) -> float:
        best = np.full(self._n_groups, -np.inf)
        np.maximum.at(best, self.group_of, self.advantages)
        return float((best - self._expected(self._weights(nll, base_nll))).mean())

    def slopes(self, nll: Doubles, base_nll: Doubles) -> Doubles:
        """[n] dL/dnll_i = w_i (A_i - sum_i w_i A_i) / n_groups"""
        weights = self._weights(nll, base_nll)
        above: Doubles = self.advantages - self._expected(weights)[self.group_of]
        return weights * above / self._n_groups

    def first(self, most: int) -> tuple[int | None, PolicyLoss]:
        """The number of completions to use where `most` are enough, whole groups and at least one, and their loss."""
        ends = np.flatnonzero(np.diff(self.group_of, append=-1)) + 1
        n = int(max(ends[ends <= most], default=ends[0]))
        return n, PolicyLoss(self.advantages[:n], self.group_of[:n])

    @property
    def _n_groups(self) -> int:
        return int(self.group_of[-1]) + 1

    def _weights(self, nll: Doubles, base_nll: Doubles) -> Doubles:
        rise = base_nll - nll
        highest = np.full(self._n_groups, -np.inf)
        np.maximum.at(highest, self.group_of, rise)
        ratio = np.exp(rise - highest[self.group_of])
        weights: Doubles = ratio / np.bincount(self.group_of, ratio)[self.group_of]
        return weights

    def _expected(self, weights: Doubles) -> Doubles:
        """[n_groups] sum_i w_i A_i"""
        expected: Doubles = np.bincount(self.group_of, weights * self.advantages).astype(np.float64)
        return expected
