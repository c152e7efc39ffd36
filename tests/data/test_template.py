"""How conversations are given to the chat templates of real models, and what is read of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from real_templates import byte_tokenizer, real_templates
from transformers import PreTrainedTokenizerFast

from sts_fast.data.examples import Example
from sts_fast.data.fitting import NOTES, Fit, fits
from sts_fast.data.prompts import build_prompts
from sts_fast.data.template import PromptTemplate, plain_text
from sts_fast.data.turns import ToolCall, Turn
from sts_fast.errors import InputError

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOLS = Turn("tools", json.dumps([WEATHER]))
OSLO = ToolCall("get_weather", '{"city": "Oslo"}', "abcdefghi")
RESULT = Turn("tool", "7 C", name="get_weather", tool_call_id="abcdefghi")
CALLING = [TOOLS, Turn("user", "Is it warm?"), Turn("assistant", "", tool_calls=(OSLO,)), RESULT]
REPLY = Turn("assistant", "No, it is cold.")
THOUGHTFUL = Turn("assistant", "It is four.", "two and two")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }} {% endfor %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('system role not supported') }}{% endif %}" + ALTERNATING
)


def every_template() -> list[object]:
    return [pytest.param(path, id=Path(path).stem) for path in real_templates()]


def template_of(path_or_text: str) -> tuple[PromptTemplate, PreTrainedTokenizerFast]:
    is_path = path_or_text.endswith(".jinja")
    tokenizer = byte_tokenizer(Path(path_or_text).read_text(encoding="utf-8") if is_path else path_or_text)
    return PromptTemplate(tokenizer), tokenizer


def real(name: str) -> PromptTemplate:
    path = next((path for path in real_templates() if Path(path).stem == name), None)
    if path is None:
        pytest.skip("trl, which ships the chat templates of real models, is not installed")
    return template_of(path)[0]


def read_of(template: PromptTemplate, turns: list[Turn]) -> list[str]:
    """What is read of each turn, decoded."""
    ids, owners = template.owned_ids(turns, len(turns))
    return [str(template.tokenizer.decode(ids[owners == i])) for i in range(len(turns))]


def message(turn: Turn) -> dict[str, object]:
    """A turn in the notation of Hugging Face's documentation."""
    calls = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        for call in turn.tool_calls
    ]
    result = {"name": turn.name, "tool_call_id": turn.tool_call_id} if turn.role == "tool" else {}
    return {"role": turn.role, "content": turn.content, **({"tool_calls": calls} if calls else {}), **result}


# Every template of a real model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", every_template())
def test_real_template_writes_calls_and_results_or_says_that_it_does_not(path: str) -> None:
    template, tokenizer = template_of(path)
    turns = [*CALLING, REPLY]
    text, notes = template.text(turns), template.notes(turns)
    if not notes:
        # The oracle is the template, called as Hugging Face's documentation says.
        messages = [message(turn) for turn in turns[1:]]
        expected = tokenizer.apply_chat_template(messages, tools=[WEATHER], tokenize=False, date_string="26 Jul 2024")
        date = re.compile(r"\d{4}-\d\d-\d\d|\d+ \w+ 20\d\d")
        assert date.sub("", text) == date.sub("", str(expected))
        assert "Weather of a city" in text
    assert ("Weather of a city" not in text) == (NOTES["without_tools"] in notes)
    for part in ("Is it warm?", "get_weather", "Oslo", "7 C", "No, it is cold."):
        assert part in text


@pytest.mark.parametrize("path", every_template())
def test_what_the_turns_say_is_read_and_nothing_of_a_real_template(path: str) -> None:
    template, _ = template_of(path)
    _, question, call, result, reply = read_of(template, [*CALLING, REPLY])
    assert (question, result, reply) == ("Is it warm?", "7 C", "No, it is cold.")
    # Of a call the name and the arguments, in the template's order and with its punctuation between key and value.
    assert re.fullmatch(r"(get_weather)?(city)\W*(</?\w+>\W*)*Oslo(get_weather)?", call), call
    assert call.count("get_weather") == 1


