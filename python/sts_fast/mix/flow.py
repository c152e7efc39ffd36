"""The losses of several sets while a model is trained on a mixture of them, forecast from their first gradients.

With M_a the gradient of a set's loss L_a at the hook (see push), training on shares p of the sets moves the loss
of T by

    dL_T/dt = - sum_a p_a <M_a, M_T>

at first. Gradients of cross-entropy shrink as answers become right: they are proportional to the probability of
being wrong, here e = 1 - exp(-L). If each set's gradient keeps its direction, and shrinks or grows as its own e does,

    dL_T/dt = - (e_T / e_T(0)) sum_a p_a (e_a / e_a(0)) K[a, T],    K[a, T] = <M_a, M_T> before training,

which is a straight motion of the log odds z = log(exp(L) - 1) of being wrong, because dz/dL = 1/e:

    dz_T/dt = - sum_a p_a e_a C[a, T],    C[a, T] = K[a, T] / (e_a(0) e_T(0)),    e = 1 / (1 + exp(-z)).

A set that has been learnt has no gradient left, a set that is forgotten has a larger one, and no loss becomes negative.
Time is measured by training on a set S alone, for which t is known in closed form: z - exp(-z) falls by t C[S, S].

The equation is this project's; without e it is the gradient flow of a linearised model, in which each set is one point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles

N_STEPS = 128
# Smaller losses, in nats per token, are raised to this: their log odds would be unbounded.
SMALLEST_LOSS = 1e-6


@dataclass(frozen=True)
class Flow:
    """The sets before training, and how long the training is.

    K:    [..., n, n] <M_a, M_T>, for one measurement or for several resamplings of it
    loss: [..., n] loss before training, in nats per token
    time: [...] training time, in the unit in which gradients are K's
    """

    K: Doubles
    loss: Doubles
    time: Doubles

    @classmethod
    def of(cls, K: Doubles, loss: Doubles, train: int, loss_left: float) -> Flow:
        """A training as long as training on set `train` alone takes to leave the share `loss_left` of its loss."""
        own = np.maximum(loss[..., train], SMALLEST_LOSS)
        rate = K[..., train, train] / np.expm1(-own) ** 2
        return cls.lasting(K, loss, (_clock(own) - _clock(loss_left * own)) / rate)

    @classmethod
    def lasting(cls, K: Doubles, loss: Doubles, time: Doubles) -> Flow:
        """A training of length `time`, which may come from another flow."""
        return cls(K, np.maximum(loss, SMALLEST_LOSS), time)

    def losses(self, shares: Doubles) -> Doubles:
        """[..., n] loss of each set after training on `shares` [n], which sum to 1."""
        return np.logaddexp(0, self._path(shares)[-1])

    def value_and_gradient(self, shares: Doubles, weights: Doubles) -> tuple[float, Doubles]:
        """sum_T weights[T] loss[T] after training, and its derivative with respect to the shares [n].

        Only for one measurement: K is [n, n].
        """
        path, C, h = self._path(shares), self._coupling(), self._steps()
        own = np.diagonal(C)
        value = float(weights @ np.logaddexp(0, path[-1]))
        back, gradient = weights * _wrong(path[-1]), np.zeros_like(shares)
        for z, step in zip(path[-2::-1], h[::-1], strict=True):
            e = _wrong(z)
            slope = e * (1 - e)
            brake = 1 + step * shares * own * slope
            force = np.einsum("a,at->t", shares * e, C)
            of_force = np.einsum("at,t->a", C, -step * back / brake)
            of_brake = step * back * force / brake**2 * step * own * slope
            gradient += e * of_force + of_brake
            back = back + slope * shares * of_force + of_brake * shares * (1 - 2 * e)
        return value, gradient

    def _path(self, shares: Doubles) -> list[Doubles]:
        """Log odds of being wrong at each step, from before the training to its end."""
        C = self._coupling()
        own = np.diagonal(C, axis1=-2, axis2=-1)
        path = [np.log(np.expm1(self.loss))]
        for step in self._steps():
            e = _wrong(path[-1])
            force = np.einsum("...a,...at->...t", shares * e, C)
            # Implicit in a set's effect on itself: a set that is learnt fast would overshoot.
            brake = 1 + step * shares * np.maximum(own, 0) * e * (1 - e)
            path.append(path[-1] - step * force / brake)
        return path

    def _coupling(self) -> Doubles:
        wrong = -np.expm1(-self.loss)
        C: Doubles = self.K / wrong[..., :, None] / wrong[..., None, :]
        return C

    def _steps(self) -> Doubles:
        """[N_STEPS, ..., 1] lengths of the steps: short at first, when losses change most."""
        lengths = np.diff(np.linspace(0, 1, N_STEPS + 1) ** 3)
        steps: Doubles = np.multiply.outer(lengths, self.time)[..., None]
        return steps


def _wrong(z: Doubles) -> Doubles:
    """Probability of being wrong, from its log odds."""
    return np.exp(-np.logaddexp(0, -z))


def _clock(loss: Doubles) -> Doubles:
    """z - exp(-z), which runs down evenly while a set is trained on alone; exp(-z) is 1 / (exp(loss) - 1)."""
    odds = np.expm1(loss)
    time: Doubles = np.log(odds) - 1 / odds
    return time
