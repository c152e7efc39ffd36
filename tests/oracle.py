"""The forecast once more: slow, literal, in float64. What scores.json must say about the tokens that were sent.

Nothing of sts_fast is imported. Token ids, positions and settings are read from a run's files; everything else is
computed anew, by the paper's equations over dense features:

    D_N     = the N features j with the largest E_x ||h_j(x) - h_j(demos, x)||^2
    STS_act = E_x sum_{j in D_N} h_j(x)
    STS_ICL = E_x sum_{j in D_N} ||h_j(domain demos, x) - h_j(x)||^2
    act_sq  = E_x mean_{j in D_N} h_j(x)^2

h comes from one unbatched forward pass of the whole Hugging Face model per sequence and sae-lens' own `encode`;
`literal_encode` writes each architecture's equation a second time, from the raw tensors.

Activations are discontinuous, so every number is three: (low, value, high). Where a pre-activation lies within MARGIN
of its threshold (or of the row's k-th value), relative to the largest of its row, the feature may fire or not, and low
and high hold the two cases; everywhere else the three are the same. Such flips are counted.

Which resamples a bootstrap draws is a choice, not an equation: seeds and order of draws mirror the package's.
"""

from __future__ import annotations

import itertools
import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Doubles = NDArray[np.float64]

MARGIN = 1e-5
TIE = 1e-5
SINK_RATIO = 10.0
LOW, VALUE, HIGH = 0, 1, 2


# --- the model ---