@pytest.mark.parametrize("path", every_template())
def test_real_template_shows_reasoning_or_says_that_it_does_not(path: str) -> None:
    template, _ = template_of(path)
    turns = [Turn("user", "What is 2 + 2?"), THOUGHTFUL]
    is_shown = "two and two" in template.text(turns)
    assert is_shown == (NOTES["without_reasoning"] not in template.notes(turns))
    question, reply = read_of(template, turns)
    assert question == "What is 2 + 2?"
    assert reply == ("two and twoIt is four." if is_shown else "It is four.")


@pytest.mark.parametrize("path", every_template())
@pytest.mark.parametrize(
    "turns",
    [
        [Turn("system", "Be brief."), Turn("user", "Why?"), REPLY],
        [Turn("user", "Hm."), Turn("user", "Why?"), REPLY],
        [Turn("assistant", "Hello!"), Turn("user", "Why?"), REPLY],
        [Turn("system", "Be brief."), Turn("assistant", "Hello!"), Turn("user", "Hm."), Turn("user", "Why?"), REPLY],
        [Turn("user", "Hm."), REPLY, Turn("system", "Be brief."), Turn("user", "Why?"), REPLY],
    ],
    ids=["system", "two questions", "opening", "all", "later system turn"],
)
def test_no_order_of_roles_stops_a_real_template(path: str, turns: list[Turn]) -> None:
    template, _ = template_of(path)
    notes = template.notes(turns)
    expected = [turn.content for turn in turns]
    if NOTES["without_opening"] in notes:
        expected[expected.index("Hello!")] = ""
    assert read_of(template, turns) == expected


# By hand --------------------------------------------------------------------------------------------------------------


def test_qwen_3_writes_tools_calls_results_and_reasoning() -> None:
    turns = [*CALLING[:2], Turn("assistant", "I look.", "hm", (OSLO,)), RESULT, REPLY]
    text = real("qwen3").text(turns)
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather"' in text
    assert (
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\nI look.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n7 C\n</tool_response><|im_end|>\n" in text
    )
    assert text.endswith("No, it is cold.<|im_end|>\n")


def test_demonstrations_keep_the_reasoning_that_a_template_drops_from_earlier_turns() -> None:
    turns = [Turn("user", "What is 2 + 2?"), THOUGHTFUL, Turn("user", "And 3 + 3?")]
    assert "<think>\ntwo and two\n</think>\n\nIt is four.<|im_end|>" in real("qwen3").text(turns)
    assert "<think>\ntwo and two\n</think>\n\nIt is four." in real("deepseek_r1_distill").text(turns)
    # In place of the empty thought that this template writes in earlier turns.
    assert "<|assistant|>\n<think>two and two</think>\nIt is four." in real("glm4moe").text(turns)
    assert "<|im_start|>assistant\n<think>\ntwo and two\n</think>\nIt is" in real("nemotron_3_nano").text(turns)
    demo = Example("d", "What is 2 + 2?", "It is four.", reasoning="two and two")
    query = Example("q", "And 3 + 3?", None)
    assert build_prompts("set", [query], real("qwen3"), draws=[[demo]]).warnings == ()
    # harmony writes thoughts as turns of their own, which cannot be put back.
    (warning,) = build_prompts("set", [query], real("gptoss"), draws=[[demo]]).warnings
    assert "shows demonstrations without a part of their answer" in warning.text
    assert warning.which == "1 of 1 demonstrations of 'set'"


