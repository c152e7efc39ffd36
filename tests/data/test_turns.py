"""Conversations as trainers, vendors and published sets write them; each expectation is written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sts_fast.data.examples import Example, load_examples, read_examples
from sts_fast.data.sources import origin_of
from sts_fast.data.turns import ToolCall, Turn, is_turns, messages_of, parsed_turns
from sts_fast.errors import InputError

CASES = Path(__file__).parents[3] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the checkout")

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = Turn("tools", json.dumps([{"type": "function", "function": WEATHER}]))
OSLO = ToolCall("get_weather", '{"city": "Oslo"}')
ASKED = {"role": "user", "content": "Is it warm in Oslo?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get_weather", "arguments": {}}}]}


def read(tmp_path: Path, *rows: dict[str, Any]) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(path)


def turns_of(*messages: dict[str, Any]) -> list[Turn]:
    return parsed_turns(list(messages), "row 1")


# Tools ----------------------------------------------------------------------------------------------------------------


@needs_cases
def test_last_turn_of_the_assistant_is_the_answer_and_the_calls_are_steps() -> None:
    expected = Example(
        *("1", "Is it warm in Oslo?", "No, 7 C.", (TOOLS,)),
        steps=(Turn("assistant", "", tool_calls=(OSLO,)), Turn("tool", "7 C", name="get_weather")),
    )
    assert load_examples(CASES / "12_trl_tools" / "data.jsonl") == [expected]
    assert expected.turns == (TOOLS, Turn("user", "Is it warm in Oslo?"), *expected.steps)
    assert expected.reply == Turn("assistant", "No, 7 C.")


@needs_cases
def test_call_beside_a_text_is_a_part_of_the_answer() -> None:
    (example,) = load_examples(CASES / "12c_tool_and_text" / "data.jsonl")
    assert example == Example("1", "Is it warm in Oslo?", "Let me look.", (TOOLS,), tool_calls=(OSLO,))
    assert example.reply == Turn("assistant", "Let me look.", tool_calls=(OSLO,))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "get_weather", "arguments": {"city": "Oslo"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "assistant", "tool_calls": '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'},
        {"role": "assistant", "function_call": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "get_weather", "input": {"city": "Oslo"}}]},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
        {"from": "tool_call", "value": '[{"name": "get_weather", "arguments": {"city": "Oslo", "unit": null}}]'},
        {"role": "assistant", "recipient": "functions.get_weather", "content": '{"city": "Oslo"}'},
    ],
)
def test_call_in_any_notation(message: dict[str, Any], tmp_path: Path) -> None:
    assert turns_of(message) == [Turn("assistant", "", tool_calls=(OSLO,))]
    (example,) = read(tmp_path, {"messages": [ASKED, message]})
    assert example.answer == '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
    assert example.reply == Turn("assistant", "", tool_calls=(OSLO,))


def test_call_with_arguments_that_are_no_json_keeps_them(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "", "function_call": {"name": "run", "arguments": "print(1)"}}
    (turn,) = turns_of(message)
    assert turn.tool_calls == (ToolCall("run", "print(1)"),)
    assert messages_of([turn])[0]["tool_calls"][0]["function"] == {"name": "run", "arguments": "print(1)"}


def test_several_calls_and_their_results_keep_their_order_and_ids(tmp_path: Path) -> None:
    calls = [{"id": f"c{i}", "function": {"name": "add", "arguments": {"a": i}}} for i in range(2)]
    results = [{"role": "tool", "content": str(i), "tool_call_id": f"c{i}"} for i in range(2)]
    row = {
        "messages": [
            *({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}),
            *({"role": "user", "content": "Add"}, {"role": "assistant", "content": "I add.", "tool_calls": calls}),
            *results,
            {"role": "assistant", "content": "Done"},
            {"role": "user", "content": "Thanks"},
        ]
    }
    (example,) = read(tmp_path, row)
    assert (example.question, example.answer) == ("Add", "Done")
    assert example.context == (Turn("user", "Hi"), Turn("assistant", "Hello"))
    called = tuple(ToolCall("add", f'{{"a": {i}}}', f"c{i}") for i in range(2))
    assert example.steps == (
        Turn("assistant", "I add.", tool_calls=called),
        Turn("tool", "0", tool_call_id="c0"),
        Turn("tool", "1", tool_call_id="c1"),
    )


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": WEATHER}],
        [WEATHER],
        json.dumps([WEATHER]),
        [{"type": "function", "function": WEATHER | {"strict": None}}],
    ],
)
@pytest.mark.parametrize("column", ["tools", "Functions"])
def test_tools_in_any_notation(tools: Any, column: str, tmp_path: Path) -> None:
    expected = [Example("1", "Hi", "Hello", (TOOLS,))]
    assert read(tmp_path, {"prompt": "Hi", "completion": "Hello", column: tools}) == expected
    columns = read_examples(origin_of(tmp_path / "rows.jsonl", "train", "train"))[1].columns
    assert columns.by_role["tools"] == [column]


@pytest.mark.parametrize("tools", [[], "[]", "", None, "hammer", ["hammer"]])
def test_column_that_lists_no_functions_declares_no_tools(tools: Any, tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": "Hi", "completion": "Hello", "tools": tools}) == [Example("1", "Hi", "Hello")]


def test_results_that_are_parts_of_a_turn_of_the_user(tmp_path: Path) -> None:
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "7 C"}]}
    used = {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Oslo"}}
    messages = [ASKED, {"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    (example,) = read(tmp_path, {"messages": [*messages, {"role": "assistant", "content": "No."}]})  # Anthropic
    assert (example.question, example.answer) == ("Is it warm in Oslo?", "No.")
    assert example.steps[1] == Turn("tool", "7 C", tool_call_id="c1")
    assert turns_of({"role": "user", "content": [result, {"type": "text", "text": "So?"}]})[1] == Turn("user", "So?")


def test_answer_column_of_calls(tmp_path: Path) -> None:
    row = {"query": "Warm?", "tools": json.dumps([WEATHER]), "answers": '[{"name": "get_weather", "arguments": {}}]'}
    (example,) = read(tmp_path, row)  # xLAM
    assert example.reply == Turn("assistant", "", tool_calls=(ToolCall("get_weather", "{}"),))
    assert example.context == (TOOLS,)


def test_call_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 1 has a tool call without a name; write it as name and arguments"):
        read(tmp_path, {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]})


# Reasoning ------------------------------------------------------------------------------------------------------------


@needs_cases
@pytest.mark.parametrize(
    ("case", "reasoning"),
    [("13_reasoning_content", "2 and 2 make 4, a long thought."), ("13c_harmony_analysis", "long thought")],
)
def test_reasoning_of_a_published_case(case: str, reasoning: str) -> None:
    (example,) = load_examples(CASES / case / "data.jsonl")
    assert example == Example("1", "2+2?", "4", reasoning=reasoning)
    assert example.reply == Turn("assistant", "4", reasoning)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "4", "thinking": "hm"}],
        [{"role": "assistant", "content": "4", "reasoning": "hm", "reasoning_content": None}],
        [{"role": "assistant", "content": "4", "reasoning": "hm", "reasoning_content": "hm"}],
        [{"from": "gpt", "value": "4", "reasoning_content": "hm"}],
        [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "4"}]}],
        [
            {"role": "assistant", "content": "hm", "channel": "analysis"},
            {"role": "assistant", "content": "4", "channel": "final"},
        ],
        [{"role": "assistant", "content": None, "thinking": "hm"}, {"role": "assistant", "content": "4"}],
    ],
)
def test_reasoning_in_any_notation(messages: list[dict[str, Any]]) -> None:
    assert turns_of(*messages) == [Turn("assistant", "4", "hm")]


@pytest.mark.parametrize("column", ["reasoning", "thinking", "Reasoning_Content", "Complex_CoT", "chain-of-thought"])
def test_reasoning_in_a_column_of_its_own(column: str, tmp_path: Path) -> None:
    assert read(tmp_path, {"question": "2+2?", "answer": "4", column: "hm"}) == [
        Example("1", "2+2?", "4", reasoning="hm")
    ]
    _, rows = read_examples(origin_of(tmp_path / "rows.jsonl", "train", "train"))
    assert rows.columns.by_role["reasoning"] == [column]
    named, rows = read_examples(origin_of(tmp_path / "rows.jsonl", "train", "train"), None, "answer")
    assert (named, rows.columns.unread) == ([Example("1", "2+2?", "4")], [column])


def test_reasoning_before_the_letter_of_an_option(tmp_path: Path) -> None:
    row = {"question": "2+2?", "choices": ["3", "4"], "reasoning": "hm"}
    examples = read(tmp_path, {**row, "answer": 1}, {**row, "answer": 0})
    assert [(example.answer, example.reasoning) for example in examples] == [("B", "hm"), ("A", "hm")]


def test_reasoning_that_the_reply_repeats_or_that_is_no_text_is_not_read(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2?", "completion": "<think>hm</think>4", "reasoning": "hm"}]
    rows += [{"prompt": "2+2?", "completion": "4", "reasoning": value} for value in (None, "", 3, ["hm"])]
    assert [example.reasoning for example in read(tmp_path, *rows)] == [""] * 5


def test_reasoning_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 1 has a turn whose reasoning is a list; write it as text"):
        read(tmp_path, {"messages": [ASKED, {"role": "assistant", "content": "4", "reasoning": [1]}]})


def test_messages_are_read_as_they_were_written() -> None:
    turns = [
        *(TOOLS, Turn("system", "s"), Turn("user", "q"), Turn("assistant", "t", "hm", (OSLO,))),
        *(Turn("tool", "7", name="get_weather", tool_call_id="1"), Turn("assistant", "a", is_trained=False)),
    ]
    assert parsed_turns(json.loads(json.dumps(messages_of(turns))), "row 1") == turns


# Turns that are not trained on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}])
def test_reply_that_is_not_trained_on_is_no_answer(skipped: dict[str, Any], tmp_path: Path) -> None:
    first, second = ({"role": "user", "content": text} for text in ("Who?", "Where?"))
    me, here = ({"role": "assistant", "content": text} for text in ("Me.", "Here."))
    rows = [
        {"messages": [first, {**me, "weight": 1, "loss": True, "train": True}, second, {**here, **skipped}]},
        {"messages": [first, {**me, **skipped}, second, here]},
        {"messages": [first, {**me, **skipped}]},
    ]
    untrained = Turn("assistant", "Me.", is_trained=False)
    assert read(tmp_path, *rows) == [
        Example("1", "Who?", "Me."),
        Example("2", "Where?", "Here.", (Turn("user", "Who?"), untrained)),
        Example("3", "Who?", None),
    ]


# Images and sound -----------------------------------------------------------------------------------------------------


@needs_cases
def test_images_of_a_published_case_are_refused() -> None:
    remedy = "only text is read: leave such rows out, or remove that column and <image> to ask without it"
    with pytest.raises(InputError, match=f"row 1 has images in 'images'; {remedy}"):
        load_examples(CASES / "14_mllm_images" / "data.jsonl")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "Who?", "completion": "He.", "images": ["a.png"]}, "images"),
        ({"prompt": "<image>Who?", "completion": "He.", "image": "a.png"}, "image"),
        ({"question": "Who?", "answer": "He.", "Image": {"bytes": "x", "path": None}}, "image"),
        ({"messages": [ASKED], "audios": ["a.wav"]}, "audios"),
        ({"messages": [{"role": "user", "content": "<video>What?"}], "videos": ["a.mp4"]}, "videos"),
    ],
)
def test_column_of_images_is_refused(row: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"row 1 has {name} in '{name}'; only text is read"):
        read(tmp_path, row)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "image_url"),
        ({"type": "input_audio", "input_audio": {"data": "x"}}, "input_audio"),
        ({"type": "image", "text": None}, "image"),
        ({"type": "video", "video": "a.mp4"}, "video"),
    ],
)
def test_part_that_is_no_text_is_refused(part: dict[str, Any], kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"row 1 has a turn with a part that is not text \({kind}\); only text is"):
        read(tmp_path, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}, part]}]})


def test_text_beside_an_empty_or_unrelated_column_is_read(tmp_path: Path) -> None:
    rows = [{"prompt": "Who?", "completion": "He.", "images": images, "image": "a note"} for images in ([], None, "")]
    assert read(tmp_path, *rows) == [Example(str(i), "Who?", "He.") for i in (1, 2, 3)]
    parts = [{"type": "text", "text": "Who?", "image_url": None}]
    assert turns_of({"role": "user", "content": parts}) == [Turn("user", "Who?")]


# Notations of whole conversations -------------------------------------------------------------------------------------


@needs_cases
@pytest.mark.parametrize("name", ["19_human_assistant_keys/data.jsonl", "19b_messages_as_string/data.csv"])
def test_notation_of_a_published_case(name: str) -> None:
    assert load_examples(CASES / name) == [Example("1", "Who?", "Me.")]


MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


@pytest.mark.parametrize(
    "value",
    [
        MESSAGES,
        [{"human": "Who?"}, {"assistant": "Me."}],
        [{"human": "Who?", "gpt": "Me."}],
        [{"human": "Who?", "assistant": None}, {"human": None, "assistant": "Me."}],  # as Parquet fills in
        [{"user": "Who?", "id": 3}, {"bot": "Me.", "id": 4}],
        [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}],
        [{"speaker": "Human", "text": "Who?"}, {"speaker": "Assistant", "text": "Me."}],
        [{"role": "user", "text": "Who?"}, {"role": "assistant", "value": "Me."}],
        json.dumps(MESSAGES),
        json.dumps(MESSAGES, indent=2),
        str(MESSAGES),  # as pandas writes a list into a CSV file
        {"role": ["user", "assistant"], "content": ["Who?", "Me."]},
        json.dumps({"from": ["human", "gpt"], "value": ["Who?", "Me."]}),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversation"])
def test_conversation_in_any_notation(value: Any, column: str, tmp_path: Path) -> None:
    assert is_turns(value)
    assert read(tmp_path, {column: value}) == [Example("1", "Who?", "Me.")]


HISTORY = [["Who?", "Me."]]


@pytest.mark.parametrize(
    "history", [HISTORY, json.dumps(HISTORY), str(HISTORY), MESSAGES, [{"from": "human", "value": "Who?"}, MESSAGES[1]]]
)
def test_history_in_any_notation(history: Any, tmp_path: Path) -> None:
    expected = Example("1", "Where?", "Here.", (Turn("user", "Who?"), Turn("assistant", "Me.")))
    assert read(tmp_path, {"instruction": "Where?", "output": "Here.", "history": history}) == [expected]


@pytest.mark.parametrize("history", [True, 3, "smoker for 12 years", None, [], {}])
def test_history_of_something_else_is_not_read(history: Any, tmp_path: Path) -> None:
    row = {"instruction": "Where?", "output": "Here.", "history": history}
    assert read(tmp_path, row) == [Example("1", "Where?", "Here.")]
    columns = read_examples(origin_of(tmp_path / "rows.jsonl", "train", "train"))[1].columns
    assert columns.unread == (["history"] if isinstance(history, str) else [])


def test_parts_of_a_turn(tmp_path: Path) -> None:
    gemini = [{"role": "user", "parts": [{"text": "Who?"}]}, {"role": "model", "parts": [{"text": "Me."}]}]
    assert read(tmp_path, {"messages": gemini}) == [Example("1", "Who?", "Me.")]


def test_turn_whose_content_has_another_name_is_refused(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "prompt": "Be kind."}, *MESSAGES]}
    with pytest.raises(InputError, match="row 1 has a turn without content among role, prompt; write its text as con"):
        read(tmp_path, row)


@pytest.mark.parametrize("field", [None, "solution"])
def test_conversation_beside_an_answer_column(field: str | None, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": MESSAGES, "solution": "Her."}))
    (example,), rows = read_examples(origin_of(tmp_path / "rows.jsonl", "train", "train"), None, field)
    assert example == Example("1", "Who?", "Me." if field is None else "Her.")
    assert rows.columns.by_role.get("answer") == (None if field is None else ["solution"])
    assert rows.columns.unread == (["solution"] if field is None else [])


@pytest.mark.parametrize(
    "value",
    ["[1, 2] is a list", '{"role": "user"}', "[{]", "[]", [], [1], [{"rating": 3}], {"role": "user"}, None, 3],
)
def test_other_values_are_no_conversation(value: Any) -> None:
    assert not is_turns(value)


def test_list_in_a_question_stays_a_text(tmp_path: Path) -> None:
    text = '[{"a": 1}] is what in Python?'
    assert read(tmp_path, {"question": text}) == [Example("1", text, None)]


def test_column_of_messages_that_are_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'messages' holds a text that is no conversation; write it as JSON"):
        read(tmp_path, {"messages": "[{'role': 'user' 'content'}"})
    with pytest.raises(InputError, match=r"'conversations' holds a list that is no conversation; write it as JSON"):
        read(tmp_path, {"conversations": [["Who?", "Me."]]})
