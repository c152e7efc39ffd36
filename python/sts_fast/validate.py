"""Holds a forecast against what really changed, and says how much that comparison can tell."""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.outcomes import Outcome, Outcomes, cautions, listed, match_domains, read_outcomes
from sts_fast.results import SCORES_FILE, Forecast, Interval, check_has_scores
from sts_fast.signed import SIGNED_FIELDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]
    Integers = NDArray[np.int64]
    Statistic = Callable[[Doubles, Doubles], Doubles]

Number = float | tuple[float, float, float]
Scores = Forecast | str | Path | Mapping[str, Any]

MIN_DOMAINS = 4
N_DRAWS = 10_000
# Up to 8! = 40,320 orders are gone through one by one.
MAX_EXACT = 8
LEVEL = 0.05
Z_95 = 1.959963984540054
# What a good forecast is taken to be: the paper reports .60 to .90.
GOOD = 0.7
ENOUGH_POWER = 0.8
# No score and no change is as large; squares of what is overflow.
LARGEST = 1e100
# Characters of a line of text.
LINE = 79


@dataclass(frozen=True)
class Estimate:
    """One statistic of the scores s and the changes, over the matched domains.

    value:       as observed
    ci:          95% interval if the same domains were measured again: random are the outcomes, N(change, stderr^2), and
                 the scores, N(score, ((high - low) / 3.92)^2) from their own interval; the domains stay. Percentiles
                 of 10,000 draws. The observed values hold noise already and get it once more, so the interval lies
                 lower than the value. None where neither noise is known.
    ci_domains:  95% interval if other domains of the kind had been chosen: random are the domains, drawn with
                 replacement, each with the score and the change that were observed for it. The noise of both comes
                 along with the domain and is not added a second time. With 8 to 14 domains such an interval covers
                 the truth in about 90% of cases rather than 95%.
    leave_one_out: lowest and highest value with one domain left out
    p_one_sided: share of all orders of the scores with a value at least as large: what a random forecast reaches
    p_two_sided: share with a value at least as far from zero
    """

    value: float
    ci: Interval | None
    ci_domains: Interval | None
    leave_one_out: Interval
    p_one_sided: float
    p_two_sided: float


@dataclass(frozen=True)
class Association:
    """How scores and changes go together.

    pearson:   sum (s - mean s)(t - mean t) / sqrt(sum (s - mean s)^2 sum (t - mean t)^2)
    spearman:  the same of the ranks, ties ranked by their mean
    r_squared: pearson^2, the share of the variance of t that a straight line in s explains
    """

    pearson: Estimate
    spearman: Estimate
    r_squared: Estimate


@dataclass(frozen=True)
class Limits:
    """What these outcomes could show of any forecast. Observed changes d stand in for the true ones: it is a best case.

    n_distinguishable: changes with |d| > 1.96 stderr
    reliability: 1 - mean_i Var|N(d_i, stderr_i^2)| / Var(|d|): the share of the variance of |change| over domains that
                 is not noise of the evaluation (0 where noise alone would give the spread). Its root is the r with
                 the observed |change| of a forecast that knows every true one.
    ceiling, ceiling_ci: median and 95% range of pearson(|d|, |d + noise|), noise ~ N(0, stderr^2): what a forecast
                 equal to the observed |change| reaches when they are measured again
    power:       chance that a forecast whose true r with |change| is .7 stands out from random ones at 5%, one-sided
    critical_r:  the r that 5% of random forecasts exceed
    chance_above_good: chance that a random forecast (independent normal scores) exceeds r = .7: the t test's
                 P(r > .7), which depends on the number of domains only
    chance_ranking_above_good: the same for a random ranking, 1 to n in any order, against these outcomes

    What needs standard errors is None where one of them is not known; power is then that of noiseless outcomes.
    """

    n_distinguishable: int | None
    reliability: float | None
    ceiling: float | None
    ceiling_ci: Interval | None
    power: float
    critical_r: float
    chance_above_good: float
    chance_ranking_above_good: float


@dataclass(frozen=True)
class DomainResult:
    """One domain: its score beside its change. z = change / stderr; None where stderr is unknown or zero."""

    name: str
    score: float
    score_ci: Interval | None
    z: float | None
    outcome: Outcome


