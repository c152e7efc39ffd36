"""Forecasts from rollouts: against those of the same demonstrations, and against dense features of the tokens read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pyarrow.parquet as pq
import pytest
import torch
from tiny import LAYER, Tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import sts_fast
from sts_fast.data.examples import Example, load_examples
from sts_fast.data.template import PromptTemplate
from sts_fast.data.turns import Turn
from sts_fast.errors import InputError
from sts_fast.forecast.run import Forecast, validate_scores
from sts_fast.report import build_report
from sts_fast.rollouts import WAYS, Columns, Rollout, Rollouts, load_rollouts
from sts_fast.rollouts.prompts import Rendering, read_completions, verified_demos, with_endings

TOP_N, SHOTS = 20, 2
WORDS = ["apple", "river", "stone", "cloud", "table", "green"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>assistant\n{% endif %}"
)


def rows_of(tiny: Tiny, n: int = 12) -> list[dict[str, Any]]:
    """Four completions for each of n prompts; the second prompt is settled, the third has one that is empty."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"Question: {example.question}\nAnswer:", "completion": f" {' '.join(rng.sample(WORDS, 3))}.",
         "reward": rng.choice([0, 0.2, 1])}
        for example in load_examples(tiny.train)[:n]
        for _ in range(4)
    ]  # fmt: skip
    for row in rows[4:8]:
        row["reward"] = 1
    rows[8]["completion"] = " "
    return rows


@pytest.fixture(scope="module")
def path(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(tiny)))
    return path


def forecasts_of(tiny: Tiny, rollouts: Any, **options: Any) -> dict[str, Forecast]:
    chosen = {"top_n": TOP_N, "domain_shots": 1, "limit": 10, "shots": SHOTS, **options}
    return sts_fast.rollouts(
        model=tiny.model, sae=tiny.saes["topk"], rollouts=rollouts, domains={**tiny.domains}, **chosen
    )


@pytest.fixture(scope="module")
def forecasts(tiny: Tiny, path: Path) -> dict[str, Forecast]:
    return forecasts_of(
        tiny, path, tuned=tiny.tuned, estimators=("act", "icl", "ntk", "step"), controls="all", limit=256
    )


def test_each_way_gives_a_whole_forecast(tiny: Tiny, forecasts: dict[str, Forecast], tmp_path: Path) -> None:
    assert [*forecasts] == [*WAYS, "tuned"]
    tops = {way: {f.index for f in forecast.shifted_features} for way, forecast in forecasts.items()}
    for way, forecast in forecasts.items():
        scores = forecast.to_dict()
        validate_scores(scores)
        assert scores["settings"]["dims"] == way == scores["train"]["name"]
        assert len(tops[way]) == TOP_N
        assert {domain["name"] for domain in scores["domains"]} == {"spelling", "days"}
        for domain in scores["domains"]:
            low, high = domain["scores"]["act"]["ci"]
            assert low <= domain["scores"]["act"]["value"] <= high
            assert {"random", "low_shift", "most_active", "raw", "cosine_of_means", "base_loss"} <= {
                *domain["controls"]
            }
        block = scores["rollouts"]
        assert (block["n_completions"], block["n_groups"], block["n_settled"]) == (48, 12, 1)
        assert block["n_empty"] == 1
        assert block["n_groups_read"] == 11
        assert block["n_completions_read"] == 43
        for other, overlap in block["overlaps"].items():
            if other != "most_active":
                assert overlap == len(tops[way] & tops[other]) / TOP_N
        assert {*block["overlaps"]} == {*tops, "most_active"} - {way}
        # Signed forecasts do not depend on D_N.
        assert scores["signed"] == forecasts["verified"].to_dict()["signed"]
        for domain, other in zip(forecast.domains, forecasts["verified"].domains, strict=True):
            assert domain.scores["ntk"] == other.scores["ntk"]
        forecast.save(tmp_path / way)
        page = build_report(tmp_path / way).read_text(encoding="utf-8")
        assert "48 completions of 12 prompts" in page
        assert "Reinforcement learning of" in page
        assert "empty completions (1), prompts whose completions all have the same reward (1)" in page
    # Other commands read these runs as they do those of score.
    shared = sts_fast.overlap(tmp_path / "verified", [tmp_path / way for way in WAYS]).found
    assert [one.share for one in shared if one.features == "shifted"] == [
        len(tops["verified"] & tops[way]) / TOP_N for way in WAYS
    ]
    ablated = sts_fast.ablate(tmp_path / "gradient", train=tiny.train, domains=tiny.domains, n_draws=1).to_dict()
    assert set(ablated["features"]["top"][0]) == tops["gradient"]
    days = {domain.name: domain for domain in forecasts["step"].domains}["days"]
    assert "ntk" in days.scores


