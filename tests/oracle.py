"""The forecast once more: slow, literal, in float64. What scores.json must say about the tokens that were sent.

Nothing of sts_fast is imported. Token ids, positions and settings are read from a run's files; everything else is
computed anew, by the paper's equations over dense features:

    D_N     = the N features j with the largest E_x ||h_j(x) - h_j(demos, x)||^2
    STS_act = E_x sum_{j in D_N} h_j(x)
    STS_ICL = E_x sum_{j in D_N} ||h_j(domain demos, x) - h_j(x)||^2
    act_sq  = E_x mean_{j in D_N} h_j(x)^2

and the same with a control's features in the place of D_N, or with |x_i| and x_i of the residual stream in that of h_j.

h comes from one unbatched forward pass of the whole Hugging Face model per sequence and sae-lens' own `encode`;
`literal_encode` writes each architecture's equation a second time, from the raw tensors.

Every number is three: (low, value, high). Float32 rounds a pre-activation by a part of the largest of its row, not of
its own size: by ROUNDING of it, which is much for a small activation. Low and high are that far from the value.
Activations are discontinuous, too. Where a pre-activation lies within MARGIN of its threshold (or of the row's k-th
value), relative to the largest of its row, the feature may fire or not, and low and high are the two cases. Such flips
are counted.

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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

Doubles = NDArray[np.float64]

MARGIN = 1e-5
ROUNDING = 2.0**-20
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


def answer_outcome(folder: Path, row: dict[str, Any], dtype: torch.dtype) -> tuple[Doubles, Doubles]:
    """[3] negative log-likelihood of the answer's tokens, in nats; [3] 1 where each is the likeliest, else 0.

    Where two tokens are as likely, either may be the likeliest.
    """
    with torch.no_grad():
        logits = load_model(folder, dtype)(torch.tensor([row["base_ids"]]), use_cache=False).logits[0].double().numpy()
    nll, exact = 0.0, np.ones(3)
    for position in row["positions"]:
        before, token = logits[position - 1], row["base_ids"][position]
        nll += float(np.log(np.exp(before - before.max()).sum()) + before.max() - before[token])
        lead, margin = before[token] - np.delete(before, token).max(), MARGIN * np.abs(before).max()
        exact *= [lead > margin, before.argmax() == token, lead > -margin]
    return np.full(3, nll), exact


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
    return _cases(np.where(fires, pre, 0.0), unsure, pre)


def _cases(value: Doubles, unsure: NDArray[np.bool_], pre: Doubles) -> Doubles:
    """[3, n_tokens, d_sae] low, value and high of features, of which some may fire or not."""
    largest = np.abs(pre).max(axis=1, keepdims=True, initial=0)
    rounding = np.where(value > 0, ROUNDING * largest, 0.0)
    low = np.where(unsure, 0.0, value - rounding)
    high = np.where(unsure, np.maximum(pre, 0) + MARGIN * largest, value + rounding)
    return np.stack([low, value, high])


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
    return _cases(np.where(chosen, np.maximum(pre, 0), 0.0), unsure, pre)


def is_open(features: Doubles) -> NDArray[np.bool_]:
    """Whether a feature may fire or not, of features [3, ...]."""
    return (features[LOW] == 0) & (features[HIGH] > 0)


def encode(folder: Path, x: Doubles) -> Doubles:
    """[3, n_tokens, d_sae] features of x by sae-lens, which the literal equation must agree with."""
    features = literal_encode(folder, x)
    low, value, high = features
    with torch.no_grad():
        by_sae_lens = load_sae_lens(folder).encode(torch.from_numpy(x)).numpy()
    differs = np.abs(by_sae_lens - value) > 1e-9 * np.abs(value).max(initial=1.0)
    assert not (differs & ~is_open(features)).any(), "sae-lens and the equation disagree"
    return np.stack([low, np.where(is_open(features), value, by_sae_lens), high])


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
    fired:        on how many of the tokens read each fires, without demonstrations
    sq_shift:     squared difference with and without demonstrations, over the paired tokens
    raw, sq_raw, raw_sq_shift: [n_prompts, d_in] sums of |x|, of x^2 and of squared differences of the residual stream
    residual:     [n_prompts, d_in] sum of x over the tokens read
    outer:        [d_in, d_in] sum of x x^T over all of them
    n_read, n_pairs: [n_prompts]
    n_flips:      features, over all rows, that lie so near their threshold that either is right
    n_features_read: all features of all rows
    """

    h: Doubles
    sq_h: Doubles
    sq_shift: Doubles
    fired: Doubles
    raw: Doubles
    sq_raw: Doubles
    raw_sq_shift: Doubles
    residual: Doubles
    outer: Doubles
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
    writing: Writing,
    tokens: str,
    dtype: torch.dtype,
) -> Sums:
    of_features = ("h", "sq_h", "sq_shift", "fired")
    of_residuals = ("raw", "sq_raw", "raw_sq_shift", "residual")
    parts: dict[str, list[Any]] = {name: [] for name in (*of_features, *of_residuals)}
    n_flips = n_features_read = 0
    outer: Any = 0.0
    for row in rows:
        here = residual(model, layer, tuple(row["base_ids"]), dtype)
        if tuned is not None:
            there = residual(tuned, layer, tuple(row["base_ids"]), dtype)
        elif row["demos_ids"]:
            there = residual(model, layer, tuple(row["demos_ids"]), dtype)
        else:
            there = here[:0]
        check_positions(row, here, there, writing, tokens, is_same_prompt=tuned is not None)
        read = encode(sae, here[row["positions"]])
        paired = encode(sae, here[row["paired"]])
        demos = encode(sae, there[row["paired_demos"]])
        n_flips += sum(int(is_open(features).sum()) for features in (read, demos))
        n_features_read += read[VALUE].size + demos[VALUE].size
        parts["h"].append(read.sum(axis=1))
        parts["sq_h"].append((read**2).sum(axis=1))
        parts["sq_shift"].append(squared_difference(paired, demos).sum(axis=1))
        parts["fired"].append((read > 0).sum(axis=1))
        x = here[row["positions"]]
        parts["raw"].append(np.abs(x).sum(axis=0))
        parts["sq_raw"].append((x**2).sum(axis=0))
        parts["residual"].append(x.sum(axis=0))
        outer = outer + x.T @ x
        parts["raw_sq_shift"].append(((there[row["paired_demos"]] - here[row["paired"]]) ** 2).sum(axis=0))
    return Sums(
        **{name: np.stack(parts[name], axis=1) for name in of_features},
        **{name: np.stack(parts[name]) for name in of_residuals},
        outer=np.asarray(outer),
        n_read=np.asarray([float(len(row["positions"])) for row in rows]),
        n_pairs=np.asarray([float(len(row["paired"])) for row in rows]),
        n_flips=n_flips,
        n_features_read=n_features_read,
    )