@dataclass(frozen=True)
class Validation:
    """A forecast beside what really happened.

    size:     scores against |change|, which is what they forecast; of signed forecasts their absolute values
    signed:   scores against the change with its sign
    sign_auc: of all pairs of a domain that rose and one that fell, the share that a signed forecast has in the right
              order; None for scores without a sign, or where all changes have one sign
    controls: size, for each control in the place of the score
    ci_carries: whose noise the intervals `ci` hold
    """

    estimator: str
    domains: list[DomainResult]
    size: Association
    signed: Association
    controls: dict[str, Association]
    limits: Limits
    ci_carries: str
    exact_permutation: bool
    seed: int
    verdict: str
    warnings: list[str]
    sign_auc: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return document

    def to_text(self) -> str:
        """The whole comparison as lines of text."""
        verdict = textwrap.wrap(self.verdict, LINE)
        return "\n".join([*_domain_lines(self), "", *_association_lines(self), "", *_limit_lines(self), "", *verdict])


def validate(
    scores: Scores,
    outcomes: Outcomes | Mapping[str, Outcome] | None = None,
    *,
    before: str | Path | None = None,
    after: str | Path | None = None,
    metric: str | None = None,
    estimator: str = "act",
    seed: int = 0,
) -> Validation:
    """Compares a forecast with the measured change of its domains.

    scores:   a Forecast, the folder or scores.json of a run, its content, or domain -> score or (score, low, high)
    outcomes: domain -> Outcome; or give `before`, `after`, `metric` for read_outcomes
    estimator: whose scores to take: 'act', 'icl', 'act_sq'
    seed:     of every draw; the same seed gives the same numbers

    Raises InputError where scores or outcomes cannot be read or fewer than four domains are in both.
    """
    if outcomes is None:
        if before is None:
            raise ValueError("give outcomes, or before and after")
        outcomes = read_outcomes(before, after, metric=metric)
    known = outcomes.domains if isinstance(outcomes, Outcomes) else dict(outcomes)
    warnings = list(outcomes.warnings) if isinstance(outcomes, Outcomes) else []
    predicted, controls = _read_scores(scores, estimator)
    names = match_domains(list(predicted), known)
    warnings += _unmatched(predicted, known, names)
    matched = {name: known[other] for name, other in names.items()}
    warnings += cautions(matched)

    score, score_sd = _score_arrays(predicted, matched)
    change, stderr = _outcome_arrays(matched)
    noise_known = bool(np.isfinite(stderr).any()), bool(score_sd.any())
    draws = _Draws.make(len(matched), seed)
    limits = outcome_limits(matched, seed=seed)
    is_signed = estimator in SIGNED_FIELDS
    size_score = np.abs(score) if is_signed else score
    size = _associate(size_score, score_sd, change, stderr, np.abs, draws)
    signed = _associate(score, score_sd, change, stderr, np.positive, draws)
    if size is None or signed is None:
        raise InputError(f"all {len(matched)} domains in both have the same score: nothing can be compared")
    control_results = {
        name: association
        for name, values in controls.items()
        if (association := _associate_control(values, list(matched), change, stderr, draws)) is not None
    }
    rows = [
        DomainResult(
            name,
            float(score[i]),
            _interval_of(predicted[name]),
            outcome.change / outcome.stderr if outcome.stderr else None,
            outcome,
        )
        for i, (name, outcome) in enumerate(matched.items())
    ]
    carried = [what for what, known_ in zip(("the outcomes", "the scores"), noise_known, strict=True) if known_]
    return Validation(
        estimator=estimator,
        domains=rows,
        size=size,
        signed=signed,
        controls=control_results,
        limits=limits,
        ci_carries=" and ".join(carried) or "nothing",
        exact_permutation=draws.exact,
        seed=seed,
        verdict=_verdict(rows, size, control_results, limits, _without_most_helpful(size_score, np.abs(change))),
        warnings=warnings,
        sign_auc=_sign_auc(score, change) if is_signed else None,
    )


