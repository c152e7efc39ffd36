"""A forecast from end to end: against the oracle, on random and on real material, in any batching, from files alone."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
import tiny as tiny_material
import torch
import transformers
from expected_scores import ANSWER_CONTROLS, CONTROLS, TOLERANCE, assert_as_expected, written
from safetensors import safe_open
from tiny import ARCHITECTURES, Tiny
from transformers import AutoTokenizer

import sts_fast
from sts_fast.errors import InputError
from sts_fast.forecast import text
from sts_fast.forecast.score import compare
from sts_fast.model.forward import ForwardPasses, Sequences
from sts_fast.model.language_model import LanguageModel

BATCHING_TOLERANCE = 1e-5  # of a number, between two batch budgets
REPEATED_TOLERANCE = 1e-12  # of a number, computed again from the float64 sums in the files

TOP_N, SHOTS, DOMAIN_SHOTS = 24, 1, 2
# Each way of choosing D_N, each estimator and each token class, though not all of their combinations.
READINGS = [
    ("icl", ("act", "icl", "act_sq"), "query"),
    ("icl", ("icl",), "last"),
    ("icl", ("act", "icl"), "all"),
    ("active", ("icl",), "query"),
    ("active", ("act", "act_sq"), "last"),
    ("tuned", ("icl", "act"), "answer"),
    ("tuned", ("act_sq",), "all"),
]

# Prompts of a set of the real material; the oracle takes them one by one.
REAL_LIMIT = 8

# What says what a feature is about, and follows from the model and from labels.
EXPLANATIONS = {"promoted_tokens", "neuronpedia", "label"}

ASSETS = Path(__file__).parents[3] / "shared" / "assets"
CATEGORIES = ("math", "other", "physics", "chemistry", "philosophy", "engineering")
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason="the real material is not beside this checkout")


def forecast_tiny(tiny: Tiny, architecture: str, **options: Any) -> sts_fast.Forecast:
    defaults = {"shots": SHOTS, "domain_shots": DOMAIN_SHOTS, "top_n": TOP_N}
    return sts_fast.score(
        model=tiny.model, sae=tiny.saes[architecture], train=tiny.train, domains=tiny.domains, **{**defaults, **options}
    )


def without_time(scores: str) -> str:
    timed = ('"created_at"', '"seconds"', '"tokens_per_second"')
    return "\n".join(line for line in scores.splitlines() if not line.strip().startswith(timed))


# --- random material: always runs ---


@pytest.mark.parametrize(("dims", "estimators", "tokens"), READINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_number_equals_the_oracle(
    tiny: Tiny,
    architecture: str,
    dims: Any,
    estimators: Any,
    tokens: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    tuned = tiny.tuned if dims == "tuned" else None
    options = {"dims": dims, "estimators": estimators, "tokens": tokens, "tuned": tuned, "controls": "all"}
    forecast = forecast_tiny(tiny, architecture, **options)
    forecast.save(tmp_path)
    assert [domain.name for domain in forecast.domains] == list(tiny.domains)
    assert all(set(domain.controls) == CONTROLS | ANSWER_CONTROLS for domain in forecast.domains)
    expected = oracle.expect(tmp_path, tiny.model, tiny.saes[architecture], tuned)
    assert_as_expected(tmp_path, expected, request)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_float32_the_oracle_says_the_same(
    tiny: Tiny, architecture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    forecast_tiny(tiny, architecture).save(tmp_path)
    expected = oracle.expect(tmp_path, tiny.model, tiny.saes[architecture], dtype=torch.float32)
    assert_as_expected(tmp_path, expected, request)


def test_random_material_holds_what_is_hard(tiny: Tiny) -> None:
    forecast = forecast_tiny(tiny, "standard")
    train = forecast.train
    n_left = tiny_material.N_QUESTIONS + tiny_material.N_UNANSWERED  # with several draws, no row is set aside
    assert (train["n_prompts"], train["n_too_long"]) == (n_left, tiny_material.N_TOO_LONG)
    assert train["n_unanswered"] == 0
    assert train["n_special"] > 0
    assert train["n_sinks"] > 0
    # A token may be a sink in one prompt alone, which leaves it to be read but not paired.
    assert 0 < sum(domain.n_pairs for domain in forecast.domains) < sum(domain.n_tokens for domain in forecast.domains)

    train = forecast_tiny(tiny, "standard", tokens="answer").train
    assert train["n_prompts"] == tiny_material.N_QUESTIONS
    assert train["n_unanswered"] == tiny_material.N_UNANSWERED
    assert train["n_skipped"] == tiny_material.N_UNANSWERED + tiny_material.N_TOO_LONG


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_budgets_agree(tiny: Tiny, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    run = LanguageModel.run

    def watched(decoder: LanguageModel, **inputs: Any) -> Any:
        passes.append(inputs["input_ids"].numel())
        return run(decoder, **inputs)

    monkeypatch.setattr(LanguageModel, "run", watched)
    # The passes of the run itself are counted.
    monkeypatch.setattr(ForwardPasses, "_checked_at_extremes", lambda passes, sequences, ids: sequences)
    estimators = ("act", "icl", "act_sq")
    small = forecast_tiny(tiny, architecture, estimators=estimators, batch_tokens=64, demo_draws=1)
    n_small, n_large = len(passes), sum(n_tokens > 64 for n_tokens in passes)
    assert n_large < n_small / 4  # prompts that are longer run alone
    passes.clear()
    large = forecast_tiny(tiny, architecture, estimators=estimators, batch_tokens=4096, demo_draws=1)
    assert max(passes) <= 4096
    assert len(passes) < n_small / 4

    # Where a firing is open, two batchings may decide it differently: those numbers may differ by that much.
    large.save(tmp_path)
    expected = oracle.expect(tmp_path, tiny.model, tiny.saes[architecture])
    assert [feature.index for feature in small.shifted_features] == [f.index for f in large.shifted_features]
    compared = list(oracle.pairs(expected.scores, small.to_dict(), large.to_dict()))
    differing = [
        path
        for path, bounds, one, other in compared
        if abs(one - other) > BATCHING_TOLERANCE * abs(other) + (bounds[oracle.HIGH] - bounds[oracle.LOW])
    ]
    assert len(compared) > TOP_N
    assert not differing


@pytest.mark.parametrize("dims", ["icl", "active", "tuned"])
def test_threads_change_no_byte(tiny: Tiny, dims: Any, tmp_path: Path) -> None:
    n_before = sts_fast.get_num_threads()
    tuned = tiny.tuned if dims == "tuned" else None
    try:
        for n in (1, 2, 3):
            sts_fast.set_num_threads(n)
            forecast_tiny(tiny, "topk", dims=dims, tuned=tuned).save(tmp_path / str(n))
    finally:
        sts_fast.set_num_threads(n_before)
    assert len({without_time((tmp_path / str(n) / "scores.json").read_text()) for n in (1, 2, 3)}) == 1
    for name in ("shift.safetensors", "prompts.parquet", "features.parquet"):
        assert len({(tmp_path / str(n) / name).read_bytes() for n in (1, 2, 3)}) == 1


def test_answers_are_read_whole_and_without_demonstrations(tiny: Tiny) -> None:
    """Those of the answered queries that fit, of each domain that has enough of them; the others are named."""
    spelling = [
        replace(example, answer=example.answer and example.answer + " Or not." * (i % 3))
        for i, example in enumerate(sts_fast.load_examples(tiny.domains["spelling"]))
    ]
    domains = {"spelling": spelling, "silent": [replace(example, answer=None) for example in spelling]}
    for name, n in (("few", 7), ("enough", 8)):
        answers = [example.answer if i < n else None for i, example in enumerate(spelling)]
        domains[name] = [replace(example, answer=answer) for example, answer in zip(spelling, answers, strict=True)]
    forecast = sts_fast.score(
        model=tiny.model,
        sae=tiny.saes["topk"],
        train=tiny.train,
        domains=domains,
        estimators=("act",),
        controls="all",
        shots=SHOTS,
        domain_shots=DOMAIN_SHOTS,
        top_n=TOP_N,
    )
    found = {domain.name: set(domain.controls) - CONTROLS for domain in forecast.domains}
    assert found == {"spelling": ANSWER_CONTROLS, "silent": set(), "few": set(), "enough": ANSWER_CONTROLS}
    assert "too few answers to measure the base model on silent, few" in forecast.warnings
    of_answers = [row for row in forecast.prompts.to_pylist() if row["stage"] == "answer"]
    assert Counter(row["domain"] for row in of_answers) == {
        "spelling": tiny_material.N_QUESTIONS,
        "enough": 8,
    }
    rows = [row for row in of_answers if row["domain"] == "spelling"]
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    answered = spelling[: tiny_material.N_QUESTIONS]
    assert [row["id"] for row in rows] == [example.id for example in answered]
    for row, example in zip(rows, answered, strict=True):
        assert tokenizer.decode([row["base_ids"][p] for p in row["positions"]]).strip() == example.answer
        assert row["positions"] == [*range(row["positions"][0], len(row["base_ids"]))]
        before = tokenizer.decode(row["base_ids"][: row["positions"][0]]).strip()
        assert before.endswith(f"Question: {example.question}\nAnswer:")
    n_tokens = [len(row["positions"]) for row in rows]
    assert len(set(n_tokens)) == 3
    loss = sum(row["answer_nll_sum"] for row in rows) / sum(n_tokens)
    assert forecast.domains[0].controls["base_loss"]["nll"] == pytest.approx(loss, rel=REPEATED_TOLERANCE)


def test_accuracy_is_the_share_of_answers_that_the_model_gives(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with a model that says one thing, whatever it is asked."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)

    class Parrot(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            says = tokenizer("Answer: It is green.").input_ids
            self.logits = torch.nn.Parameter(torch.zeros(len(tokenizer), len(tokenizer)))
            self.logits.data[says[:-1], says[1:]] = 1.0

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=self.logits[input_ids])

    monkeypatch.setattr(
        sys.modules["sts_fast.model.session"], "load_language_model", lambda source, **options: Parrot()
    )
    spelling = sts_fast.load_examples(tiny.domains["spelling"])
    domains = {
        str(n): [replace(e, answer="It is green." if i < n else "It is a river.") for i, e in enumerate(spelling)]
        for n in (0, 9, 100)
    }
    sources = {"model": tiny.model, "sae": tiny.saes["topk"], "train": tiny.train, "domains": domains}
    forecast = sts_fast.score(**sources, estimators=("act",), controls="all", shots=SHOTS, domain_shots=1, top_n=TOP_N)
    n_asked = tiny_material.N_QUESTIONS + tiny_material.N_UNANSWERED
    found = [domain.controls["base_accuracy"]["accuracy"] for domain in forecast.domains]
    assert found == pytest.approx([0, 9 / n_asked, 1])


@pytest.mark.parametrize(
    ("dims", "estimators"), [("icl", ("act", "icl", "act_sq")), ("active", ("icl",)), ("tuned", ("act_sq", "act"))]
)
def test_several_training_sets_forecast_like_each_alone(
    tiny: Tiny, dims: Any, estimators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same features, counts and intervals, and scores up to rounding; each domain goes through the model once."""
    trains = {"sums": tiny.train, "days": tiny.domains["days"], "spelling again": tiny.domains["spelling"]}
    demos = {"sums": tiny.domains["spelling"], "days": tiny.train}  # 'days' is both a training set and a domain
    options: dict[str, Any] = {
        "model": tiny.model,
        "sae": tiny.saes["topk"],
        "domains": tiny.domains,
        "tuned": tiny.tuned if dims == "tuned" else None,
        "dims": dims,
        "estimators": estimators,
        "controls": "all",
        "shots": SHOTS,
        "domain_shots": DOMAIN_SHOTS,
        "top_n": TOP_N,
    }
    sent: Counter[bytes] = Counter()
    launch = ForwardPasses.launch

    def watched(passes: ForwardPasses, sequences: Sequences, batch: list[int], *rows: Any) -> Any:
        sent.update(sequences.ids[index].tobytes() for index in batch if len(sequences.ids[index]))
        return launch(passes, sequences, batch, *rows)

    monkeypatch.setattr(ForwardPasses, "launch", watched)
    monkeypatch.setattr(ForwardPasses, "_choose", lambda passes, ids: setattr(passes, "strategy", "packed"))
    monkeypatch.setattr(ForwardPasses, "_checked_at_extremes", lambda passes, sequences, ids: sequences)
    together = compare(trains=trains, demos=demos, **options)
    assert list(together) == list(trains)
    expected: Counter[bytes] = Counter()
    for name, forecast in together.items():
        for row in forecast.prompts.to_pylist():
            if row["stage"] == "shift" or (row["stage"] == "score" and name == "sums"):
                # Up to the last token that is read, without and with demonstrations, or in the tuned model.
                base = row["base_ids"][: row["positions"][-1] + 1]
                other = row["demos_ids"][: row["paired_demos"][-1] + 1] if row["demos_ids"] else []
                if row["stage"] == "shift" and dims == "tuned":
                    other = base
                expected.update(np.asarray(ids, np.int32).tobytes() for ids in (base, other) if ids)
    assert sent == expected

    for name, train in trains.items():
        shown = {"days": demos["days"]} | ({"train": demos[name]} if name in demos else {})
        alone = sts_fast.score(train=train, demos=shown, **options)
        one, other = together[name].to_dict(), alone.to_dict()
        assert one["train"] == {**other["train"], "name": name}
        for document in (one, other):  # whether the SAE fits is measured on the first training set
            document["warnings"].remove(document["sae"].pop("fit")["warning"])
            document["warnings"] = [warning.replace(f"'{name}'", "'train'") for warning in document["warnings"]]
        for key in ("model", "sae", "settings", "shift", "shifted_features", "warnings"):
            assert one[key] == other[key], key
        for key, values in together[name].controls.items():
            np.testing.assert_array_equal(values, alone.controls[key])
        compared = list(oracle.deviations(as_numbers(other["domains"]), one["domains"]))
        assert max(deviation for _, deviation in compared) <= REPEATED_TOLERANCE
        read = ["stage", "id", "base_ids", "demos_ids", "positions", "paired", "paired_demos"]
        assert together[name].prompts.select(read).equals(alone.prompts.select(read))
        for column in (column for column in alone.prompts.column_names if column.endswith(("_sum", "_exact"))):
            sums = (np.asarray(table[column].to_pylist(), float) for table in (together[name].prompts, alone.prompts))
            np.testing.assert_allclose(*sums, rtol=REPEATED_TOLERANCE, err_msg=column)
        assert together[name].firings.equals(alone.firings)
    if dims == "icl":
        days = [row for row in together["days"].prompts.to_pylist() if row["domain"] == "days"]
        stages = {stage: [row for row in days if row["stage"] == stage] for stage in ("shift", "score")}
        assert all(len(row["demos_ids"]) > len(row["base_ids"]) for rows in stages.values() for row in rows)
        assert [row["base_ids"] for row in stages["shift"]] == [row["base_ids"] for row in stages["score"]]


