"""Prompts, with a tokenizer in which every word is one token, so that each expectation can be read off by eye."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_templates import byte_tokenizer, real_templates
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sts_fast.data.examples import Example
from sts_fast.data.prompts import Prompt, build_prompts
from sts_fast.data.template import (
    STRADDLING,
    TEMPLATE,
    TEMPLATE_DATE,
    PromptTemplate,
    common_prefix_length,
    common_suffix_length,
    plain_text,
    token_owners,
)
from sts_fast.data.turns import Turn
from sts_fast.errors import InputError

SPECIAL = ["<unk>", "<bos>", "<eos>", "<system>", "<user>", "<assistant>", "<end>"]
#               7          8        9    10   11   12   13   14   15   16   17   18
WORDS = [*SPECIAL, "Question:", "Answer:", "?", "!", "a", "b", "c", "d", "e", "f", "x", "y"]
WORDS += ["rule", "hi", "hello", "z", "w", "26", "Jul", "2024", "today:", "first", "later", "turns"]

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT_WITH_BOS = "<bos> " + CHAT
# A default system prompt and the day, as Llama 3's and Qwen 2.5's templates have them.
CHAT_WITH_DATE = (
    "<system> today: {{ date_string }} "
    "{% if messages[0].role == 'system' %}{{ messages[0].content }} {% set messages = messages[1:] %}{% endif %}<end> "
) + CHAT
CHAT_OF_ONE_QUESTION = "{% if messages | length > 2 %}{{ raise_exception('ask one\nquestion') }}{% endif %}" + CHAT
# What stands in front of a turn, and behind the last one, depends on how many there are.
CHAT_THAT_MARKS_THE_START = (
    "{% for m in messages %}{{ 'first' if loop.first else 'later' }} {{ m.content }} {% endfor %}"
)
CHAT_THAT_COUNTS_AT_THE_END = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'turns ' * (messages | length) }}<end>"
)

AB = Example("q1", "a b", "x y")
DEMO = Example("d1", "c", "z")
OTHER_DEMO = Example("d2", "d e", "w z")


def make_tokenizer(*, template: str = "$A", chat: str | None = None) -> PreTrainedTokenizerFast:
    """template: what the tokenizer puts around every plain text, such as '<bos> $A'."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = chat
    return tokenizer


PLAIN = PromptTemplate(make_tokenizer())


def chat(template: str = CHAT) -> PromptTemplate:
    return PromptTemplate(make_tokenizer(chat=template))


def words(ids: Sequence[int] | np.ndarray) -> str:
    return " ".join(WORDS[i] for i in ids)


def build_one(template: PromptTemplate, query: Example, demos: Sequence[Example] = (), tokens: str = "query") -> Prompt:
    built = build_prompts("set", [query], template, draws=[demos] if demos else [], tokens=tokens)
    assert (built.name, built.n_too_long, built.n_unanswered) == ("set", 0, 0)
    (prompt,) = built.prompts
    assert prompt.id == query.id
    for name in ("base_ids", "demos_ids", "positions", "paired", "paired_demos"):
        assert getattr(prompt, name).dtype == np.int32
    return prompt


def tokens_read(prompt: Prompt) -> str:
    return words(prompt.base_ids[prompt.positions])


# Plain text -----------------------------------------------------------------------------------------------------------


def test_plain_text_is_question_and_answer() -> None:
    assert plain_text([Turn("user", "1+1?")]) == "Question: 1+1?\nAnswer:"
    assert plain_text([Turn("user", "1+1?"), Turn("assistant", "2")]) == "Question: 1+1?\nAnswer: 2"


def test_plain_text_with_demonstrations_and_system_turn() -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "1+1?"), Turn("assistant", "2"), Turn("user", "2+2?")]
    assert plain_text(turns) == "Be brief.\n\nQuestion: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer:"


def test_plain_text_of_a_tool_turn_is_the_turn_itself() -> None:
    turns = [Turn("user", "q"), Turn("assistant", "call"), Turn("tool", "42"), Turn("user", "r")]
    assert plain_text(turns) == "Question: q\nAnswer: call\n\n42\n\nQuestion: r\nAnswer:"
    assert plain_text(turns[:-1]) == "Question: q\nAnswer: call\n\n42\nAnswer:"


def test_plain_text_keeps_lines_and_percent_and_braces() -> None:
    assert plain_text([Turn("user", "{x} %s\n\n{0}")]) == "Question: {x} %s\n\n{0}\nAnswer:"


