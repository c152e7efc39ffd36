from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import sts_fast
from sts_fast import InputError

COUNTS = ("n_passes", "n_tokens")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimators": ["act"]},
        {"dims": "active", "estimators": ["act", "icl"]},
        {"dims": "tuned"},
        {"batch_tokens": 64},
        {"shots": 3, "domain_shots": 6, "limit": 9},
        {"estimators": ["act", "ntk"], "controls": "all"},
    ],
)
def test_passes_and_tokens_are_those_of_the_run(tiny: Tiny, options: dict[str, Any]) -> None:
    if options.get("dims") == "tuned":
        options = {**options, "tuned": tiny.tuned}
    given: dict[str, Any] = {"model": tiny.model, "sae": tiny.saes["topk"], "domains": tiny.domains, "top_n": 5}
    planned = sts_fast.plan(trains={"train": tiny.train}, **given, **options)
    run = sts_fast.score(train=tiny.train, **given, **options)
    counted = run.provenance["forward_passes"]
    expected = {name: counted[name] for name in COUNTS}
    if "tuned" in options:  # a run records the passes of the base model alone
        both = sts_fast.score(train=tiny.train, **{**given, "domains": {}}, **options).provenance["forward_passes"]
        expected = {name: counted[name] + both[name] for name in COUNTS}
    assert {name: getattr(planned.cost, name) for name in COUNTS} == expected
    by_use = {(of.use, of.name): of for of in planned.sets}
    assert by_use["shift", "train"].n_prompts == run.train["n_prompts"]
    for domain in run.domains:
        of = by_use["score", domain.name]
        assert (of.n_prompts, of.n_too_long) == (domain.n_prompts, domain.n_too_long)
    signed = "ntk" in options.get("estimators", ())
    assert (("answers", "train") in by_use) == signed
    assert bool(planned.cost.n_answer_tokens) == signed