def test_eight_training_sets_and_twenty_domains_send_each_set_once(tiny: Tiny) -> None:
    examples = [
        example
        for path in (tiny.train, *tiny.domains.values())
        for example in sts_fast.load_examples(path)[: tiny_material.N_QUESTIONS]
    ]
    sets = {f"set {i}": [examples[(7 * i + j) % len(examples)] for j in range(9)] for i in range(28)}
    trains, domains = dict(list(sets.items())[:8]), dict(list(sets.items())[8:])
    options: dict[str, Any] = {"model": tiny.model, "sae": tiny.saes["topk"], "shots": 1, "domain_shots": 1, "top_n": 5}

    def n_tokens(forecast: sts_fast.Forecast) -> int:
        return int(forecast.provenance["forward_passes"]["n_tokens"])

    together = compare(trains=trains, domains=domains, **options)
    shifts = [n_tokens(sts_fast.score(train=train, domains={}, **options)) for train in trains.values()]
    one = n_tokens(sts_fast.score(train=trains["set 0"], domains=domains, **options))
    assert {n_tokens(forecast) for forecast in together.values()} == {sum(shifts) + one - shifts[0]}


def test_controls_that_cannot_be_had_are_refused_before_any_pass(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    monkeypatch.setattr(LanguageModel, "run", None)
    spelling = sts_fast.load_examples(tiny.domains["spelling"])
    answers = [example.answer if i < 7 else None for i, example in enumerate(spelling)]
    few = [replace(example, answer=answer) for example, answer in zip(spelling, answers, strict=True)]
    unheaded = {"model": AutoModel.from_pretrained(tiny.model), "tokenizer": AutoTokenizer.from_pretrained(tiny.model)}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"domains": {"spelling": few}, "tokens": "answer"}, r"'spelling' keeps 7 prompts.*use --tokens query"),
        (unheaded, "need its head.*--controls features"),
        ({"trains": {}}, "no training set"),
    ]
    for change, message in refused:
        options = {"model": tiny.model, "trains": {"sums": tiny.train}, "domains": tiny.domains, **change}
        with pytest.raises(sts_fast.InputError, match=message):
            compare(
                sae=tiny.saes["topk"],
                estimators=("act",),
                controls="all",
                shots=SHOTS,
                domain_shots=DOMAIN_SHOTS,
                top_n=TOP_N,
                **options,
            )


