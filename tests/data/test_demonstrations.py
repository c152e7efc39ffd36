"""Which rows are shown, which are asked, and how queries are dealt out over draws of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sts_fast.data.demonstrations import choose_demos, draw_for, room_for_demos
from sts_fast.data.examples import Example
from sts_fast.data.prompts import PromptTemplate, build_prompts
from sts_fast.data.sets import Sampling
from sts_fast.errors import InputError, SetTooSmall

WORDS = ["<unk>", "<bos>", "<eos>", "Question:", "Answer:", "?", "a", "b", "c", "d", "e", "x", "y", "z"]


def plain_template() -> PromptTemplate:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PromptTemplate(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"))


PLAIN = plain_template()
ROWS = [
    Example("1", "a", None),
    Example("2", "b", "x"),
    Example("3", "c", "y"),
    Example("4", "d", "z"),
    Example("5", "b", "another answer to the same question"),
]
TEN = [Example(str(i), f"a {i}", "x") for i in range(10)]


def ids(examples: Sequence[Example]) -> list[str]:
    return [example.id for example in examples]


def test_first_answered_rows_demonstrate_and_are_not_asked() -> None:
    chosen = choose_demos("set", ROWS, 2)
    assert [ids(draw) for draw in chosen.draws] == [["2", "3"]]
    assert ids(chosen.queries) == ["1", "4"]  # 5 asks what 2 demonstrates


def test_given_demonstrations_are_not_asked_either() -> None:
    given = [
        Example("x", "no answer", None),
        Example("y", "d", "z"),
        Example("z", "new", "w"),
        Example("v", "a", "w"),
    ]
    chosen = choose_demos("set", ROWS, 2, 1, given)
    assert [ids(draw) for draw in chosen.draws] == [["y", "z"]]
    assert ids(chosen.queries) == ["1", "2", "3", "5"]  # all but 4; 1 is asked, as 'v' is not shown


def test_same_question_in_another_conversation_is_another_query() -> None:
    rows = [Example("1", "why?", "x", (("user", "hi"), ("assistant", "hello"))), Example("2", "why?", "y")]
    chosen = choose_demos("set", rows, 1)
    assert [ids(draw) for draw in chosen.draws] == [["1"]]
    assert ids(chosen.queries) == ["2"]


def test_no_demonstrations() -> None:
    chosen = choose_demos("set", ROWS, 0, 5)
    assert (chosen.draws, chosen.queries) == ((), ROWS)


def test_too_few_answered_rows() -> None:
    with pytest.raises(
        SetTooSmall, match=r"'law' has 4 answered examples, but 5 are to be shown .*--domain-shots.*--demos"
    ):
        choose_demos("law", ROWS, 5)
    with pytest.raises(SetTooSmall, match=r"the demonstrations given for 'law' has 0 answered examples, but 1"):
        choose_demos("law", ROWS, 1, 1, ROWS[:1])


def test_no_query_left() -> None:
    with pytest.raises(SetTooSmall, match=r"'law' has no example left to ask"):
        choose_demos("law", ROWS[1:3], 2)


def test_demonstrations_are_set_aside_whether_they_are_shown_or_not() -> None:
    rows = [Example(str(i), f"a {i}", "x" if i != 1 else None) for i in range(6)]
    assert choose_demos("set", rows, 2) == choose_demos("set", rows, 2, required=False)
    assert choose_demos("set", rows, 6, required=False).queries == rows


@pytest.mark.parametrize(
    ("shots", "n_draws", "expected"),
    [
        (2, 5, [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]),
        (1, 3, [["0"], ["3"], ["6"]]),  # 10 // 3 and 20 // 3: spread over the set
        (3, 5, [["0", "1", "2"], ["3", "4", "5"], ["6", "7", "8"]]),  # three draws are all that share no row
        (6, 5, [["0", "1", "2", "3", "4", "5"]]),
    ],
)
def test_draws_are_spread_over_the_set_and_share_no_row(shots: int, n_draws: int, expected: list[list[str]]) -> None:
    assert [ids(draw) for draw in choose_demos("set", TEN, shots, n_draws).draws] == expected


def test_with_several_draws_every_row_is_asked_but_never_behind_itself() -> None:
    chosen = choose_demos("set", TEN, 2, 5)
    assert chosen.queries == TEN
    built = build_prompts("set", chosen.queries, PLAIN, draws=chosen.draws)
    assert [prompt.id for prompt in built.prompts] == ids(TEN)
    for prompt in built.prompts:
        assert prompt.id not in built.shown[prompt.draw]
    counts = [built.draw_of.tolist().count(k) for k in range(5)]
    assert sum(counts) == 10
    assert min(counts) >= 1


def test_a_prompt_is_written_behind_the_draw_that_it_is_dealt() -> None:
    demos = [[Example("p", "b", "x")], [Example("q", "c", "y"), Example("r", "d", "z")]]
    built = build_prompts("set", [Example("1", "a", None), Example("2", "e", None)], PLAIN, draws=demos)
    texts = {prompt.draw: PLAIN.tokenizer.decode(prompt.demos_ids.tolist()) for prompt in built.prompts}
    assert texts[0].startswith("Question: b Answer: x")
    assert texts[1].startswith("Question: c Answer: y Question: d Answer: z")


def test_a_question_that_every_draw_shows_is_not_asked() -> None:
    draws = [[Example("p", "b", "x")], [Example("q", "b", "y")]]
    assert draw_for(Example("1", "b", None), draws, 0) is None
    assert [prompt.id for prompt in build_prompts("set", ROWS, PLAIN, draws=draws).prompts] == ["1", "3", "4"]


LONG = [Example(str(i), f"a {i}", "x " * (30 if i % 3 == 0 else 1)) for i in range(12)]


def test_the_first_rows_that_leave_room_are_shown() -> None:
    # "Question: a 1 Answer:" has 4 tokens, so 2 demonstrations get (24 - 4) / 2 = 10 each, with "Question: ? Answer:".
    fits = room_for_demos(LONG, PLAIN, 2, 24, seed=0)
    assert [fits[0](row) for row in LONG[:4]] == [False, True, True, False]
    chosen = choose_demos("set", LONG, 2, 2, fits=fits)
    assert [ids(draw) for draw in chosen.draws] == [["1", "2"], ["7", "8"]]
    assert chosen.n_too_long == 2


def test_where_no_row_leaves_room_the_error_says_so() -> None:
    long = [Example(str(i), "a", "x " * 40) for i in range(9)]
    with pytest.raises(SetTooSmall, match="'law' has 9 answered examples, 9 of them too long to leave room"):
        choose_demos("law", long, 2, 2, fits=room_for_demos(long, PLAIN, 2, 30, seed=0))


def test_where_no_row_leaves_room_for_half_of_the_questions_room_for_a_few_will_do() -> None:
    rows = [Example(str(i), "a " * (4 if i < 4 else 20) + str(i), "x " * 10) for i in range(20)]
    (long,) = {len(PLAIN.token_ids(row.turns)) for row in rows[4:]}
    half, few, _ = room_for_demos(rows, PLAIN, 1, long + 12, seed=0)
    assert not any(map(half, rows))
    assert [*map(few, rows)] == [True] * 4 + [False] * 16
    assert [ids(draw) for draw in choose_demos("set", rows, 1, 2, fits=[half, few]).draws] == [["0"], ["1"]]


def test_rows_that_are_passed_over_are_said() -> None:
    sampling = Sampling(domain_shots=2, demo_draws=2)
    made = sampling.prompts("law", LONG, None, PLAIN, 24, kind="domain", show=True)
    (warning,) = [warning for warning in made.warnings if "too long to demonstrate with" in warning.text]
    assert warning.which == "2 examples of 'law'"
    assert len(made.shown) == 2


def test_wrong_numbers_of_draws() -> None:
    with pytest.raises(InputError, match="--demo-draws must be at least 1, not 0"):
        Sampling(demo_draws=0)


def test_whether_a_query_fits_does_not_change_the_draw_of_the_others() -> None:
    draws = [[Example("p", "b", "x")], [Example("q", "c", "x " * 9)]]
    queries = [Example(str(i), "a " * (1 + 4 * (i % 2)) + str(i), None) for i in range(40)]
    whole = build_prompts("set", queries, PLAIN, draws=draws)
    cut = build_prompts("set", queries, PLAIN, draws=draws, context_length=18)
    assert 0 < cut.n_too_long < 40
    draw_of = {prompt.id: prompt.draw for prompt in whole.prompts}
    assert all(draw_of[prompt.id] == prompt.draw for prompt in cut.prompts)