def test_no_weights_are_needed(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    given: dict[str, Any] = {"sae": tiny.saes["topk"], "domains": tiny.domains, "top_n": 5}
    planned = sts_fast.plan(model=tmp_path / "model", trains={"train": tiny.train}, **given)
    there = sts_fast.plan(model=tiny.model, trains={"train": tiny.train}, **given)
    assert planned.sets == there.sets
    assert planned.cost.n_tokens == there.cost.n_tokens
    assert planned.cost.seconds > 0
    assert planned.cost.memory_bytes == there.cost.memory_bytes
    with pytest.raises(InputError):
        sts_fast.score(model=tmp_path / "model", train=tiny.train, **given)


def test_a_model_in_memory_costs_the_same(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"sae": tiny.saes["topk"], "trains": {"train": tiny.train}, "domains": tiny.domains}
    files = sts_fast.plan(model=tiny.model, top_n=5, **given)
    model, tokenizer = (kind.from_pretrained(tiny.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    memory = sts_fast.plan(model=model, tokenizer=tokenizer, top_n=5, **given)
    assert memory.sets == files.sets
    assert memory.cost.memory_bytes == files.cost.memory_bytes


def test_columns_are_named_as_the_file_names_them(tiny: Tiny, tmp_path: Path) -> None:
    rows = [
        {
            "Question": f"What is {i} + {i}?",
            "Choices": ["1", "2"],
            "answer": "2" if i % 2 else None,
            "solution": None if i % 2 else "They add up.",
            "passage": "Two numbers are given.",
            "hint": "Count.",
            "level": 3,
            "question_id": i,
        }
        for i in range(12)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    planned = sts_fast.plan(
        model=tiny.model, sae=tiny.saes["topk"], trains={"train": path}, domains=tiny.domains, top_n=5
    )
    train = planned.sets[0]
    assert train.columns == {
        "id": ["question_id"],
        "passage": ["passage"],
        "question": ["Question"],
        "options": ["Choices"],
        "answer": ["solution", "answer"],
    }
    assert train.unread == ["hint"]
    assert (train.n_rows, train.left_out) == (12, {})
    assert train.first == "Two numbers are given.\n\nWhat is 0 + 0?\nA. 1\nB. 2"
    assert planned.sets[1].columns == {"id": ["id"], "question": ["question"], "answer": ["answer"]}
    json.dumps(planned.to_dict())


def test_what_the_chat_template_does_not_write_is_known_before_the_first_pass(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    thought = [replace(example, reasoning="hm") for example in sts_fast.load_examples(tiny.train)]
    planned = sts_fast.plan(
        model=AutoModelForCausalLM.from_pretrained(tiny.model),
        tokenizer=tokenizer,
        sae=tiny.saes["topk"],
        trains={"train": thought},
        domains=tiny.domains,
        top_n=5,
    )
    note = "does not write the assistant's reasoning: it is left out"
    assert [note in " ".join(planned_set.warnings) for planned_set in planned.sets] == [True, False, False]


def test_examples_in_memory_have_no_columns(tiny: Tiny) -> None:
    examples = sts_fast.load_examples(tiny.train)
    planned = sts_fast.plan(
        model=tiny.model, sae=tiny.saes["topk"], trains={"train": examples}, domains=tiny.domains, top_n=5
    )
    assert (planned.sets[0].columns, planned.sets[0].unread, planned.sets[0].source) == (None, None, None)
    assert planned.sets[0].first == examples[0].question
    assert asdict(planned) == planned.to_dict()


def test_the_source_of_each_set_is_shown(tiny: Tiny, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tiny.train.read_text().splitlines()]
    (tmp_path / "law").mkdir()
    for split in ("dev", "test"):
        shutil.copy(tiny.train, tmp_path / "law" / f"{split}.jsonl")
    planned = sts_fast.plan(
        model=tiny.model,
        sae=tiny.saes["topk"],
        trains={"rows": rows, "both": [tiny.train, rows]},
        domains={"law": tmp_path / "law"},
        top_n=5,
    )
    assert [(of.name, of.source) for of in planned.sets] == [
        ("rows", "'rows' in memory"),
        ("both", f"{tiny.train}, 'both 2' in memory"),
        ("law", f"{tmp_path / 'law' / 'test.jsonl'} (not read: dev)"),
    ]
    assert planned.sets[0].columns == {"id": ["id"], "question": ["question"], "answer": ["answer"]}


def test_stored_activations_cost_no_pass(tiny: Tiny, tmp_path: Path) -> None:
    sae = sts_fast.load_sae(tiny.saes["topk"])
    sts_fast.capture_activations(
        model=tiny.model, saes=[sae], trains={"train": tiny.train}, domains=tiny.domains, output=tmp_path
    )
    planned = sts_fast.plan(model=tmp_path, sae=sae, trains={"train": tiny.train}, domains=tiny.domains, top_n=5)
    assert (planned.cost.n_passes, planned.cost.n_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sae": "wide"}, "reads"),
        ({"layer": 99}, "layer"),
        ({"domains": {"sums": "one.jsonl"}}, "at least 8 are needed"),
        ({"dims": "tuned"}, "--tuned"),
    ],
)
def test_what_a_run_would_refuse_is_refused(tiny: Tiny, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    sae = sts_fast.load_sae(tiny.saes["topk"])
    given: dict[str, Any] = {"model": tiny.model, "sae": sae, "domains": tiny.domains, "top_n": 5, **change}
    if given["sae"] == "wide":
        from dataclasses import replace

        import numpy as np

        d_in = sae.d_in + 1
        wide = np.ones((d_in, sae.d_sae), np.float32)
        given["sae"] = replace(sae, W_enc=wide, b_dec=np.zeros(d_in, np.float32), decoder=None)
    if given["domains"] == {"sums": "one.jsonl"}:
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n", encoding="utf-8")
        given["domains"], given["estimators"] = {"sums": path}, ["act"]
    if "layer" in given:
        given["sae"] = tiny.saes["topk"]
    with pytest.raises(InputError, match=named):
        sts_fast.plan(trains={"train": tiny.train}, **given)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tokens", ["query", "template"])
def test_every_pass_reads_the_users_text_alone(tiny: Tiny, tmp_path: Path, tokens: str) -> None:
    """With a chat template, of which no mark is a special token here."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny.model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    run = sts_fast.score(
        model=tmp_path / "model",
        sae=tiny.saes["topk"],
        train=tiny.train,
        domains=tiny.domains,
        estimators=["act", "icl", "ntk"],
        controls="all",
        tokens=tokens,
        shots=1,
        domain_shots=1,
        top_n=5,
    )
    examples = {
        (name, example.id): example
        for name, path in (("train", tiny.train), *tiny.domains.items())
        for example in sts_fast.load_examples(path)
    }
    rows = run.prompts.to_pylist()
    assert {row["stage"] for row in rows} == {"shift", "score", "answer", "signed_train", "signed"}
    for row in rows:
        example = examples[row["domain"], row["id"]]
        text = example.question if row["stage"] in ("shift", "score") else example.answer or ""
        read = tokenizer.decode([row["base_ids"][p] for p in row["positions"]])
        if tokens == "template" and row["stage"] in ("shift", "score"):
            assert read.endswith("assistant\n")
        elif "~" not in text and "</s>" not in text:  # an attention sink, a special token
            assert read == text
        pairs = (("base_ids", "paired"), ("demos_ids", "paired_demos"))
        here, there = ([row[ids][p] for p in row[at]] for ids, at in pairs)
        assert here == there


def with_a_poor_domain(tiny: Tiny) -> dict[str, Any]:
    spelling = sts_fast.load_examples(tiny.domains["spelling"])
    unanswered = [dataclasses.replace(example, answer=None) for example in spelling]
    domains = {**{name: sts_fast.load_examples(path) for name, path in tiny.domains.items()}, "silent": unanswered}
    return {"model": tiny.model, "sae": tiny.saes["topk"], "domains": domains, "top_n": 5}


def test_a_domain_that_cannot_be_used_is_left_out_and_named(tiny: Tiny) -> None:
    given = with_a_poor_domain(tiny)
    forecast = sts_fast.score(train=tiny.train, **given)
    assert [domain.name for domain in forecast.domains] == [*tiny.domains]
    (warning,) = [warning for warning in forecast.warnings if "left out" in warning]
    assert warning.startswith("a domain is left out: 'silent' has 0 answered examples, but 5 are to be shown")
    # Without demonstrations nothing is wrong with it.
    forecast = sts_fast.score(train=tiny.train, **given, estimators=["act"])
    assert [domain.name for domain in forecast.domains] == [*given["domains"]]


def test_a_domain_with_too_few_prompts_is_left_out_too(tiny: Tiny) -> None:
    given = with_a_poor_domain(tiny)
    given["domains"]["silent"] = given["domains"]["silent"][:7]
    forecast = sts_fast.score(train=tiny.train, **given, estimators=["act"])
    assert [domain.name for domain in forecast.domains] == [*tiny.domains]
    assert "a domain is left out: domain 'silent' keeps 7 prompts, but at least 8 are needed" in forecast.warnings[0]


def test_strictly_a_domain_that_cannot_be_used_stops_the_run(tiny: Tiny) -> None:
    with pytest.raises(InputError, match=r"a domain is left out: 'silent' has 0 answered .* \(--strict\)"):
        sts_fast.plan(trains={"train": tiny.train}, **with_a_poor_domain(tiny), strict=True)


def test_where_no_domain_can_be_used_the_run_stops(tiny: Tiny) -> None:
    given = with_a_poor_domain(tiny)
    given["domains"] = {"silent": given["domains"]["silent"], "mute": given["domains"]["silent"]}
    with pytest.raises(InputError, match=r"'silent' has 0 answered .*; and no other domain can be used either"):
        sts_fast.plan(trains={"train": tiny.train}, **given)


def test_one_draw_of_demonstrations_is_said(tiny: Tiny) -> None:
    demos = {"spelling": sts_fast.load_examples(tiny.domains["spelling"])[:5]}
    given: dict[str, Any] = {"model": tiny.model, "sae": tiny.saes["topk"], "domains": tiny.domains, "top_n": 5}
    forecast = sts_fast.score(train=tiny.train, demos=demos, **given)
    (warning,) = [warning for warning in forecast.warnings if "one draw" in warning]
    assert warning.startswith("there are demonstrations for one draw only of spelling: the intervals do not say")
    by_name = {domain.name: domain.demonstrations for domain in forecast.domains}
    assert by_name["spelling"] == [[example.id for example in demos["spelling"]]]
    assert not [w for w in sts_fast.score(train=tiny.train, **given, demo_draws=1).warnings if "one draw" in w]