def test_scores_are_those_of_d_n_on_the_domains_tokens(
    tiny: Tiny, forecasts: dict[str, Forecast], tmp_path: Path
) -> None:
    for way in ("correlation", "gradient", "step"):
        forecast = forecasts[way]
        top = [feature.index for feature in forecast.shifted_features]
        for domain in forecast.domains:
            total, n = 0.0, 0
            for row in forecast.prompts.to_pylist():
                if row["domain"] == domain.name and row["stage"] == "score":
                    x = oracle.residual(tiny.model, LAYER, tuple(row["base_ids"]), torch.float32)[row["positions"]]
                    total += float(oracle.literal_encode(tiny.saes["topk"], x)[oracle.VALUE][:, top].sum())
                    n += len(x)
            assert domain.scores["act"].value == pytest.approx(total / n, rel=1e-4)
        # Which completion got which advantage can be read from the file.
        forecast.save(tmp_path)
        shift = [row for row in pq.read_table(tmp_path / "prompts.parquet").to_pylist() if row["stage"] == "shift"]
        assert len(shift) == 43
        assert all(row["advantage"] is not None for row in shift)


def test_runs_of_every_way_are_taken_by_overlap_and_ablate(
    tiny: Tiny, forecasts: dict[str, Forecast], tmp_path: Path
) -> None:
    tops = {way: {f.index for f in forecast.shifted_features} for way, forecast in forecasts.items()}
    for way, forecast in forecasts.items():
        forecast.save(tmp_path / way)
    found = sts_fast.overlap(tmp_path / "tuned", [tmp_path / way for way in WAYS]).found
    shares = {Path(one.run).name: one.share for one in found if one.features == "shifted"}
    assert shares == {way: len(tops[way] & tops["tuned"]) / TOP_N for way in WAYS}
    document = sts_fast.ablate(
        tmp_path / "correlation", train=tiny.train, domains={**tiny.domains}, top_n=3, n_draws=1
    ).to_dict()
    importance = forecasts["correlation"].means.importance
    [least] = document["features"]["low_shift"]
    fires = np.flatnonzero(forecasts["correlation"].means.n_fired)
    others = np.sort(importance[np.setdiff1d(fires, document["features"]["top"][0])])
    assert (importance[least] <= others[4 * 3 - 1]).all()


def test_verified_and_tuned_are_the_forecasts_of_the_same_prompts(
    tiny: Tiny, path: Path, forecasts: dict[str, Forecast]
) -> None:
    rollouts, rendering = load_rollouts(path), Rendering(PromptTemplate(AutoTokenizer.from_pretrained(tiny.model)))
    best: dict[str, tuple[float, str]] = {}
    for row in rollouts.rows:
        question = str(row.prompt).removeprefix("Question: ").removesuffix("\nAnswer:")
        if row.reward > best.get(question, (-1.0, ""))[0]:
            best[question] = row.reward, row.completion
    verified = [(question, answer) for question, (reward, answer) in best.items() if reward >= 0.5]
    asked = [Example(str(i + 1), question, None) for i, question in enumerate(best)]
    shown = [Example("", question, answer) for question, answer in verified]
    assert [(demo.question, demo.answer) for demo in verified_demos(rollouts, rendering, None).demos] == verified
    for way, options in (("verified", {}), ("tuned", {"dims": "tuned", "tuned": tiny.tuned})):
        same = sts_fast.score(
            model=tiny.model, sae=tiny.saes["topk"], train=asked, domains={**tiny.domains}, demos={"train": shown},
            top_n=TOP_N, domain_shots=1, shots=SHOTS, **options,
        )  # fmt: skip
        assert same.shifted_features == forecasts[way].shifted_features
        assert [domain.scores["icl"] for domain in same.domains] == [
            domain.scores["icl"] for domain in forecasts[way].domains
        ]