def test_plain_query_alone() -> None:
    prompt = build_one(PLAIN, AB)
    assert prompt.base_ids.tolist() == [7, 11, 12, 8]  # Question: a b Answer:
    assert prompt.demos_ids.tolist() == []
    assert prompt.positions.tolist() == [1, 2]
    assert prompt.paired.tolist() == prompt.paired_demos.tolist() == []
    assert prompt.n_special == 0


def test_plain_query_pairs_with_itself_behind_the_demonstration() -> None:
    prompt = build_one(PLAIN, AB, [DEMO])
    assert words(prompt.base_ids) == "Question: a b Answer:"
    assert words(prompt.demos_ids) == "Question: c Answer: z Question: a b Answer:"
    assert prompt.paired.tolist() == [1, 2]
    assert prompt.paired_demos.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("tokens", "base", "positions", "paired_demos"),
    [
        ("query", "Question: a b Answer:", [1, 2], [5, 6]),
        ("template", "Question: a b Answer:", [0, 1, 2, 3], [4, 5, 6, 7]),
        ("last", "Question: a b Answer:", [3], [7]),
        ("answer", "Question: a b Answer: x y", [4, 5], [8, 9]),
        ("all", "Question: a b Answer: x y", [1, 2, 4, 5], [5, 6, 8, 9]),
    ],
)
def test_token_classes_in_plain_text(tokens: str, base: str, positions: list[int], paired_demos: list[int]) -> None:
    prompt = build_one(PLAIN, AB, [DEMO], tokens)
    assert words(prompt.base_ids) == base
    assert words(prompt.demos_ids) == f"Question: c Answer: z {base}"
    assert prompt.positions.tolist() == positions
    assert prompt.paired.tolist() == positions
    assert prompt.paired_demos.tolist() == paired_demos
    assert prompt.n_special == 0


# Beginning and end of sequence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("around", "prepend_bos", "expected"),
    [
        ("$A", False, "Question: a b Answer:"),
        ("$A", True, "<bos> Question: a b Answer:"),
        ("<bos> $A", False, "<bos> Question: a b Answer:"),
        ("<bos> $A", True, "<bos> Question: a b Answer:"),
        ("$A <eos>", False, "Question: a b Answer:"),
        ("$A <eos>", True, "<bos> Question: a b Answer:"),
        ("<bos> $A <eos>", True, "<bos> Question: a b Answer:"),
    ],
)
def test_one_bos_at_most_and_no_eos(around: str, prepend_bos: bool, expected: str) -> None:
    template = PromptTemplate(make_tokenizer(template=around), prepend_bos=prepend_bos)
    prompt = build_one(template, AB, [DEMO])
    bos = expected.startswith("<bos>")
    assert words(prompt.base_ids) == expected
    assert words(prompt.demos_ids) == expected.replace("Question: a", "Question: c Answer: z Question: a")
    # BOS begins both prompts, but in front of different text: it is not a token of the query.
    assert prompt.positions.tolist() == [1 + bos, 2 + bos]
    assert prompt.paired.tolist() == [1 + bos, 2 + bos]
    assert prompt.paired_demos.tolist() == [5 + bos, 6 + bos]
    template_too = build_one(template, AB, [DEMO], "template")
    assert template_too.positions.tolist() == template_too.paired.tolist() == [i + bos for i in range(4)]
    assert template_too.paired_demos.tolist() == [i + 4 + bos for i in range(4)]
    assert prompt.n_special == 0


def test_prepend_bos_is_void_without_a_bos_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert words(PromptTemplate(tokenizer, prepend_bos=True).token_ids([Turn("user", "a")])) == "Question: a Answer:"


def test_chat_template_decides_about_bos_alone() -> None:
    # The tokenizer would add a BOS to plain text, the template writes one, the SAE asks for one: there is one.
    tokenizer = make_tokenizer(template="<bos> $A <eos>", chat=CHAT_WITH_BOS)
    ids = PromptTemplate(tokenizer, prepend_bos=True).token_ids([Turn("user", "a")])
    assert words(ids) == "<bos> <user> a <end> <assistant>"
    tokenizer.chat_template = CHAT
    ids = PromptTemplate(tokenizer, prepend_bos=True).token_ids([Turn("user", "a")])
    assert words(ids) == "<user> a <end> <assistant>"


