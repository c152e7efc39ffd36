"""Controls that a forecast has to beat: the same scores from other features, and numbers that need no SAE."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sts_fast.forecast import text
from sts_fast.model.log import AnswerLog
from sts_fast.ops.shift import top_indices
from sts_fast.profile.residuals import ResidualSums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sts_fast.statistics import Doubles, Indices

# Relative difference below which means of float32 activations count as the same.
ROUNDING = 1e-5

# Ridge of a probe, so that directions in which no set varies weigh no more than others.
PROBE_RIDGE = 1e-3

# Sets of random features that the control averages over: a single set would be as noisy as the score beside it.
N_RANDOM_SETS = 10
# A feature of similar activity is drawn from this number of features with the nearest mean activation.
N_NEAREST = 10


def random_sets(d_sae: int, top: Indices, rng: np.random.Generator, n_sets: int = N_RANDOM_SETS) -> Indices:
    """[n_sets, top_n] features drawn outside D_N (or from all of them where too few lie outside)."""
    outside = np.setdiff1d(np.arange(d_sae), top)
    pool = outside if len(outside) >= len(top) else np.arange(d_sae)
    return np.stack([np.sort(rng.choice(pool, len(top), replace=False)) for _ in range(n_sets)])


def like_activity(mean_activation: Doubles, top: Indices, rng: np.random.Generator) -> Indices:
    """[top_n] for each feature of D_N another outside it: one of the ten free ones with the nearest mean activation."""
    free = np.ones(len(mean_activation), bool)
    free[top] = False
    chosen = []
    for j in top:
        candidates = np.flatnonzero(free)
        distance = np.abs(mean_activation[candidates] - mean_activation[j])
        chosen.append(int(rng.choice(candidates[np.argsort(distance, kind="stable")[:N_NEAREST]])))
        free[chosen[-1]] = False
    return np.sort(np.asarray(chosen))


def low_shift(importance: Doubles, n_fired: NDArray[np.int64], top: Indices) -> Indices:
    """At most top_n features outside D_N that fire on the training set's queries and shift least; may be empty.

    importance: [d_sae] the measure that D_N is ranked by; n_fired: [d_sae] number of tokens on which each feature fires
    """
    candidates = np.setdiff1d(np.flatnonzero(n_fired > 0), top)
    return np.sort(candidates[np.argsort(importance[candidates], kind="stable")[: len(top)]])


def most_active(mean_activation: Doubles, top_n: int) -> Indices:
    """The top_n features with the largest mean activation on the training set's queries."""
    return np.sort(top_indices(mean_activation, top_n))