def test_completions_are_read_behind_their_prompts_and_tokenised_apart(tiny: Tiny, path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    rendering = Rendering(PromptTemplate(tokenizer, prepend_bos=True))
    rollouts = load_rollouts(path)
    read = read_completions(rollouts, rendering, context_length=None, limit=None, seed=0)
    rows = [row for row in rollouts.rows if row.group != 1 and row.completion.strip()]
    for prompt, row in zip(read.prompt_set.prompts, rows, strict=True):
        before = [0, *tokenizer(str(row.prompt), add_special_tokens=False).input_ids]
        assert prompt.base_ids.tolist() == before + tokenizer(row.completion, add_special_tokens=False).input_ids
        assert prompt.positions.tolist() == list(range(len(before), len(prompt.base_ids)))
        assert row.prompt == f"Question: {prompt.question}\nAnswer:"
    # Advantages are of the whole group, with the completion that is empty.
    assert np.isin(read.advantages, rollouts.advantages).all()
    few = read_completions(rollouts, rendering, context_length=None, limit=3, seed=0)
    assert len(np.unique(few.group_of)) == 3
    assert {prompt.id for prompt in few.prompt_set.prompts} < {prompt.id for prompt in read.prompt_set.prompts}


def chat(tiny: Tiny) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    marks = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize(
    "prompt",
    [
        (Turn("system", "Be short."), Turn("user", "What is 1 + 1?")),
        "<|system|>system\nBe short.</s>\n<|user|>user\nWhat is 1 + 1?</s>\n<|assistant|>assistant\n",
        "system\nBe short.\nuser\nWhat is 1 + 1?\nassistant\n",
    ],
)
def test_prompts_logged_as_rendered_are_told_from_their_template(tiny: Tiny, prompt: Any) -> None:
    rendering = Rendering(PromptTemplate(chat(tiny)))
    assert rendering.turns(prompt) == (Turn("system", "Be short."), Turn("user", "What is 1 + 1?"))
    assert rendering.turns("user\nWhat is 1 + 1?\nassistant") == (Turn("user", "What is 1 + 1?"),)
    assert rendering.turns("What is 1 + 1?") == (Turn("user", "What is 1 + 1?"),)
    other = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert rendering.turns(other) == (Turn("user", "Hi"),)
    # Without a template, a text that is no question is sent as it stands.
    plain = Rendering(PromptTemplate(AutoTokenizer.from_pretrained(tiny.model), prepend_bos=True))
    assert plain.turns("Once upon a time") is None
    assert plain.prompt_ids("Once\n\n").tolist() == [0, *plain.template.tokenizer("Once\n\n").input_ids[1:]]


def test_end_marks_tell_which_completions_were_cut_off(tiny: Tiny) -> None:
    rendering = Rendering(PromptTemplate(AutoTokenizer.from_pretrained(tiny.model)))
    rows = [Rollout("Q", text, 1.0, 0) for text in ("a</s>", "b", " c </s></s>\n")]
    ended = with_endings(Rollouts(rows), rendering)
    assert [(row.completion.strip(), row.truncated) for row in ended.rows] == [("a", False), ("b", True), ("c", False)]
    unknown = with_endings(Rollouts(rows[1:2]), rendering)
    assert unknown.rows[0].truncated is None


def changed(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [{**row, **values} for row in rows]


def test_rollouts_that_say_nothing_are_answered_by_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    rows = rows_of(tiny)
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        (changed(rows, reward=1), {"ways": ["gradient"]}, "all completions of a prompt have the same reward"),
        (rows[::4], {"ways": ["step"]}, "only one completion: sample several"),
        ([{**row, "advantage": 0.5} for row in rows[::4]], {"ways": ["step"]}, "only one completion: sample several"),
        (changed(rows, advantage=0.5), {"ways": ["step"]}, "all completions of a prompt have the same advantage"),
        (changed(rows, completion=" "), {"ways": ["correlation"]}, "no prompt has two readable completions"),
        (changed(rows, completion="x " * 600), {"ways": ["correlation"]}, "exceed the model's context of 512"),
        (rows[8:36], {"ways": ["correlation"]}, "7 prompts have readable completions .* at least 8"),
        (rows, {"verified_reward": 2.0}, "0 prompts have a verified completion, with a reward of 2 or more"),
        (changed(rows, reward=1), {"ways": ["verified"]}, "0 prompts .* all rewards are the same, 1"),
        (rows, {"columns": Columns(rewards=("reward", "reward"))}, "adds up the same column twice"),
        (rows[:28], {"ways": ["verified"]}, "keeps 7 prompts, but at least 8"),
        (rows, {"ways": ["luck"]}, "--ways must be among"),
        (rows, {"ways": []}, "--ways must name one or more"),
        (rows, {"estimators": ["ntk"], "signed_features": "raw"}, "--signed-features must be sae"),
    ]
    path = tmp_path / "r.jsonl"
    for given, options, message in cases:
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        with pytest.raises(InputError, match=message) as caught:
            forecasts_of(tiny, path, **options)
        assert "\n" not in str(caught.value)


def test_much_that_says_little_carries_a_warning(tiny: Tiny, path: Path) -> None:
    rollouts = load_rollouts(path)
    cut = Rollouts([Rollout(row.prompt, row.completion, row.reward, row.group, None, True) for row in rollouts.rows])
    [forecast] = forecasts_of(tiny, cut, ways=["correlation"], estimators=["act"]).values()
    assert any("48 of 48 completions were cut off" in warning for warning in forecast.warnings)
