"""The estimators of a forecast, in the order in which they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sts_fast.profile.rows import Quantity
from sts_fast.statistics import Interval

if TYPE_CHECKING:
    from sts_fast.statistics import Counts, Doubles, IntArray

SizeEstimator = Literal["act", "icl", "act_sq"]


@dataclass(frozen=True)
class Estimator:
    """One way of scoring a domain.

    name:     key of its scores; label: its name for people
    meaning:  how a score is made, for people
    signed:   whether a score above zero is a change for the better; without a sign it is the size of a change
    quantity: what a score forecasts; unit: 'points' or 'nats per token', '' for scores that only compare domains
    axis:     what a score without sign is, for an axis
    of:       of one without sign, whether it is a mean over tokens, or over pairs of tokens with and without
        demonstrations
    sums:     the sums over a prompt's tokens, by feature, that it adds up (see PromptRows); raw_sums: the same of the
        residual stream's dimensions (see ResidualSums)
    per_feature: whether it is a mean over the features too, and not their sum
    """

    name: str
    label: str
    meaning: str
    signed: bool = False
    quantity: str = "size of change"
    unit: str = ""
    axis: str = ""
    of: Literal["tokens", "pairs"] = "tokens"
    sums: Quantity = "sum_h"
    raw_sums: str = "abs_base"
    per_feature: bool = False

    @property
    def option(self) -> str:
        """The name that asks for it: a signed estimator gives a score of P(answer) and one of the loss."""
        return self.name.removesuffix("_loss")

    @property
    def factor(self) -> float:
        """Units in a score of 1."""
        return 100.0 if self.unit == "points" else 1.0

    def n_terms(self, n_read: Counts, n_pairs: Counts, n_features: int) -> Doubles:
        """[n_prompts] terms of each prompt's sum, of its tokens read and pairs, and of n_features features."""
        of_tokens = (n_pairs if self.of == "pairs" else n_read).astype(np.float64)
        return of_tokens * (n_features if self.per_feature else 1)

    def groups(self, draw_of: IntArray) -> IntArray:
        """[n_prompts] prompts whose sums depend on one draw of demonstrations; draw_of: the draw of each."""
        return draw_of if self.of == "pairs" else np.zeros_like(draw_of)

    @property
    def title(self) -> str:
        """The title of an axis."""
        return f"{self.quantity}, {self.unit}" if self.unit else f"{self.quantity} (no scale)"

    def text(self, value: float, ci: Interval) -> str:
        """A score in its unit: '1.2 [1.1, 1.3]', with a sign '+12.3 [+10.1, +14.5]'."""
        form = ".3g" if not self.signed else "+.1f" if self.unit == "points" else "+.3g"
        return "{} [{}, {}]".format(*(format(self.factor * number, form) for number in (value, *ci)))


def _signed(name: str, meaning: str, of_answer: str, of_loss: str) -> tuple[Estimator, Estimator]:
    return (
        Estimator(name, name, meaning, True, "change of P(answer)", of_answer),
        Estimator(f"{name}_loss", f"{name} (loss)", meaning, True, "fall of the loss", of_loss),
    )


ESTIMATORS = (
    Estimator(
        *("act", "STS_act"),
        "how active the features of D_N are on the domain's own questions: their activations summed, per token",
        axis="activations of D_N, summed per token",
    ),
    Estimator(
        *("icl", "STS_icl"),
        "how far the features of D_N move on the domain's questions when demonstrations of the domain are shown: "
        "their squared changes summed, per token",
        axis="squared changes of D_N, summed per token",
        of="pairs",
        sums="sum_sq_shift",
        raw_sums="sq_shift",
    ),
    Estimator(
        *("act_sq", "STS_act_sq"),
        "the mean square of the activations of D_N on the domain's questions, the variant of the authors' notebook",
        axis="mean squared activation of D_N",
        sums="sum_sq_h",
        raw_sums="sq_base",
        per_feature=True,
    ),
    *_signed(
        "ntk",
        "to first order: how far the gradients of the training set and of the domain point the same way",
        *("", ""),
    ),
    *_signed(
        "step",
        "one long step of that map, and the domain's questions are asked again",
        *("points", "nats per token"),
    ),
    *_signed(
        "adapter",
        "a linear map at the SAE's hook is trained on the training set, the model itself left as it is, and the "
        "domain's questions are asked again",
        *("points", "nats per token"),
    ),
    *_signed(
        "trial",
        "the model is really trained on the training set for a few steps, with low-rank maps that are taken away "
        "again, and the domain's questions are asked before and after",
        *("points", "nats per token"),
    ),
)
BY_NAME = {estimator.name: estimator for estimator in ESTIMATORS}
SIZES = tuple(estimator.name for estimator in ESTIMATORS if not estimator.signed)
SIGNED = tuple(estimator.name for estimator in ESTIMATORS if estimator.signed)
# The names that can be asked for, and those with a sign, those first that train most; trial has agreed best with real
# trainings (study/real).
ESTIMATOR_OPTIONS = tuple(dict.fromkeys(estimator.option for estimator in ESTIMATORS))
SIGNED_OPTIONS = tuple(name for name in reversed(ESTIMATOR_OPTIONS) if name in SIGNED)


def signed_fields(option: str) -> tuple[str, str]:
    """The two numbers of an estimator with a sign, the one to read first before the other."""
    of_p, of_loss = option, f"{option}_loss"
    return (of_loss, of_p) if option == "trial" else (of_p, of_loss)


# All numbers, those with a sign first.
IN_ORDER = (*(field for option in SIGNED_OPTIONS for field in signed_fields(option)), *SIZES)


def label_of(estimator: str) -> str:
    """The name for people, also of an estimator that only another version knows."""
    return BY_NAME[estimator].label if estimator in BY_NAME else estimator