def _sign_auc(score: Doubles, change: Doubles) -> float | None:
    risen, fallen = score[change > 0][:, None], score[change < 0]
    if not risen.size or not fallen.size:
        return None
    return float(np.mean(risen > fallen) + np.mean(risen == fallen) / 2)


def outcome_limits(outcomes: Outcomes | Mapping[str, Outcome], *, seed: int = 0) -> Limits:
    """What these outcomes could show of any forecast, before one is made. Raises InputError for fewer than four."""
    domains = outcomes.domains if isinstance(outcomes, Outcomes) else outcomes
    change, stderr = _outcome_arrays(domains)
    size, n = np.abs(change), len(change)
    if np.ptp(size) == 0:
        raise InputError(f"the change of all {n} domains is of the same size: nothing can be compared")
    noise_known = bool(np.isfinite(stderr).all())
    rng = np.random.default_rng([seed, 1])
    noisy = np.abs(change + rng.standard_normal((N_DRAWS, n)) * np.nan_to_num(stderr))
    reached = _pearson(size, noisy)
    critical = _critical_r(n)
    standardised = (size - size.mean()) / size.std()
    good = GOOD * standardised + math.sqrt(1 - GOOD**2) * rng.standard_normal((N_DRAWS, n))
    orders, _ = _orders(n, seed)
    rankings = _pearson(np.arange(1.0, n + 1)[orders], size)
    return Limits(
        n_distinguishable=int((size > Z_95 * stderr).sum()) if noise_known else None,
        reliability=_reliability(change, stderr) if noise_known else None,
        ceiling=float(np.nanmedian(reached)) if noise_known else None,
        ceiling_ci=_percentiles(reached) if noise_known else None,
        power=float(np.mean(_pearson(good, noisy) > critical)),
        critical_r=critical,
        chance_above_good=1 - float(np.interp(GOOD, *_random_pearson(n))),
        chance_ranking_above_good=float(np.mean(rankings > GOOD)),
    )


# ---- what goes in


def _read_scores(source: Scores, estimator: str) -> tuple[dict[str, Number], dict[str, dict[str, Any]]]:
    """Scores by domain; and control -> domain -> value."""
    if isinstance(source, Forecast):
        source = source.to_dict()
    where = "the forecast"
    if isinstance(source, (str, Path)):
        where, source = str(source), _read_run(Path(source))
    if not isinstance(source.get("domains"), list):
        return {str(name): value for name, value in source.items()}, {}
    scores: dict[str, Number] = {}
    controls: dict[str, dict[str, Any]] = {}
    signed = source["signed"]["domains"] if estimator in SIGNED_FIELDS and source.get("signed") else {}
    for domain in source["domains"]:
        if not isinstance(domain, dict) or "name" not in domain:
            raise InputError(f"{where} is not a forecast: it lists a domain without a name")
        if signed:
            if found := signed.get(domain["name"], {}).get(estimator):
                scores[domain["name"]] = (found["value"], *found["ci"])
                for control, entry in (domain.get("controls") or {}).items():
                    for label, number in _control_values(control, entry, "sts_act"):
                        controls.setdefault(label, {})[domain["name"]] = number
            continue
        value = domain.get(f"sts_{estimator}")
        if value is None:
            held = sorted({key for key in domain if key.startswith("sts_") and not key.endswith("_ci") and domain[key]})
            raise InputError(
                f"{where} holds no scores of the estimator '{estimator}': it has "
                f"{', '.join(key.removeprefix('sts_') for key in held) or 'none'}"
            )
        interval = domain.get(f"sts_{estimator}_ci")
        if interval is not None and not (isinstance(interval, list) and len(interval) == 2):
            raise InputError(f"{where} holds an interval of '{domain['name']}' that is no pair of numbers")
        scores[domain["name"]] = (value, *interval) if interval else value
        for control, entry in (domain.get("controls") or {}).items():
            for label, number in _control_values(control, entry, f"sts_{estimator}"):
                controls.setdefault(label, {})[domain["name"]] = number
    if signed and not scores:
        raise InputError(f"{where} holds no forecast by '{estimator}': score it with --estimators {estimator}")
    return scores, controls


