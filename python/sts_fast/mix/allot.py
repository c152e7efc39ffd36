"""Shares of a budget of examples over domains, none of which may give more examples than it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sts_fast.mix.flow import Flow

if TYPE_CHECKING:
    from sts_fast.statistics import Counts, Doubles

# Share that no forecast decides: gradients before training do not foresee all that a long training forgets.
EVENLY = 0.5
MOST_STEPS = 400
# Stops when a step gains less than this share of the loss that is minimised.
TOLERANCE = 1e-7
SHORTEST_STEP = 1e-6


def fill(wanted: Doubles, most: Doubles) -> Doubles:
    """[n] shares in proportion to `wanted` (none negative), each at most `most`, that sum to 1.

    The shortfall of a domain goes to the others, in proportion too, or evenly where nothing is wanted of those.
    The sum of `most` must be 1 or more.
    """
    shares, full = np.zeros(len(wanted)), most <= 0
    for _ in range(len(wanted) + 1):
        open_wanted = np.where(full, 0, wanted)
        if open_wanted.sum() <= 0:
            open_wanted = np.where(full, 0, most)
        left = 1 - most[full].clip(0).sum()
        shares = np.where(full, most.clip(0), left * open_wanted / max(open_wanted.sum(), np.finfo(float).tiny))
        over = ~full & (shares > most)
        if not over.any():
            break
        full |= over
    return shares


def whole_examples(shares: Doubles, budget: int, available: Counts) -> Counts:
    """[n] whole numbers of examples with the sum `budget`, by largest remainder; ties go to the earlier one."""
    exact = shares * budget
    counts = np.minimum(np.floor(exact + 1e-9).astype(np.int64), available)
    while (missing := budget - int(counts.sum())) > 0:
        remainder = np.where(counts < available, exact - counts, -np.inf)
        counts[np.argsort(-remainder, kind="stable")[: min(missing, int((counts < available).sum()))]] += 1
    return counts


def least_loss(flow: Flow, train: int, train_share: float, weights: Doubles, most: Doubles) -> Doubles:
    """[n] shares of the budget with the least weighted sum of losses after training; that of `train` is 0.

    train_share: share of the training set in the mixture; the budget is the rest
    weights:     [n] weight of each set's loss; most: [n] largest share of each, 0 for `train`

    The part EVENLY of the budget goes to all sets that count, regardless of the forecast. The rest is optimised by
    exponentiated gradient from even shares, each step halved until the loss does not rise: the same input gives the
    same shares. The losses are not convex in the shares, so this is a local minimum.
    """
    in_train = np.where(np.arange(len(most)) == train, train_share, 0.0)
    floor = EVENLY * fill(((weights > 0) & (most > 0)).astype(np.float64), most)
    most_free = (most - floor) / (1 - EVENLY)

    def shares(free: Doubles) -> Doubles:
        return floor + (1 - EVENLY) * free

    def value_and_gradient(free: Doubles) -> tuple[float, Doubles]:
        return flow.value_and_gradient(in_train + (1 - train_share) * shares(free), weights)

    free = fill((most_free > 0).astype(np.float64), most_free)
    value, gradient = value_and_gradient(free)
    length = 1.0
    for _ in range(MOST_STEPS):
        centred = gradient - float(np.einsum("a,a->", free, gradient))
        scale = np.abs(centred[most_free > 0]).max(initial=0)
        if scale == 0:
            break
        trial = fill(free * np.exp(-length * centred / scale), most_free)
        trial_value, trial_gradient = value_and_gradient(trial)
        if trial_value > value:
            length /= 2
            if length < SHORTEST_STEP:
                break
            continue
        gain = value - trial_value
        free, value, gradient, length = trial, trial_value, trial_gradient, length * 1.5
        if gain < TOLERANCE * abs(value):
            break
    return shares(free)