@pytest.mark.parametrize(
    ("mentions", "written"),
    [
        ("<think>\\n", "<think>\ntwo and two\n</think>\n\nIt is four."),  # a template that opens the thought itself
        ("[/THINK]", "[THINK]two and two[/THINK]It is four."),
    ],
)
def test_reasoning_is_in_the_reply_where_the_template_writes_thoughts_so(mentions: str, written: str) -> None:
    opens = CHATML.replace("assistant\n{% endif %}", f"assistant\n{{{{ '{mentions}' }}}}{{% endif %}}")
    template, _ = template_of(opens)
    turns = [Turn("user", "What is 2 + 2?"), THOUGHTFUL]
    assert template.text(turns).endswith(f"<|im_start|>assistant\n{written}<|im_end|>\n")
    assert read_of(template, turns) == ["What is 2 + 2?", "two and twoIt is four."]
    assert template.notes(turns) == ()


def test_template_without_calls_gets_them_as_json() -> None:
    template, _ = template_of(CHATML)
    assert template.text([*CALLING, REPLY]) == (
        "<|im_start|>user\nIs it warm?<|im_end|>\n"
        '<|im_start|>assistant\n{"name": "get_weather", "arguments": {"city": "Oslo"}}<|im_end|>\n'
        "<|im_start|>tool\n7 C<|im_end|>\n<|im_start|>assistant\nNo, it is cold.<|im_end|>\n"
    )
    assert template.notes([*CALLING, REPLY]) == (NOTES["without_tools"], NOTES["calls_as_text"])


def test_template_that_wants_arguments_as_text_gets_them() -> None:
    calls = "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    template, _ = template_of(CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls))
    text = template.text(CALLING[1:])
    assert '<|im_start|>assistant\nget_weather{"city": "Oslo"}<|im_end|>' in text
    assert template.notes(CALLING[1:]) == ()


def test_template_that_asks_for_ids_of_nine_characters_gets_them() -> None:
    ids = (
        "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
        "{{ c.id }}:{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}"
    )
    template, _ = template_of(CHATML.replace("{{ m.content }}", "{{ m.content }}" + ids))
    turns = [Turn("user", "Add"), Turn("assistant", "", tool_calls=(ToolCall("add", "{}"), ToolCall("sub", "{}")))]
    turns += [Turn("tool", "1"), Turn("tool", "2")]
    assert template.text(turns).count("000000000") == template.text(turns).count("000000001") == 2
    assert template.notes(turns) == (NOTES["numbered_calls"],)
    assert "abcdefghi:get_weather" in template.text(CALLING)


def test_tokenizer_with_a_template_for_tools_takes_it_where_there_are_tools() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    template = PromptTemplate(tokenizer)
    assert template.text([Turn("user", "Why?")]) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert template.text([TOOLS, Turn("user", "Why?")]).startswith('[{"type": "function"')


def test_templates_without_a_default_are_named() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.chat_template = {"chat": CHATML, "rag": CHATML}
    with pytest.raises(InputError, match="has the chat templates chat, rag and none is called default: rename one of"):
        PromptTemplate(tokenizer)


def test_system_turn_joins_the_first_question_of_a_template_that_refuses_it() -> None:
    template, _ = template_of(LLAMA_2)
    turns = [Turn("system", "Be brief."), Turn("user", "Why?"), Turn("assistant", "So."), Turn("user", "How?")]
    assert template.text(turns) == "[user] Be brief.\n\nWhy? [assistant] So. [user] How? "
    assert read_of(template, turns) == ["Be brief.", "Why?", "So.", "How?"]
    assert template.notes(turns) == (NOTES["system_in_user"],)


def test_template_that_leaves_the_system_turn_out_is_found_out() -> None:
    template, _ = template_of(
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    )
    turns = [Turn("system", "Be brief."), Turn("user", "Why?")]
    assert template.text(turns) == "[user] Be brief.\n\nWhy? "
    assert template.notes(turns) == (NOTES["system_in_user"],)


def test_opening_and_questions_in_a_row_of_a_template_that_alternates() -> None:
    template, _ = template_of(ALTERNATING)
    turns = [Turn("assistant", "Hello!"), Turn("user", "Hm."), Turn("user", "Why?")]
    assert template.text(turns) == "[user] Hm.\n\nWhy? "
    assert template.notes(turns) == (NOTES["without_opening"], NOTES["joined"])
    assert template.text([*CALLING, REPLY]) == (
        '[user] Is it warm? [assistant] {"name": "get_weather", "arguments": {"city": "Oslo"}} [user] 7 C '
        "[assistant] No, it is cold. "
    )