# Chat templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "base", "positions", "n_special"),
    [
        #           0      1      2 3 4     5
        ("query", "<bos> <user> a b <end> <assistant>", [2, 3], 0),
        ("template", "<bos> <user> a b <end> <assistant>", [2, 3], 3),
        ("last", "<bos> <user> a b <end> <assistant>", [3], 3),
        #            0      1      2 3 4     5           6 7 8
        ("answer", "<bos> <user> a b <end> <assistant> x y <end>", [6, 7], 0),
        ("all", "<bos> <user> a b <end> <assistant> x y <end>", [2, 3, 6, 7], 0),
    ],
)
def test_token_classes_in_a_chat(tokens: str, base: str, positions: list[int], n_special: int) -> None:
    prompt = build_one(chat(CHAT_WITH_BOS), AB, [DEMO], tokens)
    assert words(prompt.base_ids) == base
    assert words(prompt.demos_ids) == base.replace("<bos>", "<bos> <user> c <end> <assistant> z <end>")
    assert prompt.positions.tolist() == positions
    assert prompt.n_special == n_special
    assert prompt.paired.tolist() == positions
    assert prompt.paired_demos.tolist() == [position + 6 for position in positions]


def test_demonstrations_follow_the_system_turn() -> None:
    query = Example("q", "a b", None, (Turn("system", "rule"),))
    prompt = build_one(chat(), query, [DEMO, OTHER_DEMO])
    assert words(prompt.base_ids) == "<system> rule <end> <user> a b <end> <assistant>"
    assert words(prompt.demos_ids) == (
        "<system> rule <end> <user> c <end> <assistant> z <end> <user> d e <end> <assistant> w z <end> "
        "<user> a b <end> <assistant>"
    )
    assert prompt.paired.tolist() == prompt.positions.tolist() == [4, 5]
    assert tokens_read(prompt) == "a b"
    assert words(prompt.demos_ids[prompt.paired_demos]) == "a b"


def test_earlier_turns_belong_to_the_query() -> None:
    context = (Turn("system", "rule"), Turn("user", "hi"), Turn("assistant", "hello"))
    prompt = build_one(chat(), Example("q", "a b", "x", context), [DEMO])
    assert words(prompt.demos_ids) == (
        "<system> rule <end> <user> c <end> <assistant> z <end> "
        "<user> hi <end> <assistant> hello <end> <user> a b <end> <assistant>"
    )
    assert tokens_read(prompt) == words(prompt.demos_ids[prompt.paired_demos]) == "hi hello a b"


def test_demonstration_shows_its_own_earlier_turns() -> None:
    demo = Example("d", "c", "z", (Turn("user", "hi"), Turn("assistant", "hello")))
    prompt = build_one(chat(), AB, [demo])
    assert words(prompt.demos_ids) == (
        "<user> hi <end> <assistant> hello <end> <user> c <end> <assistant> z <end> <user> a b <end> <assistant>"
    )


def test_date_is_always_the_same() -> None:
    assert TEMPLATE_DATE == "26 Jul 2024"
    prompt = build_one(chat(CHAT_WITH_DATE), AB, [DEMO])
    assert words(prompt.base_ids) == "<system> today: 26 Jul 2024 <end> <user> a b <end> <assistant>"
    assert tokens_read(prompt) == "a b"


def test_template_that_merges_the_system_turn_into_its_own() -> None:
    query = Example("q", "a b", None, (Turn("system", "rule"),))
    prompt = build_one(chat(CHAT_WITH_DATE), query, [DEMO])
    assert words(prompt.demos_ids) == (
        "<system> today: 26 Jul 2024 rule <end> <user> c <end> <assistant> z <end> <user> a b <end> <assistant>"
    )
    assert tokens_read(prompt) == "a b"


def test_only_the_common_suffix_is_read() -> None:
    # Without demonstrations the turn starts with "first", with them it starts with "later": that word is not paired.
    prompt = build_one(chat(CHAT_THAT_MARKS_THE_START), AB, [DEMO])
    assert words(prompt.base_ids) == "first a b"
    assert words(prompt.demos_ids) == "first c later z later a b"
    assert prompt.positions.tolist() == prompt.paired.tolist() == [1, 2]
    assert prompt.paired_demos.tolist() == [5, 6]


