"""Report sections on the shifted features: the concentration of the shift, and the features with their firings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from sts_fast.forecast import stability
from sts_fast.forecast.blocks import Scores
from sts_fast.report import figures
from sts_fast.report.numbers import count, counted, percent
from sts_fast.report.run import Firing, Material
from sts_fast.signed.signed import CarrierBlock

FIRST_FEATURES = 20
# Examples shown at once, and after a click; features.parquet contains all.
FIRST_FIRINGS = 3
MOST_FIRINGS = 10
# Characters of context on either side.
MOST_BEFORE = 70
MOST_AFTER = 40

MEASURES = {"active": "activity", "correlation": "correlation", "gradient": "gradient"}
SHIFT_WORDS = {
    "icl": "the shift that demonstrations of the training set cause",
    "tuned": "the shift that training has caused",
    "active": "the activity on the training set (no shift was measured)",
    "verified": "the shift that the model's own verified completions cause as demonstrations",
    "correlation": "the correlation with the advantage (no shift was measured)",
    "gradient": "the policy gradient (no shift was measured)",
    "step": "the shift that a step along the policy gradient causes",
}


@dataclass(frozen=True)
class Feature:
    """A feature as shown in the table.

    moves: (domain, the feature's part in its signed forecast)
    """

    rank: int
    index: int
    share: float
    mean_activation: float | None
    label: str | None
    url: str | None
    promoted: list[str]
    firings: list[Firing]
    more_firings: list[Firing]
    moves: tuple[tuple[str, float], ...] = ()

    def moving(self, moves: Sequence[tuple[str, float]]) -> Feature:
        return replace(self, moves=tuple(moves))


@dataclass(frozen=True)
class FeatureSection:
    """A table of features; a has_ is False where no feature has an entry in that column.

    share_of: the quantity of which the features have their shares
    """

    share_of: str
    first: list[Feature]
    rest: list[Feature]
    has_mean: bool
    has_moves: bool
    has_label: bool
    has_promoted: bool
    has_firings: bool


@dataclass(frozen=True)
class Concentration:
    figure: Markup | None
    sentences: list[str]


def chosen(scores: Scores) -> str:
    """What the features of D_N are called."""
    return "most active features" if scores["settings"]["dims"] == "active" else "shifted features"


def feature_section(run: Material) -> FeatureSection:
    """The features of D_N."""
    entries = run.scores["shifted_features"]
    measure = MEASURES.get(run.scores["settings"]["dims"], "shift")
    features = [feature_of(rank, entry, run.firings, entry["mean_activation"]) for rank, entry in enumerate(entries, 1)]
    return section_of(features, measure)


def section_of(features: Sequence[Feature], share_of: str) -> FeatureSection:
    return FeatureSection(
        share_of=share_of,
        first=list(features[:FIRST_FEATURES]),
        rest=list(features[FIRST_FEATURES:]),
        has_mean=any(feature.mean_activation is not None for feature in features),
        has_moves=any(feature.moves for feature in features),
        has_label=any(feature.label or feature.url for feature in features),
        has_promoted=any(feature.promoted for feature in features),
        has_firings=any(feature.firings for feature in features),
    )


def concentration(run: Material) -> Concentration:
    """Concentration of the shift (or the quantity that ranks D_N) in few features, and the stability of D_N."""
    scores = run.scores
    ranked_by = SHIFT_WORDS[scores["settings"]["dims"]]
    top_n, shift = scores["settings"]["top_n"], scores["shift"]
    sentences = [
        f"The {count(top_n)} features of D_N have {percent(shift['share_of_top_n'])} of {ranked_by}; "
        f"{count(shift['n_features_shifted'])} of the SAE's {count(scores['sae']['d_sae'])} features have a part in it."
    ]
    figure = None
    if run.importance is not None and run.importance.min() >= 0 and run.importance.sum() > 0:
        shares = np.cumsum(np.sort(run.importance)[::-1])
        shares = np.minimum(shares / shares[-1], 1.0)
        needed = [int(np.searchsorted(shares, part - 1e-12)) + 1 for part in (0.5, 0.9)]
        sentences.append(f"Half of it lies in the top {count(needed[0])}, 90% in the top {count(needed[1])}.")
        figure = figures.curve(
            "concentration",
            shares,
            min(top_n, len(shares)),
            x_label="features, ranked (log) →",
            y_label="↑ cumulative share",
            title="Cumulative share over ranked features",
            description=f"The top {count(top_n)} of {count(len(shares))} features have "
            f"{percent(float(shares[min(top_n, len(shares)) - 1]))}; half of the total lies in the top "
            f"{count(needed[0])}, 90% in the top {count(needed[1])}.",
        )
    resampled = shift["stability"]
    low, high = resampled["overlap_ci"]
    kept = resampled["mean_overlap"]
    sentences.append(
        f"D_N {stability.in_words(kept)}: resampling the {counted(scores['train']['n_prompts'], 'training prompt')} "
        f"keeps {percent(kept)} of it ({percent(low)} to {percent(high)} in {count(resampled['n_replicates'])} "
        "resamplings)."
    )
    return Concentration(figure, sentences)


def feature_of(
    rank: int, entry: CarrierBlock, firings_of: Mapping[int, list[Firing]], mean_activation: float | None = None
) -> Feature:
    """A feature as scores.json describes it, with its firings."""
    url, promoted, label = entry.get("neuronpedia"), entry.get("promoted_tokens"), entry.get("label")
    firings = [_trimmed(firing) for firing in firings_of.get(entry["index"], [])[:MOST_FIRINGS]]
    return Feature(
        rank=rank,
        index=entry["index"],
        share=entry["share"],
        mean_activation=mean_activation,
        label=label if isinstance(label, str) and label.strip() else None,
        # Only a web address becomes a link.
        url=url if isinstance(url, str) and url.startswith(("https://", "http://")) else None,
        promoted=[token for token in promoted if isinstance(token, str)] if isinstance(promoted, list) else [],
        firings=firings[:FIRST_FIRINGS],
        more_firings=firings[FIRST_FIRINGS:],
    )


def _trimmed(firing: Firing) -> Firing:
    before, after = firing.before, firing.after
    if len(before) > MOST_BEFORE:
        before = "…" + before[-MOST_BEFORE:]
    if len(after) > MOST_AFTER:
        after = after[:MOST_AFTER] + "…"
    return Firing(firing.value, before, firing.token, after, firing.stage, firing.domain, firing.id)