def as_numbers(document: Any) -> Any:
    """A document in the oracle's form: each number as [low, value, high]."""
    if isinstance(document, dict):
        return {key: as_numbers(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [as_numbers(value) for value in document]
    return number(document) if isinstance(document, float) else document


@pytest.mark.parametrize("options", [{"seed": 1}, {"limit": 12}, {"limit": 12, "seed": 1}], ids=str)
def test_seed_and_limit_choose_the_prompts(
    tiny: Tiny, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    forecast = forecast_tiny(tiny, "jumprelu", **options)
    forecast.save(tmp_path)
    assert forecast.train["n_prompts"] == options.get("limit", forecast.train["n_prompts"])
    assert_as_expected(tmp_path, oracle.expect(tmp_path, tiny.model, tiny.saes["jumprelu"]), request)


def test_a_shift_is_a_forecast_without_domains(tiny: Tiny) -> None:
    options: Any = {"shots": 1, "top_n": 12, "limit": 8}
    shifted = sts_fast.shift(model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, **options)
    scored = sts_fast.score(
        model=tiny.model, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, domain_shots=1, **options
    )
    assert shifted.domains == []
    assert shifted.settings["estimators"] == ["act"]
    assert shifted.shifted_features == scored.shifted_features


def test_a_model_in_memory_forecasts_like_its_folder(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    in_memory = sts_fast.score(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(tiny.model),
        sae=sts_fast.load_sae(tiny.saes["gated"]),
        train=sts_fast.load_examples(tiny.train),
        domains={name: sts_fast.load_examples(path) for name, path in tiny.domains.items()},
        shots=SHOTS,
        domain_shots=DOMAIN_SHOTS,
        top_n=TOP_N,
    )
    from_folder = forecast_tiny(tiny, "gated")
    assert in_memory.domains == from_folder.domains
    assert in_memory.shifted_features == from_folder.shifted_features


def test_the_last_layer_is_read_before_the_final_norm(tiny: Tiny, tmp_path: Path) -> None:
    """A model cut off after the layer must give what the whole model gives there, be it the last one or not."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    model.model.layers = model.model.layers[: tiny_material.LAYER + 1]
    model.config.num_hidden_layers = tiny_material.LAYER + 1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path)
    cut = forecast_tiny(replace(tiny, model=tmp_path), "standard")
    whole = forecast_tiny(tiny, "standard")
    assert cut.domains == whole.domains


# --- from the files alone ---


@pytest.mark.parametrize(("dims", "estimators", "tokens"), READINGS)
def test_every_number_follows_from_the_files(
    tiny: Tiny, dims: Any, estimators: Any, tokens: Any, tmp_path: Path
) -> None:
    tuned = tiny.tuned if dims == "tuned" else None
    forecast_tiny(
        tiny, "topk", dims=dims, estimators=estimators, tokens=tokens, tuned=tuned, seed=3, controls="all"
    ).save(tmp_path)
    scores = written(tmp_path)
    again = recomputed(tmp_path)
    elsewhere = {"n_skipped", "n_too_long", "n_unanswered", "demonstrations", "change", "change_interval"}
    assert set(again["domains"][0]) | elsewhere == set(scores["domains"][0])
    assert again["domains"][0]["controls"].keys() == scores["domains"][0]["controls"].keys()
    assert set(again["shift"]) == set(scores["shift"])
    assert set(again["shifted_features"][0]) | EXPLANATIONS == set(scores["shifted_features"][0])
    for counts in (scores["train"], *scores["domains"]):
        assert counts["n_skipped"] == counts["n_too_long"] + counts["n_unanswered"]
    assert max(deviation for _, deviation in oracle.deviations(again, scores)) <= REPEATED_TOLERANCE


def recomputed(run: Path) -> dict[str, Any]:
    """What scores.json says, less settings and provenance, from its two companions, its settings and its seed."""
    settings, seed = written(run)["settings"], written(run)["provenance"]["seed"]
    table = pq.read_table(run / "prompts.parquet").to_pylist()
    with safe_open(run / "shift.safetensors", framework="np") as file:
        sums, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    counts, top_n = json.loads(metadata["sts_fast"]), settings["top_n"]
    n_tokens, n_pairs = int(counts["n_tokens"]), int(counts["n_pairs"])
    activation, fired, importance, replicates = (
        sums[name] for name in ("activation", "n_fired", "importance", "replicates")
    )

    def top(ranked_by: Any) -> list[int]:
        return sorted(range(len(ranked_by)), key=lambda j: (-ranked_by[j], j))[:top_n]

    members = top(importance)
    assert members == sums["shifted_features"].tolist()
    kept = [len(set(top(one)) & set(members)) / top_n for one in replicates.T]
    rows = [row for row in table if row["stage"] == "shift"]
    assert n_tokens == sum(len(row["positions"]) for row in rows)
    assert n_pairs == sum(len(row["paired"]) for row in rows)
    domains = []
    names = dict.fromkeys(row["domain"] for row in table if row["stage"] == "score")
    activations = sums["domain_mean_activations"]
    means, covariances = sums["domain_projected_means"], sums["domain_projected_covariances"]
    pooled = np.mean([sums["projected_covariance"], *covariances], axis=0)
    pooled += 1e-3 * np.trace(pooled) / len(pooled) * np.eye(len(pooled))
    direction = np.linalg.solve(pooled, sums["projected_mean"] - means.mean(axis=0))
    middle = (sums["projected_mean"] + means.mean(axis=0)) / 2
    for i, (name, mean_residual) in enumerate(zip(names, sums["domain_mean_residuals"], strict=True)):
        of_domain = [row for row in table if row["stage"] != "shift" and row["domain"] == name]
        domains.append(recomputed_domain(name, of_domain, settings, seed, sums))
        of_scores = [row for row in of_domain if row["stage"] == "score"]
        domains[-1]["controls"]["raw"] = {
            estimator: number(sums[f"domain_{of}"][i][sums["raw_dimensions"]].sum() / sum(map(n_terms, of_scores)))
            for estimator, of, n_terms in (
                ("act", "abs_base", lambda row: len(row["positions"])),
                ("icl", "sq_shift", lambda row: len(row["paired"])),
                ("act_sq", "sq_base", lambda row: len(row["positions"]) * len(sums["raw_dimensions"])),
            )
            if estimator in settings["estimators"]
        }
        asked = tuple(row["question"] for row in of_domain if row["stage"] == "score")
        trained = tuple(row["question"] for row in rows)
        words = [word for question in asked for word in question.split()]
        domains[-1]["controls"] |= {
            "text_similarity": {"cosine": number(text.similarity(trained, asked))},
            "text_compression": {"saved": number(text.saved_bytes(trained, asked))},
            "text_length": {"words": number(len(words) / len(asked))},
            "text_digits": {"share": number(np.mean([any(map(str.isdecimal, word)) for word in words]))},
        }
        a, b = sums["mean_residual"], mean_residual
        cosine = np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
        a, b = sums["projected_covariance"], covariances[i]
        alike = np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))
        spread = activations.std(axis=0)
        varies = spread > 1e-5 * np.abs(activations).max(axis=0)
        z = ((activations[i] - activations.mean(axis=0))[varies] / spread[varies]).sum()
        domains[-1]["controls"] |= {
            "cosine_of_means": {"cosine": number(cosine)},
            "z_scored": {"act": number(z)} if "act" in settings["estimators"] and len(activations) > 2 else {},
            "cka": {"cka": number(alike)},
            "probe": {"logit": number(direction @ (means[i] - middle))},
        }
    return {
        "sae": {"mean_l0": number(fired.sum() / n_tokens)},
        "train": {"name": "train", **oracle.counts_of(rows)},
        "shift": {
            "share_of_top_n": number(importance[members].sum() / importance.sum()),
            "n_features_shifted": int((importance > 0).sum()),
            "concentration": [
                {"n": int(one["n"]), "share": number(one["share"][oracle.VALUE])}
                for one in oracle.concentration(np.stack([importance] * 3))
            ],
            "stability": {
                "n_replicates": replicates.shape[1],
                "mean_overlap": number(np.mean(kept)),
                "overlap_ci": [number(oracle.percentile(kept, q)) for q in oracle.percentages(settings)],
            },
        },
        "settled": {"shifted_features": {"kept": number(np.mean(kept))}},
        "length": {
            name: recomputed_length([[row for row in table if row["domain"] == domain] for domain in names], name)
            for name in settings["estimators"]
        },
        "shifted_features": [
            {
                "index": j,
                "mean_squared_shift": None if settings["dims"] == "active" else number(importance[j]),
                "mean_activation": number(activation[j]),
                "share": number(importance[j] / importance.sum()),
            }
            for j in members
        ],
        "domains": domains,
    }


def recomputed_length(tables: list[list[dict[str, Any]]], estimator: str) -> dict[str, Any]:
    """By least squares over the prompts of all domains: one intercept, and a slope for each domain."""
    rows = [[row for row in table if row["stage"] == "score"] for table in tables]
    tokens = "paired" if estimator == "icl" else "positions"
    lengths = [np.asarray([len(row[tokens]) for row in of_domain], float) for of_domain in rows]
    sums = [np.asarray([row[f"{estimator}_sum"] for row in of_domain]) for of_domain in rows]
    X = np.zeros((sum(map(len, rows)), 1 + len(rows)))
    X[:, 0] = 1
    at = 0
    for i, of_domain in enumerate(lengths):
        X[at : at + len(of_domain), 1 + i] = of_domain
        at += len(of_domain)
    S = np.concatenate(sums)
    share = np.linalg.lstsq(X, S, rcond=None)[0][0] * len(S) / S.sum() if np.linalg.matrix_rank(X) > len(rows) else None
    if len(rows) < 3:
        return {"constant_share": share and number(share), "r_inverse_length": None}
    scores = [of.sum() / n.sum() for of, n in zip(sums, lengths, strict=True)]
    r = np.corrcoef(scores, [1 / n.mean() for n in lengths])[0, 1]
    return {"constant_share": share and number(share), "r_inverse_length": number(r)}


def recomputed_domain(
    name: str, all_rows: list[dict[str, Any]], settings: dict[str, Any], seed: int, saved: dict[str, Any]
) -> dict[str, Any]:
    rows = [row for row in all_rows if row["stage"] == "score"]
    answers = [row for row in all_rows if row["stage"] == "answer"]
    n = len(rows)
    draws = oracle.drawn_anew([0] * n, seed, name, settings["n_bootstrap"])
    sizes = {
        "": settings["top_n"],
        "random": saved["random_features"].shape[1],
        "low_shift": len(saved["low_shift_features"]),
        "most_active": len(saved["most_active_features"]),
    }
    controls: dict[str, dict[str, Any]] = {control: {} for control in sizes if control}
    entry: dict[str, Any] = {"name": name, "scores": {}, **oracle.counts_of(rows), "controls": controls}
    n_read = np.asarray([float(len(row["positions"])) for row in rows])
    n_pairs = np.asarray([float(len(row["paired"])) for row in rows])
    for estimator, (control, size) in itertools.product(("act", "icl", "act_sq"), sizes.items()):
        column = f"{control}_{estimator}_sum".removeprefix("_")
        if estimator not in settings["estimators"]:
            assert all(row[column] is None for row in rows)
            continue
        numerator = np.asarray([row[column] for row in rows])
        denominator = {"act": n_read, "icl": n_pairs, "act_sq": n_read * max(size, 1)}[estimator]
        ratio = number(numerator.sum() / denominator.sum())
        if control:
            controls[control][estimator] = ratio
        else:
            numerators = np.stack([numerator] * 3)
            bounds = oracle.interval(numerators, denominator, draws, oracle.percentages(settings))
            if estimator == "icl":
                of_draws = [row["draw"] for row in rows]
                bounds = oracle.widened(bounds, numerators, denominator, of_draws, settings["confidence"])
            entry["scores"][estimator] = {"value": ratio, "ci": bounds}
    if answers:
        n_tokens = sum(len(row["positions"]) for row in answers)
        controls["base_loss"] = {"nll": number(sum(row["answer_nll_sum"] for row in answers) / n_tokens)}
        controls["base_accuracy"] = {"accuracy": number(np.mean([row["answer_exact"] for row in answers]))}
    return entry


def number(value: float) -> Any:
    return np.full(3, value)


# --- the command line ---


def run_cli(*arguments: str | Path) -> str:
    """Standard output of `sts-fast score`."""
    ran = subprocess.run(
        [sys.executable, "-m", "sts_fast", "score", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_command_line_writes_what_python_does(tiny: Tiny, tmp_path: Path) -> None:
    domains = itertools.chain(*(("--domains", f"{name}={path}") for name, path in tiny.domains.items()))
    sizes = ("--shots", str(SHOTS), "--domain-shots", str(DOMAIN_SHOTS), "--top-n", str(TOP_N))
    sources = ("--model", tiny.model, "--sae", tiny.saes["jumprelu"], "--train", tiny.train, *domains)
    printed = run_cli(*sources, *sizes, "--output", tmp_path / "cli", "--threads", "1", "--json")
    text = (tmp_path / "cli" / "scores.json").read_text(encoding="utf-8")
    assert printed == text
    command = json.loads(text)["provenance"]["command"]
    assert command.startswith("sts-fast score --model ")
    assert "--output" not in command
    assert "--threads" not in command
    forecast_tiny(tiny, "jumprelu", command=command).save(tmp_path / "api")
    assert without_time((tmp_path / "api" / "scores.json").read_text(encoding="utf-8")) == without_time(text)


# --- real material ---


@dataclass(frozen=True)
class Real:
    """stories260K, mathematics to train on, and seven domains with one short demonstration each."""

    model: Path
    train: Path
    domains: dict[str, Path]
    demos: dict[str, Path]

    def sae(self, architecture: str) -> Path:
        return ASSETS / "saes" / f"saelens_v6_stories260K_L2_{architecture}"

    def arguments(self, architecture: str) -> Iterator[str | Path]:
        yield from ("--model", self.model, "--sae", self.sae(architecture), "--train", self.train)
        for option, sources in (("--domains", self.domains), ("--demos", self.demos)):
            for name, path in sources.items():
                yield from (option, f"{name}={path}")
        yield from ("--estimators", "act,icl,act_sq", "--controls", "all")
        yield from ("--shots", "1", "--domain-shots", "1", "--limit", str(REAL_LIMIT))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    rows = pq.read_table(ASSETS / "data" / "mmlu_pro" / "test-00000-of-00001.parquet").to_pylist()
    worked = [
        json.loads(line)
        for line in (ASSETS / "data" / "mmlu_pro" / "validation_cot70.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    domains, demos = {}, {}
    for category in CATEGORIES:
        domains[category], demos[category] = folder / f"{category}.jsonl", folder / f"{category}-demos.jsonl"
        write_rows(domains[category], [row for row in rows if row["category"] == category])
        # The context is 512 tokens: the shortest chain of thought, its question and options included.
        shortest = min(
            (row for row in worked if row["category"] == category),
            key=lambda row: len(" ".join([row["question"], *row["options"], row["cot_content"]])),
        )
        write_rows(demos[category], [shortest])
    # A question and its long answer; with its abstract it would overrun the context.
    pubmed = json.loads((ASSETS / "data" / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    domains["pubmedqa"] = folder / "pubmedqa.json"
    short = {key: {name: row[name] for name in ("QUESTION", "LONG_ANSWER")} for key, row in pubmed.items()}
    domains["pubmedqa"].write_text(json.dumps(short), encoding="utf-8")
    return Real(ASSETS / "models" / "stories260K", ASSETS / "data" / "gsm8k" / "train.jsonl", domains, demos)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def real_run(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> folder of a run through Python, made when it is first asked for."""

    @cache
    def run(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp("real-run")
        sts_fast.score(
            model=real.model,
            sae=real.sae(architecture),
            train=real.train,
            domains=real.domains,
            demos=real.demos,
            estimators=("act", "icl", "act_sq"),
            shots=1,
            domain_shots=1,
            limit=REAL_LIMIT,
            controls="all",
        ).save(folder)
        return folder

    return run


@needs_assets
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_real_forecast_equals_the_oracle(
    real: Real, real_run: Callable[[str], Path], architecture: str, request: pytest.FixtureRequest
) -> None:
    run = real_run(architecture)
    assert [domain["name"] for domain in written(run)["domains"]] == [*CATEGORIES, "pubmedqa"]
    assert all(domain["n_prompts"] == REAL_LIMIT for domain in written(run)["domains"])
    assert_as_expected(run, oracle.expect(run, real.model, real.sae(architecture)), request)


@needs_assets
def test_real_forecast_from_the_command_line_is_the_same(
    real: Real, real_run: Callable[[str], Path], tmp_path: Path
) -> None:
    """A second run, in a process of its own and with another number of threads, gives the same bytes."""
    architecture = "topk"  # whose largest values are the most sensitive to rounding
    run_cli(*real.arguments(architecture), "--threads", "1", "--output", tmp_path)
    text, command = without_command((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert command.startswith("sts-fast score --model ")
    assert (text, None) == without_command((real_run(architecture) / "scores.json").read_text(encoding="utf-8"))
    for name in ("shift.safetensors", "prompts.parquet", "features.parquet"):
        assert (tmp_path / name).read_bytes() == (real_run(architecture) / name).read_bytes()


def without_command(scores: str) -> tuple[str, Any]:
    """The text of scores.json without time and command, and the command."""
    lines = without_time(scores).splitlines()
    return "\n".join(line for line in lines if '"command":' not in line), json.loads(scores)["provenance"]["command"]


@needs_assets
def test_real_prompts_are_sent_word_for_word(real: Real, real_run: Callable[[str], Path]) -> None:
    table = pq.read_table(real_run("topk") / "prompts.parquet").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(real.model)
    asked = [json.loads(line) for line in real.train.read_text(encoding="utf-8").splitlines()]
    draws = written(real_run("topk"))["train"]["demonstrations"]
    n = len(asked)
    for k, (first,) in enumerate(draws):  # one shot each; rows count from 1, and long ones are passed over
        assert k * n // 5 < int(first) <= k * n // 5 + 5
    rows = [row for row in table if row["stage"] == "shift"]
    assert len(rows) == REAL_LIMIT
    for row in rows:
        (shown,) = (asked[int(id) - 1] for id in draws[row["draw"]])
        demo = f"Question: {shown['question']}\nAnswer: {shown['answer']}\n\n"
        prompt = f"Question: {asked[int(row['id']) - 1]['question']}\nAnswer:"
        assert row["base_ids"] == tokenizer(prompt).input_ids
        assert row["demos_ids"] == tokenizer(demo + prompt).input_ids
        assert row["base_ids"].count(tokenizer.bos_token_id) == row["demos_ids"].count(tokenizer.bos_token_id) == 1

    def with_options(row: dict[str, Any]) -> str:
        options = (f"{letter}. {option.strip()}" for letter, option in zip("ABCDEFGHIJ", row["options"], strict=False))
        return ("\n".join([row["question"].strip(), *options])).strip()

    worked = json.loads(real.demos["physics"].read_text(encoding="utf-8"))
    chain_of_thought = worked["cot_content"].removeprefix("A: ")
    demo = f"Question: {with_options(worked)}\nAnswer: {chain_of_thought}\n\n"
    asked = [json.loads(line) for line in real.domains["physics"].read_text(encoding="utf-8").splitlines()]
    by_id = {str(row["question_id"]): row for row in asked}
    rows = [row for row in table if row["stage"] == "score" and row["domain"] == "physics"]
    assert len(rows) == REAL_LIMIT
    for row in rows:
        prompt = f"Question: {with_options(by_id[row['id']])}\nAnswer:"
        assert row["base_ids"] == tokenizer(prompt).input_ids
        assert row["demos_ids"] == tokenizer(demo + prompt).input_ids

    rows = [row for row in table if row["stage"] == "answer" and row["domain"] == "physics"]
    assert len(rows) == REAL_LIMIT
    for row in rows:
        of_answer = row["base_ids"][row["positions"][0] :]
        asked_for = f"Question: {with_options(by_id[row['id']])}\nAnswer:"
        n_asked = len(tokenizer(asked_for).input_ids)
        assert row["base_ids"][:n_asked] == tokenizer(asked_for).input_ids
        assert not tokenizer.decode(row["base_ids"][n_asked : row["positions"][0]]).strip()
        assert tokenizer.decode(of_answer) == by_id[row["id"]]["answer"]


def test_a_single_path_stands_for_a_list_of_one(tiny: Tiny) -> None:
    path, options = str(tiny.domains["spelling"]), {"model": tiny.model, "train": tiny.train, "top_n": TOP_N}
    one, listed = (
        sts_fast.score(sae=tiny.saes["topk"], domains=domains, demos=demos, estimators=("act",), **options)
        for domains, demos in ((path, f"train={path}"), ([path], [f"train={path}"]))
    )
    assert [domain.name for domain in one.domains] == [Path(path).stem]
    assert one.to_dict()["domains"] == listed.to_dict()["domains"]


# --- several SAEs in one pass: always runs ---


def at(tiny: Tiny, architecture: str, hook: str) -> sts_fast.SAE:
    return sts_fast.load_sae(tiny.saes[architecture], hook=hook)


def test_several_saes_forecast_like_each_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one place, two of others: every number is that of each alone, and every prompt is sent once for all."""
    places = [("topk", "blocks.2.hook_resid_post"), ("gated", "blocks.2.hook_resid_post")]
    places += [("standard", "blocks.1.hook_mlp_out"), ("jumprelu", "layers.3.input")]
    saes = [at(tiny, *place) for place in places]
    options: dict[str, Any] = {
        **{"model": tiny.model, "domains": tiny.domains, "estimators": ("act", "icl")},
        **{"shots": SHOTS, "domain_shots": DOMAIN_SHOTS, "top_n": TOP_N},
    }
    runs: list[tuple[int, ...]] = []
    run = LanguageModel.run

    def watched(decoder: LanguageModel, **inputs: Any) -> Any:
        runs.append(tuple(inputs["input_ids"].shape))
        return run(decoder, **inputs)

    monkeypatch.setattr(LanguageModel, "run", watched)
    alone = [sts_fast.score(train=tiny.train, sae=sae, **options) for sae in saes]
    n_alone = len(runs)
    runs.clear()
    said: list[str] = []
    together = sts_fast.score(train=tiny.train, sae=saes, say=said.append, **options)
    assert len(runs) * len(saes) == n_alone
    for about in ("of the top", "by STS_act", "by STS_icl"):
        who = [line.partition(":")[0] for line in said if about in line]
        assert who == [f"train with {Path(tiny.saes[architecture]).name}" for architecture, _ in places]
    for one, other, (_, hook) in zip(together, alone, places, strict=True):
        assert one.sae["hook_name"] == hook
        deviations = oracle.deviations(as_numbers(other.to_dict()["domains"]), one.to_dict()["domains"])
        assert max(deviation for _, deviation in deviations) <= BATCHING_TOLERANCE
        assert [feature.index for feature in one.shifted_features] == [f.index for f in other.shifted_features]
        assert one.model == other.model
    both = compare(trains={"a": tiny.train, "b": tiny.domains["days"]}, sae=saes[:2], **options)
    assert [list(forecasts) for forecasts in both] == [["a", "b"]] * 2
    assert [forecasts["a"].to_dict()["domains"] for forecasts in both] == [
        forecast.to_dict()["domains"] for forecast in together[:2]
    ]


@pytest.mark.parametrize(
    ("hook", "module", "side"),
    [
        ("blocks.1.hook_resid_mid", "layers.1.post_attention_layernorm", "input"),
        ("blocks.1.attn.hook_z", "layers.1.self_attn.o_proj", "input"),
        ("model.layers.1.mlp", "layers.1.mlp", "output"),
    ],
)
def test_a_place_inside_a_layer_gives_the_sums_of_its_own_rows(
    tiny: Tiny, hook: str, module: str, side: str, tmp_path: Path
) -> None:
    """From the prompts in the files, with hooks of torch's own, features in float64."""
    from transformers import AutoModel

    sae = at(tiny, "standard", hook)
    forecast = sts_fast.score(
        model=tiny.model, sae=sae, train=tiny.train, domains=tiny.domains, estimators=("act",), shots=SHOTS,
        domain_shots=DOMAIN_SHOTS, top_n=TOP_N,
    )  # fmt: skip
    assert (forecast.model["module"], forecast.model["side"], forecast.model["layer"]) == (module, side, 1)
    model = AutoModel.from_pretrained(tiny.model).eval()
    seen: list[torch.Tensor] = []
    watched = model.get_submodule(module)
    if side == "input":
        watched.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    else:
        watched.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    total, n_tokens = 0.0, 0
    W_enc, b_enc, b_dec = (torch.as_tensor(value).double() for value in (sae.W_enc, sae.b_enc, sae.b_dec))
    top = [feature.index for feature in forecast.shifted_features]
    for row in forecast.prompts.to_pylist():
        if row["domain"] == "days":
            with torch.no_grad():
                model(torch.tensor([row["base_ids"]]))
            x = seen.pop()[row["positions"]].double() - b_dec
            total += float(torch.relu(x @ W_enc[:, top] + b_enc[top]).sum())
            n_tokens += len(x)
    [days] = [domain for domain in forecast.domains if domain.name == "days"]
    assert days.scores["act"].value == pytest.approx(total / n_tokens, rel=TOLERANCE)


def test_saes_that_cannot_share_a_pass(tiny: Tiny) -> None:
    options: dict[str, Any] = {"model": tiny.model, "train": tiny.train, "domains": {}, "top_n": TOP_N}
    sae = sts_fast.load_sae(tiny.saes["topk"])
    refused = [
        ([], "there is no SAE to read the model with"),
        (at(tiny, "topk", "model.layers.2.mlp.gate_proj"), "reads 64 dimensions, but .* has 128 at model.layers.2.mlp"),
        (at(tiny, "topk", "blocks.7.hook_mlp_out"), "has layers 0 to 4, but layer 7 is to be read"),
        (replace(sae, hook_name=""), "does not say which layer it reads: give --layer, or --hook"),
    ]
    for saes, message in refused:
        with pytest.raises(sts_fast.InputError, match=message):
            sts_fast.score(sae=saes, **options)


def test_a_tuned_model_from_files_joins_the_one_in_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever that is, and whatever device would be taken by itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    options: dict[str, Any] = {"sae": tiny.saes["standard"], "train": tiny.train, "domains": {}, "top_n": TOP_N}
    forecast = sts_fast.score(model=model, tokenizer=tokenizer, tuned=tiny.tuned, dims="tuned", **options)
    assert forecast.means.n_pairs > 0


def test_a_hook_may_be_given_by_name(tiny: Tiny) -> None:
    by_layer, by_name = (
        forecast_tiny(tiny, "standard", **where) for where in ({"layer": 0}, {"hook": "blocks.0.hook_resid_post"})
    )
    assert by_name.model["layer"] == by_layer.model["layer"] == 0
    assert by_name.domains == by_layer.domains
    assert by_name.domains != forecast_tiny(tiny, "standard").domains
    with pytest.raises(InputError, match="--layer and --hook say the same thing"):
        forecast_tiny(tiny, "standard", layer=0, hook="blocks.0.hook_resid_post")