def test_prompts_that_end_differently_pair_only_where_their_ends_agree() -> None:
    # The template writes one word "turns" for each turn behind the question: the common suffix begins at the first.
    prompt = build_one(chat(CHAT_THAT_COUNTS_AT_THE_END), AB, [DEMO, OTHER_DEMO], "template")
    assert words(prompt.base_ids) == "a b turns <end>"
    assert words(prompt.demos_ids) == "c z d e w z a b turns turns turns turns turns <end>"
    assert tokens_read(prompt) == "turns"
    assert prompt.paired.tolist() == [2]
    assert prompt.paired_demos.tolist() == [12]


def test_text_pairs_with_itself_whatever_the_template_writes_behind_it() -> None:
    prompt = build_one(chat(CHAT_THAT_COUNTS_AT_THE_END), AB, [DEMO, OTHER_DEMO])
    assert words(prompt.demos_ids) == "c z d e w z a b turns turns turns turns turns <end>"
    assert tokens_read(prompt) == words(prompt.demos_ids[prompt.paired_demos]) == "a b"
    assert prompt.paired_demos.tolist() == [6, 7]


# Whose a token is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offsets", "spans", "owners"),
    [
        #  0123456789
        #  Q: one two
        ([(0, 2), (2, 6), (6, 10)], [(3, 10)], [TEMPLATE, 0, 0]),  # a blank before a word is anybody's
        ([(0, 1), (1, 4), (4, 10)], [(3, 10)], [TEMPLATE, STRADDLING, 0]),
        ([(0, 2), (2, 3), (3, 6), (6, 7), (7, 10)], [(3, 6), (7, 10)], [TEMPLATE, TEMPLATE, 0, TEMPLATE, 1]),
        ([(0, 2), (3, 10)], [(3, 6), (7, 10)], [TEMPLATE, STRADDLING]),
        ([(0, 0), (0, 10)], [(0, 10)], [TEMPLATE, 0]),
        ([(0, 10)], [(0, 0)], [TEMPLATE]),
        ([(3, 6), (6, 7), (7, 10)], [(3, 10)], [0, 0, 0]),  # a blank inside a text is the text's
    ],
)
def test_owner_of_a_token(offsets: list[tuple[int, int]], spans: list[tuple[int, int]], owners: list[int]) -> None:
    assert token_owners(np.asarray(offsets, np.int32), "Q: one two", spans).tolist() == owners


def test_tokens_across_the_end_of_a_text_are_left_out_and_counted() -> None:
    # "?" joins the template's "?" to a pair, as byte pair encodings do.
    tokenizer = byte_tokenizer("{% for m in messages %}?{{ m.content }}?{% endfor %}", merges=[("?", "?")])
    template = PromptTemplate(tokenizer)
    prompt = build_one(template, Example("q", "Why? How?", None), [DEMO])
    assert tokenizer.decode(prompt.base_ids) == "?Why? How??"
    assert tokenizer.decode(prompt.base_ids[prompt.positions]) == "Why? How"
    assert tokenizer.decode(prompt.demos_ids[prompt.paired_demos]) == "Why? How"
    assert (prompt.n_straddling, prompt.n_special) == (1, 0)
    (answered,) = build_prompts("set", [Example("q", "Why", "So?")], template, tokens="answer").prompts
    assert tokenizer.decode(answered.base_ids[answered.positions]) == "So"
    assert answered.n_straddling == 1


def test_text_that_the_template_writes_twice_is_read_once() -> None:
    template = chat("{% for m in messages %}<{{ m.role }}> {{ m.content }} turns {{ m.content }} <end> {% endfor %}")
    prompt = build_one(template, AB, [DEMO])
    assert words(prompt.base_ids) == "<user> a b turns a b <end>"
    assert prompt.positions.tolist() == [4, 5]
    assert tokens_read(prompt) == words(prompt.demos_ids[prompt.paired_demos]) == "a b"