def test_what_was_changed_is_told_with_the_prompts() -> None:
    template, _ = template_of(LLAMA_2)
    rows = [Example("1", "Why?", "So.", (Turn("system", "Be brief."),)), Example("2", "How?", "Thus.")]
    built = build_prompts("law", rows, template, draws=[[Example("3", "What?", "That.", reasoning="hm")]])
    assert tuple(map(str, built.warnings)) == (
        f"the model's chat template {NOTES['system_in_user']} (1 of 3 conversations of 'law')",
        f"the model's chat template {NOTES['without_reasoning']} (1 of 3 conversations of 'law')",
    )
    assert [template.tokenizer.decode(prompt.base_ids[prompt.positions]) for prompt in built.prompts] == [
        "Why?",
        "How?",
    ]
    assert [template.tokenizer.decode(prompt.demos_ids[prompt.paired_demos]) for prompt in built.prompts] == [
        "Why?",
        "How?",
    ]


def test_tools_open_the_prompt_before_the_demonstrations() -> None:
    template, _ = template_of(CHATML.replace("{% for m", "{{ tools | tojson if tools }}{% for m", 1))
    query = Example("q", "Is it warm?", "No.", (TOOLS,), steps=tuple(CALLING[2:]))
    demo = Example("d", "Is it wet?", "Yes.", (TOOLS, Turn("system", "Be brief.")))
    (prompt,) = build_prompts("set", [query], template, draws=[[demo]], tokens="all").prompts
    shown = template.tokenizer.decode(prompt.demos_ids)
    assert shown.startswith('[{"type": "function"')
    assert shown.count("Weather of a city") == 1
    assert shown.index("Weather of a city") < shown.index("Is it wet?") < shown.index("Is it warm?")
    assert "Be brief." not in shown
    read = template.tokenizer.decode(prompt.base_ids[prompt.positions])
    assert read == template.tokenizer.decode(prompt.demos_ids[prompt.paired_demos])
    assert read == 'Is it warm?get_weathercity": "Oslo7 CNo.'


def test_marks_in_the_text_are_named() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    rows = [
        Example("1", "Why<|im_end|>?", None),
        Example("2", "[AVAILABLE_TOOLS][] Why?", None),
        Example("3", "a", "b"),
    ]
    (warning,) = build_prompts("law", rows, PromptTemplate(tokenizer)).warnings
    assert "contains special tokens or marks of a chat template" in warning.text
    assert warning.which == "2 of 3 examples of 'law'"
    assert ", as <|im_end|>, [AVAILABLE_TOOLS], which" in warning.text
    assert build_prompts("law", rows[2:], PromptTemplate(tokenizer)).warnings == ()


def test_plain_text_holds_everything() -> None:
    turns = [Turn("tools", "[]"), Turn("user", "Warm?"), Turn("assistant", "I look.", "hm", (OSLO,)), RESULT, REPLY]
    assert plain_text(turns) == (
        '[]\n\nQuestion: Warm?\nAnswer: hm\n\nI look.\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n\n'
        "7 C\n\nAnswer: No, it is cold."
    )


def test_template_that_refuses_everything_is_told_with_a_remedy() -> None:
    with pytest.raises(InputError, match=r"cannot render turns of user: never; leave out rows .* another template"):
        template_of("{{ raise_exception('never') }}")[0].token_ids([Turn("user", "Why?")])


def test_fits_begin_with_none_and_change_as_little_as_possible() -> None:
    tried = list(fits([Turn("system", "s"), Turn("user", "q")]))
    assert tried == [
        *(Fit(), Fit(system_in_user=True), Fit(joined=True)),
        Fit(system_in_user=True, joined=True),
    ]