@dataclass(frozen=True)
class Writing:
    """How a question and its answer are written: as plain text, or as the demo's model has them, whose questions end
    with '>'. Read back from the tokens."""

    tokenizer: Any
    special: set[int]

    @classmethod
    def of(cls, model: Path) -> Writing:
        tokenizer = AutoTokenizer.from_pretrained(model)
        return cls(tokenizer, set(tokenizer.all_special_ids))

    def texts(self, base: list[int]) -> tuple[list[int], list[int]]:
        """Positions of the tokens of the question and of its answer, special ones among them; blanks around the two
        are the template's."""
        told = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        ends = [len(self.tokenizer.decode(base[: i + 1], **told)) for i in range(len(base))]
        text = self.tokenizer.decode(base, **told)
        if "Question:" in text:
            middle = text.rindex("\nAnswer:")
            spans = (text.index("Question:") + len("Question:"), middle), (middle + len("\nAnswer:"), len(text))
        else:
            middle = text.rindex(">") + 1
            spans = (len("<s>"), middle), (middle, len(text))
        of_texts = []
        for begin, end in spans:
            content = text[begin:end]
            first = begin + len(content) - len(content.lstrip())
            last = begin + len(content.rstrip())
            inside = [i for i, (a, b) in enumerate(pairwise([0, *ends])) if max(a, first) < min(b, last)]
            # Of the tokens of one character that is written in bytes, only one makes the text longer.
            of_texts.append([*range(min(inside, default=0), max(inside, default=-1) + 1)])
        return of_texts[0], of_texts[1]