def test_tokenizer_that_does_not_tell_where_its_tokens_are() -> None:
    class Silent(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            read = super().__call__(*args, **kwargs)
            if "offset_mapping" in read:
                read["offset_mapping"] = [(start, start) for start, _ in read["offset_mapping"]]
            return read

    plain = make_tokenizer(chat=CHAT)
    silent = Silent(tokenizer_object=plain.backend_tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")
    silent.add_special_tokens({"additional_special_tokens": SPECIAL[3:]})
    silent.chat_template = CHAT
    query = Example("q", "a b <eos> a", "x", (Turn("user", "hi"), Turn("assistant", "hello")))
    expected, prompt = (build_one(PromptTemplate(one), query, [DEMO]) for one in (plain, silent))
    assert prompt.positions.tolist() == expected.positions.tolist()
    assert prompt.paired_demos.tolist() == expected.paired_demos.tolist()


def test_template_that_refuses_a_role_says_so_in_one_line() -> None:
    query = Example("q", "a", None, (Turn("user", "b"), Turn("assistant", "c")))
    message = r"chat template cannot render turns of user, assistant, user: ask one; leave out rows .*another template"
    with pytest.raises(InputError, match=message) as e:
        build_one(chat(CHAT_OF_ONE_QUESTION), query)
    assert "\n" not in str(e.value)


def test_broken_template_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match="the model's chat template cannot render turns of user"):
        chat("{% for m in messages %}").token_ids([Turn("user", "a")])


# Special tokens inside the text ---------------------------------------------------------------------------------------


def test_special_tokens_are_dropped_and_counted() -> None:
    prompt = build_one(PLAIN, Example("q", "a <eos> b <user>", None), [DEMO])
    assert words(prompt.base_ids) == "Question: a <eos> b <user> Answer:"
    assert prompt.positions.tolist() == prompt.paired.tolist() == [1, 3]
    assert prompt.n_special == 2


def test_last_is_the_last_token_that_is_not_special() -> None:
    prompt = build_one(chat(), Example("q", "a b <eos>", None), tokens="last")
    assert words(prompt.base_ids) == "<user> a b <eos> <end> <assistant>"
    assert prompt.positions.tolist() == [2]


def test_query_of_special_tokens_alone_reads_nothing() -> None:
    for tokens in ("query", "last"):
        prompt = build_one(chat(), Example("q", "<eos>", None), [DEMO], tokens)
        assert prompt.positions.tolist() == prompt.paired.tolist() == []
        assert prompt.n_special == (1 if tokens == "query" else 4)


# Answers --------------------------------------------------------------------------------------------------------------


def test_queries_without_answer_are_counted_where_answers_are_read() -> None:
    queries = [Example("1", "a", "x"), Example("2", "b", None), Example("3", "c", "y")]
    built = build_prompts("set", queries, PLAIN, tokens="answer")
    assert [prompt.id for prompt in built.prompts] == ["1", "3"]
    assert (built.n_unanswered, built.n_too_long) == (1, 0)
    assert [tokens_read(prompt) for prompt in built.prompts] == ["x", "y"]


def test_all_reads_the_query_alone_where_there_is_no_answer() -> None:
    built = build_prompts("set", [Example("1", "a", None), Example("2", "b", "y")], PLAIN, tokens="all")
    assert [tokens_read(prompt) for prompt in built.prompts] == [
        "a",
        "b y",
    ]
    assert built.n_unanswered == 0


def test_unknown_token_class() -> None:
    with pytest.raises(ValueError, match=r"tokens must be one of query, template, last, answer, all, not 'first'"):
        build_prompts("set", [AB], PLAIN, tokens="first")


# Demonstrations and queries -------------------------------------------------------------------------------------------


def test_prompts_carry_the_question_as_it_was_given() -> None:
    rows = [Example("1", "a b", "x", (Turn("user", "hi"), Turn("assistant", "hello"))), Example("2", "c", None)]
    prompts = build_prompts("set", rows, PLAIN, draws=[[Example("3", "d", "y")]])
    assert prompts.questions == ("a b", "c")
    assert replace(prompts, prompts=[replace(prompts.prompts[0], question=None), prompts.prompts[1]]).questions is None


MANY = [Example(str(i), "a " * (1 + i % 4), None) for i in range(40)]  # base: 3, 4, 5 or 6 tokens


def drawn(**options: object) -> list[int]:
    return [int(prompt.id) for prompt in build_prompts("set", MANY, PLAIN, **options).prompts]


def test_without_a_limit_all_are_taken_in_order() -> None:
    assert drawn() == list(range(40))
    assert drawn(limit=1000) == list(range(40))


def test_a_limit_draws_at_random_by_seed_and_keeps_the_order() -> None:
    chosen = drawn(limit=10)
    assert len(chosen) == 10
    assert chosen == sorted(set(chosen))
    assert drawn(limit=10) == chosen
    assert drawn(limit=10, seed=1) != chosen
    assert chosen != list(range(10))
    assert set(drawn(limit=5)) <= set(chosen)


def test_every_query_is_about_equally_likely_to_be_drawn() -> None:
    counts = np.bincount([i for seed in range(60) for i in drawn(limit=10, seed=seed)], minlength=40)
    assert counts.sum() == 600  # each is drawn 15 times on average, with standard deviation 3.4
    assert 15 - 4 * 3.4 < counts.min() <= counts.max() < 15 + 4 * 3.4


def test_prompts_longer_than_the_context_are_left_out_and_counted() -> None:
    built = build_prompts("set", MANY, PLAIN, context_length=4)
    assert [int(prompt.id) for prompt in built.prompts] == [i for i in range(40) if i % 4 < 2]
    assert built.n_too_long == 20
    # A demonstration of four tokens goes in front.
    built = build_prompts("set", MANY, PLAIN, draws=[[DEMO]], context_length=8)
    assert [int(prompt.id) for prompt in built.prompts] == [i for i in range(40) if i % 4 < 2]
    assert built.n_too_long == 20
    assert max(len(prompt.demos_ids) for prompt in built.prompts) == 8


def test_a_prompt_as_long_as_the_context_fits() -> None:
    assert len(build_prompts("set", [AB], PLAIN, context_length=4).prompts) == 1
    assert build_prompts("set", [AB], PLAIN, context_length=3).n_too_long == 1


def test_the_limit_counts_prompts_that_fit() -> None:
    built = build_prompts("set", MANY, PLAIN, context_length=3, limit=6)
    assert len(built.prompts) == 6
    assert all(len(prompt.base_ids) == 3 for prompt in built.prompts)


def test_unanswered_is_told_before_too_long() -> None:
    built = build_prompts("set", MANY, PLAIN, tokens="answer", context_length=1)
    assert (len(built.prompts), built.n_unanswered, built.n_too_long) == (0, 40, 0)


# Common ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "prefix", "suffix"),
    [
        ([], [], 0, 0),
        ([1], [], 0, 0),
        ([1, 2, 3], [1, 2, 3], 3, 3),
        ([1, 2, 3], [2, 3], 0, 2),
        ([1, 2, 3], [1, 2], 2, 0),
        ([1, 9, 3], [1, 8, 3], 1, 1),
        ([3], [3, 3, 3], 1, 1),
        ([1, 2], [3, 4], 0, 0),
    ],
)
def test_common_ends(a: list[int], b: list[int], prefix: int, suffix: int) -> None:
    left, right = np.array(a, np.int32), np.array(b, np.int32)
    assert common_prefix_length(left, right) == common_prefix_length(right, left) == prefix
    assert common_suffix_length(left, right) == common_suffix_length(right, left) == suffix


