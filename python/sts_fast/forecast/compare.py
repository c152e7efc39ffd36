"""Comparisons of several forecasts: of training sets over the same domains, and of SAEs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sts_fast.files import Document
from sts_fast.forecast.estimators import ESTIMATORS
from sts_fast.forecast.run import SCHEMA_VERSION, Forecast
from sts_fast.statistics import defined, spearman


def comparison(forecasts: Sequence[Forecast]) -> Document:
    """Content of compare.json: scores of several training sets over the same domains, and shared features.

    scores: by estimator and training set, `value` and `ci` in the order of `domains`; null for a domain without answers
    changes: unit, sign and level, and by training set `value` and `interval`; null without a calibration
    shared_features: [n_trains][n_trains] share of D_N that two training sets have in common
    """
    tops = [{feature.index for feature in forecast.shifted_features} for forecast in forecasts]
    return {
        "schema_version": SCHEMA_VERSION,
        "trains": [{"name": forecast.train["name"], **forecast.shift} for forecast in forecasts],
        "domains": [domain.name for domain in forecasts[0].domains],
        "scores": {
            estimator.name: {forecast.train["name"]: _column(forecast, estimator.name) for forecast in forecasts}
            for estimator in ESTIMATORS
            if any(estimator.name in domain.scores for domain in forecasts[0].domains)
        },
        "changes": _changes(forecasts),
        "shared_features": [[len(top & other) / len(top) for other in tops] for top in tops],
    }


def _column(forecast: Forecast, estimator: str) -> Document:
    scores = [domain.scores.get(estimator) for domain in forecast.domains]
    return {"value": [score and score.value for score in scores], "ci": [score and list(score.ci) for score in scores]}


def _changes(forecasts: Sequence[Forecast]) -> Document | None:
    calibration = next((forecast.calibration for forecast in forecasts if forecast.calibration), None)
    if calibration is None:
        return None
    return {
        "unit": calibration["unit"],
        "signed": calibration["signed"],
        "level": calibration["level"],
        "trains": {
            forecast.train["name"]: {
                "value": [domain.change for domain in forecast.domains],
                "interval": [domain.change_interval and list(domain.change_interval) for domain in forecast.domains],
            }
            for forecast in forecasts
        },
    }


def sae_names(saes: Sequence[tuple[str, str]]) -> list[str]:
    """A name for each SAE, suitable for a folder: the last parts of its source, as many as make it unique.

    saes: source and hook name of each; an SAE that is read at several places is named with its place
    """
    sources = [re.sub(r"[^\w.=-]+", "/", source or "sae").strip("/").split("/") for source, _ in saes]
    for n_parts in range(1, max(map(len, sources)) + 1):
        names = ["_".join(source[-n_parts:]) for source in sources]
        if len(set(names)) == len({source for source, _ in saes}):
            break
    hooks = [re.sub(r"[^\w.=-]+", "_", hook_name) for _, hook_name in saes]
    names = [f"{name}@{hook}" if names.count(name) > 1 else name for name, hook in zip(names, hooks, strict=True)]
    return [name if name not in names[:i] else f"{name}-{i + 1}" for i, name in enumerate(names)]


def sae_comparison(forecasts: Sequence[Forecast]) -> Document:
    """Content of compare.json for several SAEs: their scores of the same domains, and rank correlations.

    scores: by estimator, training set and SAE, `value` and `ci` in the order of `domains`; scores of different SAEs are
        in different units
    rank_correlation: by estimator and training set, [n_saes][n_saes] Spearman's over domains; null for fewer than 3
    """
    trains = list(dict.fromkeys(forecast.train["name"] for forecast in forecasts))
    by_sae = [forecasts[i : i + len(trains)] for i in range(0, len(forecasts), len(trains))]
    names = sae_names([(of_sae[0].sae["source"], of_sae[0].sae["hook_name"]) for of_sae in by_sae])
    comparisons = [comparison(of_sae) for of_sae in by_sae]
    estimators = list(comparisons[0]["scores"])
    values = {
        (estimator, train): [of_sae["scores"][estimator][train]["value"] for of_sae in comparisons]
        for estimator in estimators
        for train in trains
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "saes": [{"name": name, **of_sae[0].sae} for name, of_sae in zip(names, by_sae, strict=True)],
        "trains": trains,
        "domains": comparisons[0]["domains"],
        "scores": {
            estimator: {
                train: {
                    name: of_sae["scores"][estimator][train] for name, of_sae in zip(names, comparisons, strict=True)
                }
                for train in trains
            }
            for estimator in estimators
        },
        "rank_correlation": {
            estimator: {
                train: [[_rank_correlation(of_sae, other) for other in of_saes] for of_sae in of_saes]
                for train in trains
                for of_saes in [values[estimator, train]]
            }
            for estimator in estimators
        },
    }


def _rank_correlation(scores: Sequence[float | None], other_scores: Sequence[float | None]) -> float | None:
    """Spearman's over the domains that both score; None for fewer than 3."""
    both = [pair for pair in zip(scores, other_scores, strict=True) if None not in pair]
    return defined(spearman(*np.asarray(both, np.float64).T)) if len(both) > 2 else None