def check_positions(
    row: dict[str, Any], here: Doubles, there: Doubles, writing: Writing, tokens: str, *, is_same_prompt: bool
) -> None:
    """Asserts that the tokens read are those of the question, of the answer, or of both (for "last", the last token of
    all for 'last'), less special tokens and attention sinks, and that those which both prompts have are paired."""
    base, demos, positions = row["base_ids"], row["demos_ids"], row["positions"]
    question, answer = writing.texts(base)
    last = max(p for p in range(len(base)) if base[p] not in writing.special)
    chosen = {"query": [*question], "answer": [*answer], "all": [*question, *answer], "last": [last]}[tokens]
    span = [p for p in chosen if base[p] not in writing.special]
    if tokens != "last":
        assert row["n_special"] == len(chosen) - len(span)
    # What follows the last token that is read does not count towards the median.
    end = 1 + max(span, default=-1)
    sinks = set(np.flatnonzero(attention_sinks(here[:end])).tolist())
    assert row["n_sinks"] == sum(p in sinks for p in span)
    assert row["n_straddling"] == 0
    assert positions == [p for p in span if p not in sinks]
    if is_same_prompt:
        assert row["paired"] == row["paired_demos"]
        sinks |= set(np.flatnonzero(attention_sinks(there[:end])).tolist())
        assert row["paired"] == [p for p in span if p not in sinks]
    elif demos:
        n_common = 0
        while n_common < min(len(base), len(demos)) and base[-1 - n_common] == demos[-1 - n_common]:
            n_common += 1
        offset = len(demos) - len(base)
        sinks |= {int(p) - offset for p in np.flatnonzero(attention_sinks(there[: end + offset]))}
        assert row["paired"] == [p for p in span if p >= len(base) - n_common and p not in sinks]
        assert row["paired_demos"] == [p + offset for p in row["paired"]]
    else:
        assert row["paired"] == row["paired_demos"] == []


def check_answer(row: dict[str, Any], writing: Writing) -> None:
    """Asserts that the tokens read are all those of the answer, less special ones, and that none is demonstrated."""
    base = row["base_ids"]
    _, answer = writing.texts(base)
    assert row["positions"] == [p for p in answer if base[p] not in writing.special]
    assert row["n_special"] == len(answer) - len(row["positions"])
    assert row["n_sinks"] == row["n_straddling"] == 0
    assert row["demos_ids"] == row["paired"] == row["paired_demos"] == []