def raw_dimensions(residuals: ResidualSums, top_n: int) -> Indices:
    """The dimensions that shift most (without pairs: the largest): top_n of them, but at most a quarter of all."""
    ranked_by = (residuals.sq_shift if residuals.n_pairs else residuals.abs_base).value
    return np.sort(top_indices(ranked_by, min(top_n, max(1, len(ranked_by) // 4))))


def cka(a: Doubles, b: Doubles) -> float:
    """Similarity of two sets' covariances A and B: <A, B> / (||A|| ||B||); 0 where one of them is zero.

    Linear centred kernel alignment (Kornblith et al. 2019) with rows and columns exchanged: there one set of examples
    in two spaces, here two sets of tokens in one space.
    """
    return cosine(a, b)


def probe_logits(train_mean: Doubles, domain_means: Doubles, covariances: Doubles) -> Doubles:
    """[n_domains] logit of each domain by a linear probe that separates the training set's tokens from all domains'.

    Fisher's discriminant, with C the mean of the sets' covariances, a the mean of the domains' means, a little ridge:

        w = (C + 0.001 tr(C) / r  1)^-1 (m_S - a),    logit(T) = w . (m_T - (m_S + a) / 2)

    train_mean: [r]; domain_means: [n_domains, r]; covariances: [n_sets, r, r] of the training set and all domains
    """
    C = covariances.mean(axis=0)
    all_domains = domain_means.mean(axis=0)
    ridge = PROBE_RIDGE * np.trace(C) / len(C)
    if ridge <= 0:
        return np.zeros(len(domain_means))
    w = _solve(C + ridge * np.eye(len(C)), train_mean - all_domains)
    logits: Doubles = np.einsum("nr,r->n", domain_means - (train_mean + all_domains) / 2, w)
    return logits


def _solve(A: Doubles, b: Doubles) -> Doubles:
    """A^-1 b for a positive definite A [r, r], by elimination; LAPACK's may depend on the number of threads."""
    A, x = A.copy(), b.copy()
    for i in range(len(A)):
        factor = A[i + 1 :, i] / A[i, i]
        A[i + 1 :] -= np.outer(factor, A[i])
        x[i + 1 :] -= factor * x[i]
    for i in reversed(range(len(A))):
        x[i] = (x[i] - np.einsum("j,j->", A[i, i + 1 :], x[i + 1 :])) / A[i, i]
    return x


def z_scored(activations: Doubles) -> Doubles:
    """[n_domains] sum over D_N of the distance of a feature's mean from its mean over all domains, in deviations.

    sum_j (a_Tj - E_T a_Tj) / sd_T(a_Tj), without features that are the same in all domains

    activations: [n_domains, top_n] E_x h_j(x)
    """
    spread = activations.std(axis=0)
    varies = spread > ROUNDING * np.abs(activations).max(axis=0)
    z = np.divide(activations - activations.mean(axis=0), spread, out=np.zeros_like(activations), where=varies)
    total: Doubles = z.sum(axis=1)
    return total


def cosine(a: Doubles, b: Doubles) -> float:
    """Cosine of the angle between two vectors; 0 where one of them is zero."""
    norms = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / norms if norms else 0.0


@dataclass(frozen=True)
class Ranking:
    """Measures of a training set's features, from which controls pick.

    top:        [top_n] D_N, most shifted first
    importance: [d_sae] the measure that D_N is ranked by; mean_activation: [d_sae]
    n_fired:    [d_sae] number of the training set's tokens on which each feature fires
    residuals:  sums over the residual stream itself
    seed:       seed of all draws
    """

    top: Indices
    importance: Doubles
    mean_activation: Doubles
    n_fired: NDArray[np.int64]
    residuals: ResidualSums
    seed: int


@dataclass(frozen=True)
class Comparison:
    """A training set and the domains that controls compare it with.

    train, domains: sums over the residual stream
    activations:    [n_domains, top_n] E_x h_j(x) of D_N; None where no estimator needs them
    answers:        the base model's answers of each domain; None where they were not scored
    train_questions, domain_questions: the text of every question; None where it is not known
    """

    train: ResidualSums
    domains: Sequence[ResidualSums]
    activations: Doubles | None
    answers: Sequence[AnswerLog | None]
    train_questions: tuple[str, ...] | None
    domain_questions: Sequence[tuple[str, ...] | None]


@dataclass(frozen=True)
class Control:
    """A control that the score has to beat.

    name:     its key in scores.json; label: its name for people; meaning: the same in more words
    of:       the data that it is made from
    pick:     features (or dimensions of the residual stream) to read instead of D_N, [n] or [n_sets, n]; every
              estimator scores them like D_N, averaged over sets
    compare:  or one number for each domain, None where it is not known
    quantity: the name of that number in scores.json; unit: its label for people
    """

    name: str
    label: str
    meaning: str
    of: Literal["features", "residual", "answers", "text"]
    pick: Callable[[Ranking], Indices] | None = None
    compare: Callable[[Comparison], Sequence[float | None]] | None = None
    quantity: str = ""
    unit: str = ""


def _random(ranking: Ranking) -> Indices:
    rng = np.random.default_rng([ranking.seed, zlib.crc32(b"random features")])
    return random_sets(len(ranking.importance), ranking.top, rng)


def _low_shift(ranking: Ranking) -> Indices:
    return low_shift(ranking.importance, ranking.n_fired, ranking.top)


def _most_active(ranking: Ranking) -> Indices:
    return most_active(ranking.mean_activation, len(ranking.top))


def _raw(ranking: Ranking) -> Indices:
    return raw_dimensions(ranking.residuals, len(ranking.top))


def _z_scores(sets: Comparison) -> list[float | None]:
    # With two domains, each feature would only show which is larger.
    if sets.activations is None or len(sets.domains) < 3:
        return [None] * len(sets.domains)
    return [float(z) for z in z_scored(sets.activations)]


def _cosine_of_means(sets: Comparison) -> list[float]:
    return [cosine(sets.train.mean, domain.mean) for domain in sets.domains]


def _cka(sets: Comparison) -> list[float]:
    return [cka(sets.train.covariance, domain.covariance) for domain in sets.domains]


def _probe(sets: Comparison) -> list[float]:
    means = np.stack([domain.projected_mean for domain in sets.domains])
    covariances = np.stack([residuals.covariance for residuals in (sets.train, *sets.domains)])
    return [float(logit) for logit in probe_logits(sets.train.projected_mean, means, covariances)]


def _base_loss(sets: Comparison) -> list[float | None]:
    return [None if log is None else float(log.nll.sum() / log.n_tokens.sum()) for log in sets.answers]


def _base_accuracy(sets: Comparison) -> list[float | None]:
    return [None if log is None else float(log.exact.mean()) for log in sets.answers]


def _text_similarity(sets: Comparison) -> list[float | None]:
    return _of_both_texts(sets, text.similarity)


def _text_compression(sets: Comparison) -> list[float | None]:
    return _of_both_texts(sets, text.saved_bytes)


def _text_length(sets: Comparison) -> list[float | None]:
    return [None if domain is None else text.mean_words(domain) for domain in sets.domain_questions]


def _text_digits(sets: Comparison) -> list[float | None]:
    return [None if domain is None else text.digit_share(domain) for domain in sets.domain_questions]


def _of_both_texts(
    sets: Comparison, measure: Callable[[tuple[str, ...], tuple[str, ...]], float]
) -> list[float | None]:
    train = sets.train_questions
    return [None if train is None or domain is None else measure(train, domain) for domain in sets.domain_questions]


CONTROLS = (
    Control("random", "random features", "random features", of="features", pick=_random),
    Control("low_shift", "least shifted", "least shifted features", of="features", pick=_low_shift),
    Control("most_active", "most active", "most active features", of="features", pick=_most_active),
    Control("raw", "raw activations", "raw activations (no SAE)", of="residual", pick=_raw),
    Control(
        "z_scored", "z-scored features", "shifted features, z-scored over the domains",
        of="features", compare=_z_scores, quantity="act",
    ),
    Control(
        "cosine_of_means", "cosine of means", "cosine of the mean activations",
        of="residual", compare=_cosine_of_means, quantity="cosine", unit="cosine",
    ),
    Control(
        "cka", "CKA", "alignment of the covariances (CKA)",
        of="residual", compare=_cka, quantity="cka", unit="CKA",
    ),
    Control(
        "probe", "linear probe", "linear probe for the training set",
        of="residual", compare=_probe, quantity="logit", unit="logit",
    ),
    Control(
        "base_loss", "base loss", "loss of the model before training",
        of="answers", compare=_base_loss, quantity="nll", unit="nats per answer token",
    ),
    Control(
        "base_accuracy", "base accuracy", "accuracy of the model before training",
        of="answers", compare=_base_accuracy, quantity="accuracy", unit="share of exact answers",
    ),
    Control(
        "text_similarity", "shared n-grams", "character n-grams in common with the training set (no model)",
        of="text", compare=_text_similarity, quantity="cosine", unit="cosine",
    ),
    Control(
        "text_compression", "shared text", "text in common with the training set, by compression (no model)",
        of="text", compare=_text_compression, quantity="saved", unit="share of the bytes saved",
    ),
    Control(
        "text_length", "question length", "length of the questions (no model)",
        of="text", compare=_text_length, quantity="words", unit="words per question",
    ),
    Control(
        "text_digits", "share of digits", "words with a digit in the questions (no model)",
        of="text", compare=_text_digits, quantity="share", unit="share of the words",
    ),
)  # fmt: skip


def label_of(control: str) -> str:
    """The name for people of a control, or of 'control quantity', as validation.json joins them."""
    name = control.partition(" ")[0]
    return next((known.label for known in CONTROLS if known.name == name), control.replace("_", " "))
