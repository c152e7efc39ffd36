"""Small-area estimation: the means of many domains, from a few prompts of each.

After a trial a few prompts of every domain are read again, while the base model has read them all. Of a prompt's change
y, and of x, what the base model gave for it, two steps make the domains' means, as in surveys of many small areas:

    direct_d  mean y + s (mean x of all prompts - mean x of those read again),  s the slope of y on x within domains

is the regression estimator (Cochran, Sampling Techniques, ch. 7), with variance ψ_d; s is zero where too few prompts
tell it. Of MIN_DOMAINS domains or more,

    direct_d = β_0 + β_1 X_d + u_d + e_d,    u_d ~ N(0, A),  e_d ~ N(0, ψ_d),  X_d the mean x of all prompts

(Fay and Herriot 1979) draws each mean towards the line, the more the less its own prompts say. β and A have flat priors
and are integrated out (Rao and Molina, Small Area Estimation, ch. 10), so that the error has their uncertainty too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.statistics import CONFIDENCE

if TYPE_CHECKING:
    from sts_fast.statistics import Doubles, Interval

# The density of A under flat priors can be integrated from 5 domains on.
MIN_DOMAINS = 5
# A domain's own variance counts as its prompts less one; that of all domains as so many beside it.
PRIOR_PROMPTS = 3
# Degrees of freedom within domains that a slope is learned from.
LEAST_FOR_SLOPE = 10
N_NODES = 200
# A mean square below it is rounding.
SMALLEST_SCALE = 1e-200


@dataclass(frozen=True)
class Domain:
    """y [n_read] of the prompts read again; x [n_read] of the same prompts, and x_all [n_prompts] of all."""

    y: Doubles
    x: Doubles
    x_all: Doubles


@dataclass(frozen=True)
class DomainMeans:
    """By domain, [n_domains] each.

    values, stderr: the mean and its standard error; freedom: degrees of freedom of that error
    own_share: of the direct estimate in the mean
    """

    values: Doubles
    stderr: Doubles
    freedom: Doubles
    own_share: Doubles

    def interval(self, i: int) -> Interval:
        """95% interval of a domain's mean, by Student's distribution."""
        from scipy import special

        half = float(special.stdtrit(self.freedom[i], (1 + CONFIDENCE) / 2) * self.stderr[i])
        return float(self.values[i]) - half, float(self.values[i]) + half


def domain_means(domains: Sequence[Domain]) -> DomainMeans:
    """The mean y of every domain; each has two prompts read again, or more."""
    direct, variance, freedom = direct_means(domains)
    scale = float(np.var(direct)) + float(variance.mean())
    if len(domains) < MIN_DOMAINS or scale < SMALLEST_SCALE:
        return DomainMeans(direct, np.sqrt(variance), freedom, np.ones(len(domains)))
    unit = scale**0.5
    X = np.asarray([domain.x_all.mean() for domain in domains])
    values, stderr, own_share = _drawn_to_the_line(direct / unit, variance / scale, X)
    return DomainMeans(values * unit, stderr * unit, freedom, own_share)


def direct_means(domains: Sequence[Domain]) -> tuple[Doubles, Doubles, Doubles]:
    """The regression estimator of each domain, its variance ψ, and the degrees of freedom of that."""
    x_apart = [domain.x - domain.x.mean() for domain in domains]
    y_apart = [domain.y - domain.y.mean() for domain in domains]
    n_read = np.asarray([len(domain.y) for domain in domains])
    size, within = sum(_dot(x, x) for x in x_apart), int((n_read - 1).sum())
    has_slope = size > 0 and within >= LEAST_FOR_SLOPE
    slope = sum(_dot(x, y) for x, y in zip(x_apart, y_apart, strict=True)) / size if has_slope else 0.0
    squares = np.asarray([float(((y - slope * x) ** 2).sum()) for x, y in zip(x_apart, y_apart, strict=True)])
    squares *= within / (within - has_slope)  # the slope has taken one
    common = float((squares / (n_read - 1)).mean())
    residual = (squares + PRIOR_PROMPTS * common) / (n_read - 1 + PRIOR_PROMPTS)
    moved = np.asarray([domain.x_all.mean() - domain.x.mean() for domain in domains])
    # The prompts that the base model has read are a sample too, and the slope has an error.
    of_sample = np.asarray([domain.x_all.var() / len(domain.x_all) for domain in domains])
    variance = residual / n_read + slope**2 * of_sample + (moved**2 / size * common if has_slope else 0.0)
    freedom = np.minimum(n_read - 1 + PRIOR_PROMPTS, within - has_slope).astype(np.float64)
    return np.asarray([domain.y.mean() for domain in domains]) + slope * moved, variance, freedom


def _drawn_to_the_line(direct: Doubles, variance: Doubles, X: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Value, standard error and own share of each mean under the model, in units in which A is about 1.

    Integrated over A = t / (1 - t), t from 0 to 1.
    """
    t, weight = np.polynomial.legendre.leggauss(N_NODES)
    t, weight = (t + 1) / 2, weight / 2
    A = (t / (1 - t))[:, None]
    precision = 1 / (A + variance)  # [n_nodes, n_domains]
    apart = (X - X.mean()) / (X.std() or 1.0)  # a line through the means; a constant where all X are the same
    columns = [np.ones(len(X)), apart] if apart.any() else [np.ones(len(X))]
    Z = np.stack(columns, axis=1)
    normal = np.einsum("kd,dp,dq->kpq", precision, Z, Z)
    inverse = np.linalg.inv(normal)
    beta = np.einsum("kpq,kd,dq,d->kp", inverse, precision, Z, direct)
    line = np.einsum("kp,dp->kd", beta, Z)
    log_density = (
        0.5 * np.log(precision).sum(axis=1)
        - 0.5 * np.linalg.slogdet(normal)[1]
        - 0.5 * (precision * (direct - line) ** 2).sum(axis=1)
        - 2 * np.log1p(-t)  # dA = dt / (1 - t)^2
    )
    density = weight * np.exp(log_density - log_density.max())
    density /= density.sum()
    own = A * precision
    drawn = own * direct + (1 - own) * line
    spread = own * variance + (1 - own) ** 2 * np.einsum("dp,kpq,dq->kd", Z, inverse, Z)
    values = np.einsum("k,kd->d", density, drawn)
    squares = np.einsum("k,kd->d", density, spread + (drawn - values) ** 2)
    return values, np.sqrt(squares), np.einsum("k,kd->d", density, own)


def _dot(one: Doubles, other: Doubles) -> float:
    # einsum adds in one order; a BLAS product would depend on the number of threads.
    return float(np.einsum("i,i->", one, other))