# What chat templates add and take away ------------------------------------------------------------------------------


def test_turn_marks_are_special_even_where_the_tokenizer_does_not_name_them() -> None:
    tokenizer = make_tokenizer(chat=CHAT)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    bare.add_tokens([AddedToken(mark, special=True) for mark in SPECIAL[3:]])
    bare.chat_template = CHAT
    assert not {"<user>", "<end>"} & set(bare.all_special_tokens)
    assert tokens_read(build_one(PromptTemplate(bare), AB, [DEMO])) == "a b"


def test_what_follows_every_answer_is_not_part_of_it() -> None:
    newline_after_turns = CHAT.replace("<end> ", "<end> d ")  # 'd' stands for the line break after <end>
    assert newline_after_turns != CHAT
    prompt = build_one(chat(newline_after_turns), AB, [DEMO], "answer")
    assert words(prompt.base_ids).endswith("x y <end> d")
    assert tokens_read(prompt) == "x y"


def test_answer_that_leaves_nothing_to_read_counts_as_none() -> None:
    built = build_prompts("set", [AB, Example("q2", "a", "<end>")], chat(), tokens="answer")
    assert [prompt.id for prompt in built.prompts] == ["q1"]
    assert built.n_unanswered == 1


def test_template_that_asks_for_today_gets_the_fixed_date() -> None:
    dated = CHAT.replace("{% for", "{{ strftime_now('%d %b %Y') }} {% for", 1)
    assert dated != CHAT
    assert "26 Jul 2024" in chat(dated).text([Turn("user", "a")])


THOUGHTLESS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }} {% endfor %}"