def check_means(saved: Doubles, expected: Doubles) -> None:
    """Asserts that mean residuals are these."""
    np.testing.assert_allclose(saved, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- the numbers ---


@dataclass
class Expected:
    """What the oracle says.

    scores: like scores.json, less what no equation determines; each number as [low, value, high], counts as they are
    prompts: per domain, column -> [3, n_prompts], like the values in prompts.parquet
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
    writing = Writing.of(model)
    top_n, dims = settings["top_n"], settings["dims"]

    rows = [row for row in table if row["stage"] == "shift"]
    train = sums_of(rows, layer, model, sae, tuned if dims == "tuned" else None, writing, settings["tokens"], dtype)
    per_prompt = train.h if dims == "active" else train.sq_shift
    n_tokens = (train.n_read if dims == "active" else train.n_pairs).sum()
    importance = per_prompt.sum(axis=1) / n_tokens
    claimed = [feature["index"] for feature in actual["shifted_features"]]
    n_ties = check_top(importance, claimed, top_n)

    draws = drawn_anew([row["draw"] for row in rows], seed, "shift", 32)
    overlaps = np.asarray([overlap(np.tensordot(per_prompt, draw, ([1], [0])), claimed) for draw in draws]).T
    mean_base = train.h.sum(axis=1) / train.n_read.sum()
    fired = train.fired.sum(axis=1)

    saved = load_file(run / "shift.safetensors")
    check_random_sets(saved["random_features"], claimed, importance.shape[1], seed)
    check_low_shift(saved["low_shift_features"].tolist(), importance, fired, claimed)
    n_ties += check_members(mean_base, saved["most_active_features"].tolist(), top_n)
    raw_dimensions = saved["raw_dimensions"].tolist()
    assert raw_dimensions == sorted(raw_dimensions)
    assert len(raw_dimensions) == min(top_n, max(1, train.raw.shape[1] // 4))
    raw_ranked_by = (train.raw if dims == "active" else train.raw_sq_shift).sum(axis=0)
    n_ties += check_members(np.stack([raw_ranked_by] * 3), raw_dimensions, len(raw_dimensions))
    of_control = {
        "": [claimed],
        "random": saved["random_features"].tolist(),
        "low_shift": [saved["low_shift_features"].tolist()],
        "most_active": [saved["most_active_features"].tolist()],
        "raw": [raw_dimensions],
    }
    expected = Expected(
        scores={
            "sae": {"mean_l0": fired.sum(axis=1) / train.n_read.sum()},
            "train": counts_of(rows),
            "shift": {
                "share_of_top_n": share(importance, claimed),
                "n_features_shifted": (importance > 0).sum(axis=1).astype(np.float64),
                "concentration": concentration(importance),
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
    of_domains: list[Sums] = []
    for domain, mean_residual in zip(actual["domains"], saved["domain_mean_residuals"], strict=True):
        name = domain["name"]
        rows = [row for row in table if row["stage"] == "score" and row["domain"] == name]
        sums = sums_of(rows, layer, model, sae, None, writing, settings["tokens"], dtype)
        of_domains.append(sums)
        expected.n_flips += sums.n_flips
        expected.n_features_read += sums.n_features_read
        entry: dict[str, Any] = {"name": name, "scores": {}, **counts_of(rows)}
        controls: dict[str, dict[str, Any]] = {control: {} for control in of_control if control}
        values: dict[str, Doubles] = {}
        resamples = drawn_anew([0] * len(rows), seed, name, settings["n_bootstrap"])
        for estimator in ("act", "icl", "act_sq"):
            if estimator not in settings["estimators"]:
                continue
            per_feature = {"act": sums.h, "icl": sums.sq_shift, "act_sq": sums.sq_h}[estimator]
            per_dimension = {"act": sums.raw, "icl": sums.raw_sq_shift, "act_sq": sums.sq_raw}[estimator]
            for control, sets in of_control.items():
                terms = np.stack([per_dimension] * 3) if control == "raw" else per_feature
                of_prompts = np.mean([terms[:, :, members].sum(axis=2) for members in sets], axis=0)
                per_token = sums.n_pairs if estimator == "icl" else sums.n_read
                if estimator == "act_sq":
                    per_token = per_token * max(len(sets[0]), 1)
                if control != "raw":  # whose sums are kept of the whole domain
                    values[f"{control}_{estimator}_sum".removeprefix("_")] = of_prompts
                ratio = of_prompts.sum(axis=1) / per_token.sum()
                if control:
                    controls[control][estimator] = ratio
                else:
                    ci = interval(of_prompts, per_token, resamples, percentages(settings))
                    if estimator == "icl":
                        ci = widened(ci, of_prompts, per_token, [row["draw"] for row in rows], settings["confidence"])
                    entry["scores"][estimator] = {"value": ratio, "ci": ci}
        means = [part.residual.sum(axis=0) / part.n_read.sum() for part in (train, sums)]
        check_means(np.stack([saved["mean_residual"], mean_residual]), np.stack(means))
        cosine = np.sum(means[0] * means[1]) / np.sqrt(np.sum(means[0] ** 2) * np.sum(means[1] ** 2))
        controls["cosine_of_means"] = {"cosine": np.full(3, cosine)}
        answers = [row for row in table if row["stage"] == "answer" and row["domain"] == name]
        if settings["controls"] == "all" and answers:
            for row in answers:
                check_answer(row, writing)
            nll, exact = (
                np.stack(part, axis=1)
                for part in zip(*(answer_outcome(model, row, dtype) for row in answers), strict=True)
            )
            controls["base_loss"] = {"nll": nll.sum(axis=1) / sum(len(row["positions"]) for row in answers)}
            controls["base_accuracy"] = {"accuracy": exact.mean(axis=1)}
            values |= {"answer_nll_sum": nll, "answer_exact": exact}
        expected.prompts[name] = values
        entry["controls"] = controls
        expected.scores["domains"].append(entry)
    for entry, more in zip(expected.scores["domains"], set_controls(train, of_domains, claimed), strict=True):
        if "act" in settings["estimators"] and len(of_domains) > 2:
            entry["controls"]["z_scored"] = {"act": more.pop("z_scored")}
        else:
            assert entry["controls"].setdefault("z_scored", {}) == {}
        entry["controls"] |= {"cka": {"cka": more["cka"]}, "probe": {"logit": more["logit"]}}
    return expected


def concentration(importance: Doubles) -> list[dict[str, Any]]:
    """What the 1, 2, 5, 10, 20, 50, ... most shifted features hold of it all, and all of them."""
    ranked = -np.sort(-importance, axis=1)
    sizes = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n < ranked.shape[1]] + [ranked.shape[1]]
    # The most that n features can hold of the smallest total, and the least of the largest.
    totals = ranked.sum(axis=1)[::-1]
    return [{"n": n, "share": ranked[:, :n].sum(axis=1) / totals} for n in sizes]


def set_controls(train: Sums, domains: list[Sums], members: list[int]) -> list[dict[str, Any]]:
    """For each domain, against all others: z-scored activations of D_N, and two likenesses of the residual stream.

    The last two stand for the residual stream itself where it is no wider than 64, as in the tests.
    """
    if not domains:
        return []
    means = [sums.residual.sum(axis=0) / sums.n_read.sum() for sums in (train, *domains)]
    spreads = [
        sums.outer / sums.n_read.sum() - np.outer(mean, mean)
        for sums, mean in zip((train, *domains), means, strict=True)
    ]
    pooled = np.mean(spreads, axis=0)
    pooled += 1e-3 * np.mean(np.diag(pooled)) * np.eye(len(pooled))
    everywhere = np.mean(means[1:], axis=0)
    direction = np.linalg.inv(pooled) @ (means[0] - everywhere)
    activations = np.stack([sums.h[:, :, members].sum(axis=1) / sums.n_read.sum() for sums in domains], axis=1)
    found = []
    for i, (mean, spread) in enumerate(zip(means[1:], spreads[1:], strict=True)):
        z = np.zeros(3)
        for j in range(len(members)):
            of_feature = activations[:, :, j]
            deviation = of_feature[VALUE].std()
            if deviation <= 1e-5 * np.abs(of_feature).max():
                continue
            here = (of_feature[VALUE, i] - of_feature[VALUE].mean()) / deviation
            doubt = (of_feature[HIGH] - of_feature[LOW]).max() / deviation
            if doubt < 0.01:  # rounding moves the numerator and the deviation by so much
                z += [here - doubt * (1 + abs(here)), here, here + doubt * (1 + abs(here))]
            else:  # a flip: as far as a number can lie from the mean of so many
                most = np.sqrt(len(domains) - 1)
                z += [-most, here, most]
        alike = np.sum(spreads[0] * spread) / np.sqrt(np.sum(spreads[0] ** 2) * np.sum(spread**2))
        logit = direction @ (mean - (means[0] + everywhere) / 2)
        found.append({"z_scored": z, "cka": np.full(3, alike), "logit": np.full(3, logit)})
    return found


def counts_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "n_prompts": len(rows),
        "n_tokens": sum(len(row["positions"]) for row in rows),
        "n_pairs": sum(len(row["paired"]) for row in rows),
        "n_special": sum(row["n_special"] for row in rows),
        "n_straddling": 0,
        "n_sinks": sum(row["n_sinks"] for row in rows),
    }


def check_top(importance: Doubles, claimed: list[int], top_n: int) -> int:
    """Asserts that these are the top features, largest first; returns how many stand there by a tie."""
    low, _, high = importance
    for one, following in itertools.pairwise(claimed):
        assert high[one] * (1 + TIE) >= low[following], f"feature {one} stands before {following}"
    return check_members(importance, claimed, top_n)


def check_members(ranked_by: Doubles, claimed: list[int], top_n: int) -> int:
    """Asserts that these are the top features, in any order; returns how many stand there by a tie."""
    low, value, high = ranked_by
    top = np.argsort(-value, kind="stable")[:top_n].tolist()
    assert len(set(claimed)) == len(claimed) == top_n
    for put_in, left_out in ((j, i) for j in set(claimed) - set(top) for i in set(top) - set(claimed)):
        assert high[put_in] * (1 + TIE) >= low[left_out], f"{put_in} stands in the place of {left_out}"
    return len(set(claimed) - set(top))


def check_low_shift(claimed: list[int], importance: Doubles, fired: Doubles, top: list[int]) -> None:
    """Asserts that these fire on the training set's queries, lie outside D_N and shift least of all that do."""
    low, _, high = importance
    others = set(range(importance.shape[1])) - set(top) - set(claimed)
    assert claimed == sorted(set(claimed) - set(top))
    assert len(claimed) <= len(top)
    assert all(fired[HIGH, j] > 0 for j in claimed)
    must_fire = [j for j in others if fired[LOW, j] > 0]
    assert len(claimed) == len(top) or not must_fire
    if claimed and must_fire:
        assert max(low[j] for j in claimed) <= min(high[j] for j in must_fire) * (1 + TIE)


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


def drawn_anew(groups: list[int], seed: int, name: str, size: int) -> NDArray[np.int64]:
    """[size, n] times that each of n things is drawn: of several groups first groups, then as many members of each."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    n_groups = len(set(groups))
    counts = np.zeros((size, len(groups)), np.int64)
    chosen = np.ones((size, 1), np.int64)
    if n_groups > 1:
        chosen = np.array(
            [
                np.bincount(rng.integers(n_groups, size=n_groups, dtype=np.int32), minlength=n_groups)
                for _ in range(size)
            ]
        )
    for g, group in enumerate(sorted(set(groups))):
        here = [i for i, of in enumerate(groups) if of == group]
        for row, times in enumerate(chosen[:, g]):
            for i in rng.integers(len(here), size=len(here) * times, dtype=np.int32):
                counts[row, here[i]] += 1
    return counts


def widened(
    of_prompts: list[Doubles], numerator: Doubles, denominator: Doubles, groups: list[int], confidence: float
) -> list[Doubles]:
    """The interval, at least as wide as the spread between groups of prompts makes it.

    ln R +- t sqrt(K / (K - 1) sum_k (sum_{i in k} (a_i - R b_i))^2) / (R sum_i b_i), of R = sum a / sum b
    """
    k = len(set(groups))
    if k == 1:
        return of_prompts
    low, high = (np.array(end, np.float64) for end in of_prompts)
    for i, a in enumerate(numerator):
        ratio = a.sum() / denominator.sum()
        if ratio == 0:
            continue
        of_groups = [sum(a[p] - ratio * denominator[p] for p, of in enumerate(groups) if of == g) for g in {*groups}]
        error = np.sqrt(k / (k - 1) * sum(one**2 for one in of_groups)) / (ratio * denominator.sum())
        t = stats.t(k - 1).isf((1 - confidence) / 2)
        low[i] = min(low[i], np.exp(np.log(ratio) - t * error))
        high[i] = max(high[i], np.exp(np.log(ratio) + t * error))
    return [np.array([end.min(), end[1], end.max()]) for end in (low, high)]


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