@cache
def load_model(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@cache
def residual(folder: Path, layer: int, ids: tuple[int, ...], dtype: torch.dtype) -> Doubles:
    """[n_tokens, d_in] the residual stream after a layer that is not the last (there the final norm is included)."""
    model = load_model(folder, dtype)
    assert layer + 1 < model.config.num_hidden_layers
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return states[layer + 1][0].double().numpy()


def attention_sinks(rows: Doubles) -> NDArray[np.bool_]:
    """[n_tokens] whose norm is over ten times the median norm of the sequence."""
    norms = np.sqrt((rows**2).sum(axis=1))
    ratio = norms / np.median(norms)
    assert not (np.abs(ratio / SINK_RATIO - 1) < 1e-5).any(), "a norm lies on the border of being a sink"
    return ratio > SINK_RATIO


# --- the SAE ---


@cache
def load_sae_lens(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

        return SAE.load_from_disk(folder, dtype="float64")


@cache
def raw_sae(folder: Path) -> tuple[dict[str, Any], dict[str, Doubles]]:
    tensors = load_file(folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    return config, {name: tensor.astype(np.float64) for name, tensor in tensors.items()}


def literal_encode(folder: Path, x: Doubles) -> Doubles:
    """[3, n_tokens, d_sae] features of x [n_tokens, d_in]: low, value, high."""
    config, w = raw_sae(folder)
    assert config["normalize_activations"] == "none"
    z = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    product = (torch.from_numpy(z) @ torch.from_numpy(w["W_enc"])).numpy()
    match config["architecture"]:
        case "standard":
            pre, over = product + w["b_enc"], [product + w["b_enc"]]
        case "jumprelu":
            pre = product + w["b_enc"]
            over = [pre, pre - w["threshold"]]
        case "gated":
            pre = product * np.exp(w["r_mag"]) + w["b_mag"]
            over = [pre, product + w["b_gate"]]
        case "topk":
            pre = product + w["b_enc"]
            if config["rescale_acts_by_decoder_norm"]:
                pre = pre * np.sqrt((w["W_dec"] ** 2).sum(axis=1))
            return _topk(pre, config["k"])
        case other:
            raise NotImplementedError(other)
    # A feature fires where all its conditions are positive; it may do the other where one of them is hardly either.
    margin = MARGIN * np.abs(pre).max(axis=1, keepdims=True, initial=0)
    fires = np.all([condition > 0 for condition in over], axis=0)
    unsure = np.all([condition > -margin for condition in over], axis=0) & np.any(
        [np.abs(condition) <= margin for condition in over], axis=0
    )
    value = np.where(fires, pre, 0.0)
    return np.stack([np.where(unsure, 0.0, value), value, np.where(unsure, np.maximum(pre, 0) + margin, value)])


def _topk(pre: Doubles, k: int) -> Doubles:
    order = np.argsort(-pre, axis=1, kind="stable")  # among equals the lower index
    chosen = np.zeros(pre.shape, bool)
    np.put_along_axis(chosen, order[:, :k], True, axis=1)
    margin = MARGIN * np.abs(pre).max(axis=1, keepdims=True, initial=0)
    last_in = np.take_along_axis(pre, order[:, k - 1 : k], axis=1)
    first_out = np.take_along_axis(pre, order[:, k : k + 1], axis=1)
    is_tie = last_in - first_out <= margin
    unsure = is_tie & np.where(chosen, pre <= first_out + margin, pre >= last_in - margin) & (pre > -margin)
    unsure |= chosen & (np.abs(pre) <= margin)
    value = np.where(chosen, np.maximum(pre, 0), 0.0)
    return np.stack([np.where(unsure, 0.0, value), value, np.where(unsure, np.maximum(pre, 0) + margin, value)])


def encode(folder: Path, x: Doubles) -> Doubles:
    """[3, n_tokens, d_sae] features of x by sae-lens, which the literal equation must agree with."""
    features = literal_encode(folder, x)
    low, value, high = features
    with torch.no_grad():
        by_sae_lens = load_sae_lens(folder).encode(torch.from_numpy(x)).numpy()
    differs = np.abs(by_sae_lens - value) > 1e-9 * np.abs(value).max(initial=1.0)
    assert not (differs & (low == high)).any(), "sae-lens and the equation disagree"
    return np.stack([low, np.where(low == high, by_sae_lens, value), high])


def squared_difference(a: Doubles, b: Doubles) -> Doubles:
    """[3, n, d_sae] (b - a)^2 of features [3, n, d_sae]."""
    smallest, value, largest = b[LOW] - a[HIGH], b[VALUE] - a[VALUE], b[HIGH] - a[LOW]
    low = np.where((smallest <= 0) & (largest >= 0), 0.0, np.minimum(smallest**2, largest**2))
    return np.stack([low, value**2, np.maximum(smallest**2, largest**2)])


# --- sums over the tokens of each prompt ---


@dataclass
class Sums:
    """Of one training set or domain; arrays are [3, n_prompts, d_sae] unless said otherwise.

    h, sq_h:      over the tokens read, without demonstrations
    base, fired:  features, and how many fire [3, n_prompts], over the paired tokens, without demonstrations
    fired_read:   [3, n_prompts] how many fire over the tokens read
    sq_shift:     squared difference with and without demonstrations, over the paired tokens
    n_read, n_pairs: [n_prompts]
    n_flips:      features, over all rows, that lie so near their threshold that either is right
    n_features_read: all features of all rows
    """

    h: Doubles
    sq_h: Doubles
    base: Doubles
    sq_shift: Doubles
    fired: Doubles
    fired_read: Doubles
    n_read: Doubles
    n_pairs: Doubles
    n_flips: int
    n_features_read: int


def sums_of(
    rows: list[dict[str, Any]],
    layer: int,
    model: Path,
    sae: Path,
    tuned: Path | None,
    special_ids: set[int],
    tokens: str,
    dtype: torch.dtype,
) -> Sums:
    parts: dict[str, list[Any]] = {name: [] for name in ("h", "sq_h", "base", "sq_shift", "fired", "fired_read")}
    n_flips = n_features_read = 0
    for row in rows:
        here = residual(model, layer, tuple(row["base_ids"]), dtype)
        if tuned is not None:
            there = residual(tuned, layer, tuple(row["base_ids"]), dtype)
        elif row["demos_ids"]:
            there = residual(model, layer, tuple(row["demos_ids"]), dtype)
        else:
            there = here[:0]
        check_positions(row, here, there, special_ids, tokens, is_same_prompt=tuned is not None)
        read = encode(sae, here[row["positions"]])
        paired = encode(sae, here[row["paired"]])
        demos = encode(sae, there[row["paired_demos"]])
        n_flips += sum(int((features[LOW] != features[HIGH]).sum()) for features in (read, demos))
        n_features_read += read[VALUE].size + demos[VALUE].size
        parts["h"].append(read.sum(axis=1))
        parts["sq_h"].append((read**2).sum(axis=1))
        parts["base"].append(paired.sum(axis=1))
        parts["sq_shift"].append(squared_difference(paired, demos).sum(axis=1))
        parts["fired"].append((paired > 0).sum(axis=(1, 2)))
        parts["fired_read"].append((read > 0).sum(axis=(1, 2)))
    return Sums(
        **{name: np.stack(part, axis=1) for name, part in parts.items()},
        n_read=np.asarray([float(len(row["positions"])) for row in rows]),
        n_pairs=np.asarray([float(len(row["paired"])) for row in rows]),
        n_flips=n_flips,
        n_features_read=n_features_read,
    )


def check_positions(
    row: dict[str, Any], here: Doubles, there: Doubles, special_ids: set[int], tokens: str, *, is_same_prompt: bool
) -> None:
    """Asserts that the tokens read are those of the query's end, less special tokens and attention sinks, and that
    those which stand at the end of both prompts are paired."""
    base, demos, positions = row["base_ids"], row["demos_ids"], row["positions"]
    sinks = set(np.flatnonzero(attention_sinks(here)).tolist())
    n_special = 0 if tokens == "last" else row["n_special"]
    start = len(base) - (len(positions) + row["n_sinks"] + n_special)
    if tokens == "last":
        start = max(p for p in range(len(base)) if base[p] not in special_ids)
    span = [p for p in range(start, len(base)) if base[p] not in special_ids]
    if tokens != "last":
        assert n_special == len(base) - start - len(span)
    span = span[:1] if tokens == "last" else span
    assert row["n_sinks"] == sum(p in sinks for p in span)
    assert positions == [p for p in span if p not in sinks]
    if is_same_prompt:
        assert row["paired"] == row["paired_demos"]
        sinks |= set(np.flatnonzero(attention_sinks(there)).tolist())
        assert row["paired"] == [p for p in span if p not in sinks]
    elif demos:
        n_common = 0
        while n_common < min(len(base), len(demos)) and base[-1 - n_common] == demos[-1 - n_common]:
            n_common += 1
        offset = len(demos) - len(base)
        sinks |= {int(p) - offset for p in np.flatnonzero(attention_sinks(there))}
        assert row["paired"] == [p for p in span if p >= len(base) - n_common and p not in sinks]
        assert row["paired_demos"] == [p + offset for p in row["paired"]]
    else:
        assert row["paired"] == row["paired_demos"] == []


# --- the numbers ---


@dataclass
class Expected:
    """What the oracle says.

    scores: like scores.json, less what no equation determines; each number as [low, value, high], counts as they are
    prompts: per stage and domain, column -> [3, n_prompts], like the values in prompts.parquet
    n_flips: features whose firing is open, over all rows
    n_features_read: all features of all rows
    n_ties: features of D_N in the place of another with the same shift
    """

    scores: dict[str, Any]
    prompts: dict[str, dict[str, Doubles]] = field(default_factory=dict)
    n_flips: int = 0
    n_features_read: int = 0
    n_ties: int = 0


def expect(
    run: Path, model: Path, sae: Path, tuned: Path | None = None, dtype: torch.dtype = torch.float64
) -> Expected:
    """The numbers that belong to the tokens, settings and seed of the run in that folder."""
    actual = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    settings, seed, layer = actual["settings"], actual["provenance"]["seed"], actual["model"]["layer"]
    table = pq.read_table(run / "prompts.parquet").to_pylist()
    special_ids = set(AutoTokenizer.from_pretrained(model).all_special_ids)
    top_n, dims = settings["top_n"], settings["dims"]

    rows = [row for row in table if row["stage"] == "shift"]
    train = sums_of(rows, layer, model, sae, tuned if dims == "tuned" else None, special_ids, settings["tokens"], dtype)
    per_prompt = train.h if dims == "active" else train.sq_shift
    n_tokens = (train.n_read if dims == "active" else train.n_pairs).sum()
    importance = per_prompt.sum(axis=1) / n_tokens
    claimed = [feature["index"] for feature in actual["shifted_features"]]
    n_ties = check_top(importance, claimed, top_n)

    draws = np.random.default_rng([seed, zlib.crc32(b"shift")]).multinomial(len(rows), [1 / len(rows)] * len(rows), 32)
    overlaps = np.asarray([overlap(np.tensordot(per_prompt, draw, ([1], [0])), claimed) for draw in draws]).T
    random_sets = load_file(run / "shift.safetensors")["random_features"]
    check_random_sets(random_sets, claimed, importance.shape[1], seed)

    mean_base = (train.h if dims == "active" else train.base).sum(axis=1) / n_tokens
    fired = (train.fired_read if dims == "active" else train.fired).sum(axis=1)
    expected = Expected(
        scores={
            "sae": {"mean_l0": fired / n_tokens},
            "train": counts_of(rows),
            "shift": {
                "share_of_top_n": share(importance, claimed),
                "n_features_shifted": (importance > 0).sum(axis=1).astype(np.float64),
                "stability": {
                    "n_replicates": 32,
                    "mean_overlap": overlaps.mean(axis=1),
                    "overlap_ci": [np.asarray([percentile(one, q) for one in overlaps]) for q in percentages(settings)],
                },
            },
            "shifted_features": [
                {
                    "index": j,
                    "mean_squared_shift": None if dims == "active" else importance[:, j],
                    "mean_activation": mean_base[:, j],
                    "share": share(importance, [j]),
                }
                for j in claimed
            ],
            "domains": [],
        },
        n_flips=train.n_flips,
        n_features_read=train.n_features_read,
        n_ties=n_ties,
    )
    for domain in actual["domains"]:
        name = domain["name"]
        rows = [row for row in table if row["stage"] == "score" and row["domain"] == name]
        sums = sums_of(rows, layer, model, sae, None, special_ids, settings["tokens"], dtype)
        expected.n_flips += sums.n_flips
        expected.n_features_read += sums.n_features_read
        entry: dict[str, Any] = {"name": name, **counts_of(rows), "controls": {"random": {}}}
        expected.prompts[name] = {}
        resamples = np.random.default_rng([seed, zlib.crc32(name.encode())]).multinomial(
            len(rows), [1 / len(rows)] * len(rows), settings["n_bootstrap"]
        )
        for estimator in ("act", "icl", "act_sq"):
            if estimator not in settings["estimators"]:
                entry |= {f"sts_{estimator}": None, f"sts_{estimator}_ci": None}
                continue
            per_feature = {"act": sums.h, "icl": sums.sq_shift, "act_sq": sums.sq_h}[estimator]
            per_token = {"act": sums.n_read, "icl": sums.n_pairs, "act_sq": sums.n_read * top_n}[estimator]
            of_top = per_feature[:, :, claimed].sum(axis=2)
            of_random = np.mean([per_feature[:, :, members].sum(axis=2) for members in random_sets], axis=0)
            entry[f"sts_{estimator}"] = of_top.sum(axis=1) / per_token.sum()
            entry[f"sts_{estimator}_ci"] = interval(of_top, per_token, resamples, percentages(settings))
            entry["controls"]["random"][f"sts_{estimator}"] = of_random.sum(axis=1) / per_token.sum()
            expected.prompts[name] |= {f"{estimator}_sum": of_top, f"random_{estimator}_sum": of_random}
        expected.scores["domains"].append(entry)
    return expected


def counts_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "n_prompts": len(rows),
        "n_tokens": sum(len(row["positions"]) for row in rows),
        "n_pairs": sum(len(row["paired"]) for row in rows),
        "n_special": sum(row["n_special"] for row in rows),
        "n_sinks": sum(row["n_sinks"] for row in rows),
    }


def check_top(importance: Doubles, claimed: list[int], top_n: int) -> int:
    """Asserts that these are the top features, largest first; returns how many stand there by a tie."""
    low, value, high = importance
    top = np.argsort(-value, kind="stable")[:top_n].tolist()
    assert len(set(claimed)) == len(claimed) == top_n
    for put_in, left_out in ((j, i) for j in set(claimed) - set(top) for i in set(top) - set(claimed)):
        assert high[put_in] * (1 + TIE) >= low[left_out], f"feature {put_in} stands in the place of {left_out}"
    for one, following in itertools.pairwise(claimed):
        assert high[one] * (1 + TIE) >= low[following], f"feature {one} stands before {following}"
    return len(set(claimed) - set(top))


def overlap(importance: Doubles, members: list[int]) -> tuple[float, float, float]:
    """Part of the members that are among the top of another ranking: at least, as it is, at most."""
    low, value, high = importance
    n = len(members)
    exact = np.isin(members, np.argsort(-value, kind="stable")[:n])
    border_low, border_high = np.sort(low)[-n], np.sort(high)[-n]
    # What lies on the border, by a tie or a flip, may fall on either side; all that do not shift at all rank by index.
    surely = (low[members] > border_high * (1 + TIE)) | (exact & (high[members] == 0))
    maybe = (high[members] >= border_low * (1 - TIE)) & (high[members] > 0)
    alone = np.sum((high >= border_low * (1 - TIE)) & (low <= border_high * (1 + TIE)) & (high > 0)) <= 1
    if alone or border_high == 0:
        return float(exact.mean()), float(exact.mean()), float(exact.mean())
    return float((surely & exact).mean()), float(exact.mean()), float((maybe | exact).mean())


def share(importance: Doubles, members: list[int]) -> Doubles:
    """[3] part of the total that some features hold."""
    inside = importance[:, members].sum(axis=1)
    outside = importance.sum(axis=1) - inside
    return inside / (inside + outside[::-1])


def check_random_sets(sets: NDArray[np.int64], top: list[int], d_sae: int, seed: int) -> None:
    """Asserts that the control's features are drawn outside D_N wherever so many lie there."""
    outside = [j for j in range(d_sae) if j not in set(top)]
    pool = outside if len(outside) >= len(top) else list(range(d_sae))
    rng = np.random.default_rng([seed, zlib.crc32(b"random features")])
    assert len(sets) == 10
    for members in sets:
        assert len(set(members.tolist())) == len(top)
        assert set(members.tolist()) <= set(pool)
        assert members.tolist() == sorted(rng.choice(pool, len(top), replace=False).tolist())


def percentages(settings: dict[str, Any]) -> tuple[float, float]:
    tail = (1 - settings["confidence"]) / 2
    return 100 * tail, 100 * (1 - tail)


def interval(
    numerator: Doubles, denominator: Doubles, resamples: NDArray[np.int64], at: tuple[float, float]
) -> list[Doubles]:
    """Percentiles of sum(numerator [3, n_prompts]) / sum(denominator [n_prompts]) when prompts are drawn anew."""
    ratios = [
        [float(draw @ one) / float(draw @ denominator) for draw in resamples if draw @ denominator > 0]
        for one in numerator
    ]
    return [np.asarray([percentile(one, q) for one in ratios]) for q in at]


def percentile(values: Any, q: float) -> float:
    """Linear between the two values that stand around q% of the way."""
    ordered = sorted(map(float, values))
    place = q / 100 * (len(ordered) - 1)
    before = int(place)
    after = min(before + 1, len(ordered) - 1)
    return ordered[before] + (place - before) * (ordered[after] - ordered[before])


# --- comparison ---


def pairs(expected: Any, *actual: Any, path: str = "") -> Iterator[tuple[Any, ...]]:
    """(path, [low, value, high], actual numbers) of every number in documents alike; all else is asserted equal."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            yield from pairs(value, *(one[key] for one in actual), path=f"{path}.{key}")
    elif isinstance(expected, list):
        assert all(len(one) == len(expected) for one in actual), path
        for i, value in enumerate(expected):
            yield from pairs(value, *(one[i] for one in actual), path=f"{path}[{i}]")
    elif isinstance(expected, np.ndarray):
        yield path, expected, *actual
    else:
        assert all(one == expected for one in actual), f"{path} is {actual}, but {expected} is expected"


def deviations(expected: Any, actual: Any) -> Iterator[tuple[str, float]]:
    """(path, relative distance of the actual number from what is expected) of every number."""
    for path, (low, value, high), number in pairs(expected, actual):
        outside = max(low - number, number - high, 0.0)
        yield path, 0.0 if outside == 0 else outside / max(abs(value), 1e-300)
