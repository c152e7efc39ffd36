"""Share of a score that comes from the length of the questions, and not from their content.

Text that is the same in every prompt, such as a chat template's, adds the same amount A to each prompt's sum. A score
is a mean over tokens, so A counts more in short questions, and orders domains by 1/length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.prompts import TokenClass
from sts_fast.forecast.blocks import LengthBlock
from sts_fast.statistics import pearson

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles

# Above both of these a warning is given; r over fewer domains than this says nothing.
MOST_CONSTANT, MOST_R, LEAST_DOMAINS = 0.5, 0.9, 5


@dataclass(frozen=True)
class LengthEffect:
    """Extent to which the length of the prompts explains one estimator's scores.

    constant_share: share of all prompts' sums in what each prompt has alike, whatever its length and its domain: the
        common intercept A of S_i = A + b_d n_i, b_d one slope for each domain d; None where lengths do not differ
    r_inverse_length: Pearson's r over domains of the scores with 1 / mean length; None for fewer than three domains
    """

    constant_share: float | None
    r_inverse_length: float | None

    def to_plain(self) -> LengthBlock:
        return {"constant_share": self.constant_share, "r_inverse_length": self.r_inverse_length}

    def warning(self, label: str, n_domains: int, tokens: TokenClass) -> str | None:
        """A sentence where length explains the order of the domains; tokens: the reading that the scores are of."""
        r, constant = self.r_inverse_length, self.constant_share
        if n_domains < LEAST_DOMAINS or r is None or constant is None:
            return None
        if r < MOST_R or constant < MOST_CONSTANT:
            return None
        remedy = "compare domains of similar length" if tokens == "query" else "read --tokens query instead"
        return (
            f"{label} mostly ranks the domains by the length of their questions (r = {r:.2f} with 1/length), and "
            f"{constant:.0%} of it is the same for every prompt: {remedy}"
        )


def length_effect(sums: Sequence[Doubles], lengths: Sequence[Doubles]) -> LengthEffect:
    """The effect of length on one estimator.

    sums:    by domain, [n_prompts] what each prompt adds to the score's numerator
    lengths: by domain, [n_prompts] what each adds to its denominator: tokens, or pairs of them
    """
    return LengthEffect(_constant_share(sums, lengths), _r_inverse_length(sums, lengths))


def _constant_share(sums: Sequence[Doubles], lengths: Sequence[Doubles]) -> float | None:
    """A follows from the domains' deviations from lines through the origin (Frisch, Waugh and Lovell):

    A = sum_i r_i S_i / sum_i r_i, with r_i = 1 - n_i sum_d(n) / sum_d(n^2), the ones less their part along n
    """
    residuals = [_ones_less_length(of_domain) for of_domain in lengths]
    weight = float(sum(residual.sum() for residual in residuals))
    total = float(sum(of_domain.sum() for of_domain in sums))
    n = sum(map(len, sums))
    if weight <= 1e-9 * n or total <= 0:
        return None
    # Sums, not products of BLAS, whose order may depend on threads.
    A = sum(float((residual * of_domain).sum()) for residual, of_domain in zip(residuals, sums, strict=True)) / weight
    return n * A / total


def _ones_less_length(lengths: Doubles) -> Doubles:
    square = float((lengths * lengths).sum())
    residual: Doubles = 1.0 - lengths * (float(lengths.sum()) / square if square else 0.0)
    return residual


def _r_inverse_length(sums: Sequence[Doubles], lengths: Sequence[Doubles]) -> float | None:
    n_tokens = np.asarray([of_domain.sum() for of_domain in lengths])
    if len(sums) < 3 or not n_tokens.all():
        return None
    scores = np.asarray([of_domain.sum() for of_domain in sums]) / n_tokens
    inverse = np.asarray([len(of_domain) for of_domain in lengths]) / n_tokens
    if np.ptp(scores) == 0 or np.ptp(inverse) == 0:
        return None
    return float(pearson(scores, inverse))