def _control_values(control: str, entry: Any, key: str) -> list[tuple[str, Any]]:
    """A control is a number, or numbers by estimator (only the one in question counts) or by other names."""
    if not isinstance(entry, dict):
        return [(control, entry)]
    others = [(f"{control} {name}", value) for name, value in entry.items() if not name.startswith("sts_")]
    return [*([(control, entry[key])] if key in entry else []), *others]


def _read_run(path: Path) -> dict[str, Any]:
    if path.is_dir():
        check_has_scores(path)
    file = path / SCORES_FILE if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no {file}: give the folder that sts-fast score wrote") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not a readable scores.json: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("domains"), list):
        raise InputError(f"{file} is not a scores.json: it lists no domains")
    return document


def _unmatched(scores: Mapping[str, Any], outcomes: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    if len(names) < MIN_DOMAINS:
        raise InputError(
            f"only {len(names)} domains are in both, and {MIN_DOMAINS} are needed: the forecast has "
            f"{listed(scores) or 'none'}; the outcomes have {listed(outcomes) or 'none'}"
        )
    missing = [name for name in scores if name not in names]
    left = [name for name in outcomes if name not in names.values()]
    parts = [f"without an outcome: {listed(missing)}"] if missing else []
    parts += [f"without a score: {listed(left)}"] if left else []
    return ["left out, " + "; ".join(parts)] if parts else []


def _score_arrays(scores: Mapping[str, Number], names: Mapping[str, Any]) -> tuple[Doubles, Doubles]:
    """Scores [n] and the standard deviations [n] that their 95% intervals stand for, 0 where there is none."""
    values, deviations = np.zeros(len(names)), np.zeros(len(names))
    for i, name in enumerate(names):
        interval = _interval_of(scores[name])
        values[i] = _finite(f"the score of '{name}'", _value_of(scores[name]))
        if interval is not None:
            low, high = (_finite(f"the interval of '{name}'", bound) for bound in interval)
            if high < low:
                raise InputError(f"the interval of '{name}' ends before it begins")
            deviations[i] = (high - low) / (2 * Z_95)
    return values, deviations


def _value_of(number: Number) -> Any:
    return number[0] if isinstance(number, (tuple, list)) else number


def _interval_of(number: Number) -> Interval | None:
    return (number[1], number[2]) if isinstance(number, (tuple, list)) and len(number) == 3 else None


def _outcome_arrays(outcomes: Mapping[str, Outcome]) -> tuple[Doubles, Doubles]:
    """Changes [n] and their standard errors [n], NaN where unknown."""
    if len(outcomes) < MIN_DOMAINS:
        raise InputError(f"{MIN_DOMAINS} domains are needed, not {len(outcomes)}")
    for name, outcome in outcomes.items():
        _finite(f"the change of '{name}'", outcome.change)
        if outcome.stderr is not None and _finite(f"the standard error of '{name}'", outcome.stderr) < 0:
            raise InputError(f"the standard error of '{name}' is negative")
    change = np.asarray([outcome.change for outcome in outcomes.values()], np.float64)
    stderr = [math.nan if outcome.stderr is None else outcome.stderr for outcome in outcomes.values()]
    return change, np.asarray(stderr, np.float64)


def _finite(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.fabs(value) < LARGEST:
        raise InputError(f"{what} is {value}, not a number")
    return float(value)


# ---- statistics, along the last axis


@dataclass(frozen=True)
class _Draws:
    """Random numbers that every predictor is judged by, so that predictors differ by nothing else.

    outcome_noise, score_noise: [N_DRAWS, n] standard normal
    domains: [N_DRAWS, n] domains drawn with replacement
    orders:  [n_orders, n] permutations: all of them where exact, else random ones
    """

    outcome_noise: Doubles
    score_noise: Doubles
    domains: Integers
    orders: Integers
    exact: bool

    @classmethod
    def make(cls, n: int, seed: int) -> _Draws:
        rng = np.random.default_rng([seed, 0])
        outcome_noise, score_noise = rng.standard_normal((2, N_DRAWS, n))
        domains = rng.integers(0, n, (N_DRAWS, n))
        return cls(outcome_noise, score_noise, domains, *_orders(n, seed))


def _orders(n: int, seed: int) -> tuple[Integers, bool]:
    if n <= MAX_EXACT:
        return np.asarray(list(itertools.permutations(range(n)))), True
    rng = np.random.default_rng([seed, 2])
    return rng.permuted(np.tile(np.arange(n), (N_DRAWS, 1)), axis=1), False


def _associate(
    score: Doubles, score_sd: Doubles, change: Doubles, stderr: Doubles, target: Callable[[Doubles], Doubles],
    draws: _Draws,
) -> Association | None:  # fmt: skip
    """Scores against target(change); None where either is the same in all domains."""
    aim = target(change)
    if np.ptp(score) == 0 or np.ptp(aim) == 0:
        return None
    again = None
    if score_sd.any() or np.isfinite(stderr).any():
        again = score + draws.score_noise * score_sd, target(change + draws.outcome_noise * np.nan_to_num(stderr))
    estimates = []
    ranks, aim_ranks = _ranks(score), _ranks(aim)
    resampled = score[draws.domains], aim[draws.domains]
    variants: list[tuple[Statistic, Doubles, Doubles]] = [
        (_pearson, score, aim), (_spearman, ranks, aim_ranks), (_r_squared, score, aim),
    ]  # fmt: skip
    for statistic, x, y in variants:
        value = float(statistic(x, y))
        # Ranks of ranks are the same ranks, so permuting them saves ranking again.
        permuted = (_pearson if statistic is _spearman else statistic)(x[draws.orders], y)
        estimates.append(
            Estimate(
                value=value,
                ci=None if again is None else _percentiles(statistic(*again)),
                ci_domains=_percentiles(statistic(*resampled)),
                leave_one_out=_leave_one_out(statistic, x, y),
                p_one_sided=_share(permuted >= value - 1e-12, draws.exact),
                p_two_sided=_share(np.abs(permuted) >= abs(value) - 1e-12, draws.exact),
            )
        )
    return Association(*estimates)


def _associate_control(
    values: Mapping[str, Any], names: Sequence[str], change: Doubles, stderr: Doubles, draws: _Draws
) -> Association | None:
    """As _associate; None also where the control is not there for every domain."""
    numbers = [values.get(name) for name in names]
    if any(not isinstance(number, (int, float)) or not math.isfinite(number) for number in numbers):
        return None
    return _associate(np.asarray(numbers, np.float64), np.zeros(len(names)), change, stderr, np.abs, draws)


def _pearson(x: Doubles, y: Doubles) -> Doubles:
    """NaN where x or y is constant."""
    dx, dy = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        r: Doubles = (dx * dy).sum(-1) / np.sqrt((dx * dx).sum(-1) * (dy * dy).sum(-1))
    return np.where((np.ptp(x, -1) == 0) | (np.ptp(y, -1) == 0), np.nan, np.clip(r, -1, 1))


def _spearman(x: Doubles, y: Doubles) -> Doubles:
    return _pearson(_ranks(x), _ranks(y))


def _r_squared(x: Doubles, y: Doubles) -> Doubles:
    return _pearson(x, y) ** 2


def _ranks(values: Doubles) -> Doubles:
    """Ranks from 1 along the last axis; ties get their mean rank."""
    order = np.argsort(values, axis=-1)
    ordered = np.take_along_axis(values, order, -1)
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    is_next_larger = ordered[..., 1:] != ordered[..., :-1]
    first, last = place.copy(), place.copy()  # of the equal values around each place
    first[..., 1:][~is_next_larger] = 0
    last[..., :-1][~is_next_larger] = values.shape[-1]
    first = np.maximum.accumulate(first, -1)
    last = np.minimum.accumulate(last[..., ::-1], -1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, 1 + (first + last) / 2, -1)
    return ranks


def _leave_one_out(statistic: Statistic, x: Doubles, y: Doubles) -> Interval:
    left = _without_each(statistic, x, y)
    return float(np.nanmin(left)), float(np.nanmax(left))


def _without_each(statistic: Statistic, x: Doubles, y: Doubles) -> Doubles:
    """[n] the statistic without domain i; the value of all domains where it is not defined."""
    n = len(x)
    others = np.nonzero(~np.eye(n, dtype=bool))[1].reshape(n, n - 1)
    left = statistic(x[others], y[others])
    return np.where(np.isnan(left), statistic(x, y), left)


def _without_most_helpful(score: Doubles, size: Doubles) -> tuple[int, float]:
    left = _without_each(_pearson, score, size)
    return int(np.argmin(left)), float(left.min())


def _percentiles(values: Doubles) -> Interval | None:
    if np.isnan(values).all():
        return None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _share(hits: NDArray[np.bool_], exact: bool) -> float:
    """Of all orders; of random orders and the observed one, so that it is never zero."""
    return float(hits.mean()) if exact else float((hits.sum() + 1) / (len(hits) + 1))


def _random_pearson(n: int) -> tuple[Doubles, Doubles]:
    """Distribution of r of n independent normal scores with anything: grid of r, and P(random r <= r).

    Its density is proportional to (1 - r^2)^((n - 4) / 2), that is cos(a)^(n - 3) in a = arcsin r.
    """
    angle = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    density = np.clip(np.cos(angle), 0, None) ** (n - 3)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.sin(angle), below / below[-1]


def _critical_r(n: int) -> float:
    r, below = _random_pearson(n)
    return float(np.interp(1 - LEVEL, below, r))


def _reliability(change: Doubles, stderr: Doubles) -> float:
    """1 - mean_i Var|X_i| / Var(|d|), X_i ~ N(d_i, stderr_i^2), whose |X_i| is folded normal:

    Var|X| = d^2 + stderr^2 - m^2,  m = E|X| = stderr sqrt(2 / pi) exp(-d^2 / (2 stderr^2)) + d erf(d / (stderr sqrt 2))
    """
    noise = []
    for d, s in zip(change.tolist(), stderr.tolist(), strict=True):
        if s == 0:
            noise.append(0.0)
            continue
        mean = s * math.sqrt(2 / math.pi) * math.exp(-((d / s) ** 2) / 2) + d * math.erf(d / s / math.sqrt(2))
        noise.append(d * d + s * s - mean * mean)
    return max(0.0, 1 - sum(noise) / len(noise) / float(np.var(np.abs(change), ddof=1)))


# ---- words


def _verdict(
    rows: list[DomainResult], size: Association, controls: dict[str, Association], limits: Limits,
    without: tuple[int, float],
) -> str:  # fmt: skip
    n, r, p = len(rows), size.pearson.value, size.pearson.p_one_sided
    found = f"r = {r:.2f}, p = {p:.2g}; Spearman {size.spearman.value:.2f}, p = {size.spearman.p_one_sided:.2g}"
    weak = f"a forecast with a true r of {GOOD:g} would stand out from random ones in only {limits.power:.0%} of cases"
    why = [f"{n} domains are few"] if n < 20 else []
    if limits.n_distinguishable is not None and limits.n_distinguishable < n:
        why.insert(0, f"{n - limits.n_distinguishable} of {n} changes cannot be told from zero")
    because = f" ({', '.join(why)})" if why else ""
    if p < LEVEL:
        said = [f"The score orders the {n} domains by size of change better than chance ({found})."]
        index, rest = without
        if rest <= _critical_r(n - 1):
            said.append(f"That hangs on {rows[index].name}: without it r is {rest:.2f}, no better than chance.")
        if limits.power < ENOUGH_POWER:
            said.append(f"The outcomes are weak evidence all the same{because}: {weak}.")
    elif limits.power < ENOUGH_POWER:
        said = [
            f"These outcomes cannot tell a good forecast from a useless one{because}: {weak}. "
            f"What this score reaches ({found}) speaks neither for nor against it."
        ]
    else:
        said = [
            f"No better than chance ({found}), where a forecast with a true r of {GOOD:g} would have stood out from "
            f"random ones in {limits.power:.0%} of cases."
        ]
    rivals = [
        f"{name} ({control.pearson.value:.2f})" for name, control in controls.items() if control.pearson.value >= r
    ]
    if rivals:
        said.append(f"Controls do as well: {', '.join(rivals)}.")
    if limits.reliability is None:
        said.append("The noise of the evaluation is not known, so all of this is a best case.")
    return " ".join(said)


def _domain_lines(validation: Validation) -> list[str]:
    label = validation.estimator if validation.estimator in SIGNED_FIELDS else f"STS_{validation.estimator}"
    title = f"Forecast {label} beside the measured change, {len(validation.domains)} domains"
    lines = [title, "", f"{'domain':<24}{'score [95%]':>25}{'change':>10}{'± stderr':>10}{'z':>7}"]
    for row in sorted(validation.domains, key=lambda row: -row.score):
        interval = "" if row.score_ci is None else f" [{row.score_ci[0]:.3g}, {row.score_ci[1]:.3g}]"
        stderr = "" if row.outcome.stderr is None else f"{row.outcome.stderr:.4f}"
        z = "" if row.z is None else f"{row.z:.1f}"
        score = f"{row.score:.3g}{interval}"
        lines.append(f"{row.name[:23]:<24}{score:>25}{row.outcome.change:>+10.4f}{stderr:>10}{z:>7}")
    return lines


def _association_lines(validation: Validation) -> list[str]:
    size, signed = validation.size, validation.signed
    rows = [("Pearson r", size.pearson), ("Spearman r", size.spearman), ("R squared", size.r_squared)]
    rows += [(f"r of {name}", control.pearson) for name, control in validation.controls.items()]
    rows += [("Pearson r, signed", signed.pearson), ("Spearman r, signed", signed.spearman)]
    columns = f"{'':>6}{'measured again':>16}{'other domains':>16}{'p 1-sided':>10}{'2-sided':>8}"
    lines = [f"{'score, |change|':<22}{columns}"]
    for label, estimate in rows:
        lines.append(
            f"{label[:21]:<22}{estimate.value:>6.2f}{_shown(estimate.ci):>16}{_shown(estimate.ci_domains):>16}"
            f"{estimate.p_one_sided:>10.3f}{estimate.p_two_sided:>8.3f}"
        )
    orders = "all" if validation.exact_permutation else f"{N_DRAWS:,} random"
    low, high = size.pearson.leave_one_out
    direction = "The score forecasts size, not direction: see r of the signed change."
    if validation.estimator in SIGNED_FIELDS:
        auc = "not known" if validation.sign_auc is None else f"{validation.sign_auc:.0%}"
        direction = (
            "This forecast has a sign. Of all pairs of a domain that rose and one that fell, the share in the right "
            f"order (50% by chance): {auc}."
        )
    note = (
        f"95% intervals: if measured again (noise of {validation.ci_carries}), and over other domains (resampled). "
        f"p: share of {orders} orders of the scores that do as well. Without one of the domains, Pearson r is between "
        f"{low:.2f} and {high:.2f}. {direction}"
    )
    return [*lines, *textwrap.wrap(note, LINE)]


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _limit_lines(validation: Validation) -> list[str]:
    limits, n = validation.limits, len(validation.domains)
    said = []
    if limits.n_distinguishable is not None:
        said.append(f"{limits.n_distinguishable} of {n} changes differ from zero at 5%")
    if limits.reliability is not None:
        said.append(
            f"reliability of |change|: {limits.reliability:.2f}; a forecast that knows every true |change| reaches its "
            f"root, r = {math.sqrt(limits.reliability):.2f}"
        )
    if limits.ceiling is not None:
        said.append(
            "a forecast equal to the observed |change| reaches, when all is measured again, "
            f"r = {limits.ceiling:.2f} {_shown(limits.ceiling_ci)}"
        )
    said.append(
        f"a random forecast exceeds r = {GOOD:g} in {limits.chance_above_good:.1%} of cases, a random ranking in "
        f"{limits.chance_ranking_above_good:.1%}"
    )
    said.append(f"a forecast with a true r of {GOOD:g} stands out from random ones in {limits.power:.0%} of cases")
    lines = [textwrap.wrap(sentence, LINE, initial_indent="- ", subsequent_indent="  ") for sentence in said]
    return ["What these outcomes could show of any forecast, at best:", *itertools.chain(*lines)]
