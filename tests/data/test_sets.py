"""Sets: examples that repeat others, rows that are left out, and what is said of both."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from sts_fast.data.examples import Example
from sts_fast.data.prompts import PromptSet, TokenClass, set_warnings
from sts_fast.data.sets import Fields, Sampling, Sets, distinct, large_enough
from sts_fast.data.template import PromptTemplate
from sts_fast.errors import InputError, SetTooSmall

REPEATS = "examples that repeat another one are left out"
WORDS = ["<unk>", "Question:", "Answer:", *(f"w{i}" for i in range(40))]


@pytest.fixture(scope="module")
def template() -> PromptTemplate:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PromptTemplate(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"))


def prompts(
    template: PromptTemplate,
    examples: list[Example],
    tokens: TokenClass = "query",
    context_length: int | None = None,
    limit: int | None = None,
    name: str = "law",
) -> PromptSet:
    sampling = Sampling(shots=1, domain_shots=1, tokens=tokens, limit=limit)
    return sampling.prompts(name, examples, None, template, context_length, kind="domain", show=False)


def test_an_example_that_repeats_another_is_left_out() -> None:
    first, again = Example("1", "w1  w2", "a"), Example("2", "w1\nw2 ", "a\n")
    other, unanswered = Example("3", "w1 w2", "b"), Example("4", "w1 w2", None)
    in_context = Example("5", "w1 w2", "a", (("user", "w3"), ("assistant", "w4")))
    everything = [unanswered, first, again, other, in_context]
    # Where answers are not read, what is asked is all; an answered one can be shown as a demonstration.
    assert distinct(everything, with_answers=False) == [first, in_context]
    assert distinct(everything, with_answers=True) == [unanswered, first, other, in_context]
    assert distinct([], with_answers=True) == []


def test_a_question_that_many_rows_ask_is_one_prompt(template: PromptTemplate) -> None:
    examples = [Example(str(i), f"w{i % 4}", f"w{i % 8}") for i in range(32)]
    asked = prompts(template, examples)
    assert [prompt.id for prompt in asked.prompts] == ["0", "1", "2", "3"]
    assert [*map(str, asked.warnings)] == [f"{REPEATS} (28 of the 32 examples of 'law')"]
    # With their answers, there are 8 that differ.
    answered = prompts(template, examples, tokens="answer")
    assert [prompt.id for prompt in answered.prompts] == [str(i) for i in range(8)]
    assert [*map(str, answered.warnings)] == [f"{REPEATS} (24 of the 32 examples of 'law')"]


def test_a_warning_of_many_sets_is_one_line(template: PromptTemplate) -> None:
    sets = [prompts(template, [Example(str(i), f"w{i % n}", "w0") for i in range(20)], name=f"{n}") for n in (10, 12)]
    assert set_warnings(sets) == [f"{REPEATS} (10 of the 20 examples of '10', 8 of the 20 examples of '12')"]
    assert set_warnings(3 * sets)[0].endswith("8 of the 20 examples of '12' and 2 more)")


def test_repeated_rows_change_no_draw(template: PromptTemplate) -> None:
    examples = [Example(str(i), f"w{i}", "w0") for i in range(30)]
    repeated = [*examples, *(Example(f"again {i}", f"w{i}", "w0") for i in range(15))]
    drawn = [[prompt.id for prompt in prompts(template, of, limit=10).prompts] for of in (examples, repeated)]
    assert drawn[0] == drawn[1]
    assert len({*drawn[0]}) == 10


def test_a_large_share_left_out_is_warned_of(template: PromptTemplate) -> None:
    examples = [Example(str(i), f"w{i}" + " w0" * (5 if i % 4 else 0), None if i % 2 else "w0") for i in range(40)]
    # "Question: w0 w0 w0 w0 w0 w0 Answer:" is 8 words long.
    long = prompts(template, examples, context_length=7)
    assert (len(long.prompts), long.n_too_long) == (10, 30)
    (warning,) = long.warnings
    assert warning.text == "examples were left out: they overran the model's context of 7 tokens"
    assert warning.which == "75% of the examples of 'law'"
    unanswered = prompts(template, examples, tokens="answer", context_length=20)
    assert [*map(str, unanswered.warnings)] == [
        "examples were left out: they have no answer to read (50% of the examples of 'law')"
    ]
    assert prompts(template, examples[:9], context_length=8).warnings == ()


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_training_sets_and_domains_are_told_apart(tmp_path: Path) -> None:
    good, bad = {"question": "q", "answer": "a"}, {"question": None}
    train = write(tmp_path / "train.jsonl", good, bad)
    other = write(tmp_path / "other.jsonl", {"prompt": "p"})
    law = write(tmp_path / "law.jsonl", good)
    sets = Sets.read({"train": train, "other": other}, [str(law)], None, Fields())
    assert sets.lines() == [
        "train, law: question from question, answer from answer; 3 rows, 1 left out: 1 with no question in 'question'",
        "other: question from prompt; 1 row",
    ]
    warning = "1 of the 2 rows of 'train' were left out: 1 with no question in 'question'"
    assert sets.warnings() == sets.warnings("train") == [warning]
    assert sets.warnings("other") == []
    assert sets.told() == [*sets.lines(), f"warning: {warning}"]
    assert [block["sets"] for block in sets.blocks("other")] == [["other"], ["law"]]
    shown = Sets.read({"train": train}, [str(law)], [f"law={train}"], Fields())
    assert shown.lines() == [
        "train, law, demonstrations of law: question from question, answer from answer; "
        "5 rows, 2 left out: 2 with no question in 'question'"
    ]
    assert [block["sets"] for block in shown.blocks("train")] == [["train"], ["law"], ["demonstrations of law"]]
    with pytest.raises(InputError, match=r"train\.jsonl: row 2 has no question in 'question'"):
        Sets.read({"train": train}, [str(law)], None, Fields(strict=True))


def test_sets_that_are_too_small_are_left_out() -> None:
    def made(name: str) -> str:
        if name in ("few", "none"):
            raise SetTooSmall(f"{name} keeps 3 prompts")
        return name

    def found(*names: str) -> tuple[list[str], list[str]]:
        return large_enough("domain", [partial(made, name) for name in names])

    assert found("law", "few", "art") == (["law", "art"], ["a domain is left out: few keeps 3 prompts"])
    assert found() == ([], [])
    with pytest.raises(InputError, match=r"^few keeps 3 prompts$"):
        found("few")
    with pytest.raises(InputError, match="few keeps 3 prompts; and no other domain can be used either"):
        found("few", "none")