def test_thoughts_that_a_template_cuts_out_of_demonstrations_are_put_back() -> None:
    demos = [Example("d1", "c", "<think> e </think> z"), DEMO, Example("d3", "d", "<think> f </think> w")]
    built = build_prompts("set", [AB], chat(THOUGHTLESS), draws=[demos])
    assert built.warnings == ()
    template = chat(THOUGHTLESS)
    turns = [turn for demo in demos for turn in (Turn("user", demo.question), Turn("assistant", demo.answer or ""))]
    shown = "c <think> e </think> z c z d <think> f </think> w a b "
    assert template.text([*turns, Turn("user", "a b")]) == shown
    ids = template.tokenizer(shown, add_special_tokens=False).input_ids
    assert built.prompts[0].demos_ids.tolist() == ids


def test_template_that_shortens_demonstrations_is_told_on() -> None:
    shortening = "{% for m in messages %}{{ m.content[:1] if m.role == 'assistant' else m.content }} {% endfor %}"
    built = build_prompts("set", [AB], chat(shortening), draws=[[Example("d1", "c", "x y z w")]])
    assert len(built.warnings) == 1
    assert "demonstrations without a part of their answer" in built.warnings[0].text
    assert built.warnings[0].which == "1 of 1 demonstrations of 'set'"
    assert build_prompts("set", [AB], chat(), draws=[[DEMO]]).warnings == ()


def test_template_that_wants_its_turns_in_parts_gets_them() -> None:
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }} {% endfor %}{% endfor %}"
    assert chat(parts).text([Turn("user", "a b"), Turn("assistant", "x")]) == "a b x "


def test_template_that_does_not_show_the_question_is_refused() -> None:
    with pytest.raises(InputError, match="does not write what the user says"):
        chat("{% for m in messages %}{{ m.role }} {% endfor %}").token_ids([Turn("user", "a b")])


# ---- the templates of real models


@pytest.mark.skipif(not real_templates(), reason="trl, which ships the chat templates of real models, is not installed")
def test_there_are_many_real_templates() -> None:
    assert len(real_templates()) > 20


@pytest.mark.parametrize("path", [pytest.param(path, id=Path(path).stem) for path in real_templates()])
def test_real_template(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Demonstrations whole, thoughts and all; queries paired to the end; one BOS at most; the same on any day."""
    tokenizer = byte_tokenizer(Path(path).read_text(encoding="utf-8"))
    template = PromptTemplate(tokenizer)
    demos = [
        Example("d1", "What is 2 + 2?", "<think>\nTwo and two.\n</think>\n\nIt is 4."),
        Example("d2", "What is 3 + 5?", "<think>\nThree, then five.\n</think>\n\nIt is 8."),
    ]
    queries = [Example(f"q{i}", f"What is {i} plus one?", f"It is {i + 1}.") for i in range(3)]
    built = build_prompts("set", queries, template, draws=[demos])
    assert built.warnings == ()
    for query, prompt in zip(queries, built.prompts, strict=True):
        base, shown = tokenizer.decode(prompt.base_ids), tokenizer.decode(prompt.demos_ids)
        assert all(demo.question in shown and (demo.answer or "") in shown for demo in demos)
        assert not any(demo.question in base for demo in demos)
        assert max(list(ids).count(tokenizer.bos_token_id) for ids in (prompt.base_ids, prompt.demos_ids)) <= 1
        read, paired = prompt.positions, prompt.paired_demos
        assert tokenizer.decode(prompt.base_ids[read]) == query.question
        assert tokenizer.decode(prompt.demos_ids[paired]) == query.question
        np.testing.assert_array_equal(prompt.base_ids[prompt.paired], prompt.demos_ids[paired])
    answered = build_prompts("set", queries, template, tokens="answer").prompts
    for query, prompt in zip(queries, answered, strict=True):
        assert tokenizer.decode(prompt.base_ids[prompt.positions]) == query.answer
    both = build_prompts("set", queries, template, draws=[demos], tokens="all").prompts
    for query, prompt in zip(queries, both, strict=True):
        assert tokenizer.decode(prompt.base_ids[prompt.positions]) == query.question + (query.answer or "")

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Later:
            return cls(2031, 5, 6)

    monkeypatch.setattr(datetime, "datetime", Later)
    again = build_prompts("set", queries, PromptTemplate(tokenizer), draws=[demos])
    assert [p.demos_ids.tolist() for p in again.prompts] == [p.demos_ids.tolist() for p in built.prompts]
