"""Prompts that were rendered already: by the templates of real models, and as people publish them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_templates import byte_tokenizer, real_templates

from sts_fast.data.examples import Example, load_examples
from sts_fast.data.rendered import undone
from sts_fast.data.turns import ToolCall, Turn

CASES = Path(__file__).parents[3] / "shared" / "cases"

ASKED = [Turn("user", "Why?"), Turn("assistant", "So."), Turn("user", "How?")]
ANSWERED = [*ASKED, Turn("assistant", "Thus.")]
BRIEF = Turn("system", "Be brief.")

# name: (text, its turns, how the reply begins)
RENDERED: dict[str, tuple[str, list[Turn], str]] = {
    "ChatML": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n"
        "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        [BRIEF, *ASKED],
        "",
    ),
    "Phi-4": (
        "<|im_start|>user<|im_sep|>Why?<|im_end|><|im_start|>assistant<|im_sep|>So.<|im_end|>",
        ANSWERED[:2],
        "",
    ),
    "Llama 2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] So. </s><s>[INST] How? [/INST] Thus. </s>",
        [BRIEF, *ANSWERED],
        "",
    ),
    "Llama 2, open": ("<s>[INST] Why? [/INST]", ASKED[:1], ""),
    "Llama 2, without the end": ("[INST] Why? [/INST] So", ASKED[:1], "So"),
    "Mistral": ("<s>[INST]Why?[/INST]So.</s>[INST]How?[/INST]", ASKED, ""),
    "Mistral Small": ("<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Why?[/INST]So.</s>", [BRIEF, *ASKED[:2]], ""),
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>",
        [BRIEF, *ASKED[:2]],
        "",
    ),
    "Llama 3.1, whose date is not the user's": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ASKED[:1],
        "",
    ),
    "Llama 4": (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nWhy?<|eot|><|header_start|>assistant<|header_end|>\n\n",
        ASKED[:1],
        "",
    ),
    "Gemma": (
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n"
        "<start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\n",
        ASKED,
        "",
    ),
    "Zephyr": ("<|system|>\nBe brief.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>", [BRIEF, *ASKED[:2]], ""),
    "Phi-3": ("<|user|>\nWhy?<|end|>\n<|assistant|>\nSo.<|end|>\n<|user|>\nHow?<|end|>\n<|assistant|>\n", ASKED, ""),
    "OpenAssistant": ("<|prompter|>Why?<|endoftext|><|assistant|>So.<|endoftext|>", ASKED[:2], ""),
    "Granite": (
        "<|start_of_role|>user<|end_of_role|>Why?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>So."
        "<|end_of_text|>",
        ASKED[:2],
        "",
    ),
    "Command R": (
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>So."
        "<|END_OF_TURN_TOKEN|>",
        ASKED[:2],
        "",
    ),
    "DeepSeek": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Why?<｜Assistant｜>So."
        "<｜end▁of▁sentence｜><｜User｜>How?<｜Assistant｜>",
        [BRIEF, *ASKED],
        "",
    ),
    "harmony": (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06<|end|><|start|>developer<|message|>Be brief.<|end|>"
        "<|start|>user<|message|>Is it warm?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>I look it up.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"
        '{"city": "Oslo"}<|call|><|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>7 C<|end|>'
        "<|start|>assistant<|channel|>analysis<|message|>That is cold.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>No.<|return|>",
        [
            BRIEF,
            Turn("user", "Is it warm?"),
            Turn("assistant", "", "I look it up.", (ToolCall("get_weather", '{"city": "Oslo"}'),)),
            Turn("tool", "7 C", name="get_weather"),
            Turn("assistant", "No.", "That is cold."),
        ],
        "",
    ),
    "harmony, open": ("<|start|>user<|message|>Why?<|end|><|start|>assistant", ASKED[:1], ""),
    "Alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd\n\n### Input:\n1 1\n\n### Response:\n",
        [Turn("user", "Add\n\n1 1")],
        "",
    ),
    "Alpaca with an answer": ("### Instruction:\nWhy?\n\n### Response:\nSo.", ASKED[:1], "So."),
    "Alpaca with a system prompt": ("Be brief.\n\n### Instruction:\nWhy?\n\n### Response:", [BRIEF, ASKED[0]], ""),
    "Guanaco": ("### Human: Why?### Assistant: So.### Human: How?### Assistant: Thus.", ASKED, "Thus."),
    "Guanaco, by lines": ("### Human:\nWhy?\n\n### Assistant:\n", ASKED[:1], ""),
    "HH-RLHF": ("\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: How?\n\nAssistant: Thus.", ASKED, "Thus."),
    "Vicuna": (
        "A chat between a user and an assistant. USER: Why? ASSISTANT: So.</s>USER: How? ASSISTANT:",
        [Turn("system", "A chat between a user and an assistant."), *ASKED],
        "",
    ),
    "Vicuna, by lines": ("USER: Why?\nASSISTANT: So.</s>\nUSER: How?\nASSISTANT: Thus.</s>", ANSWERED, ""),
}


@pytest.mark.parametrize(("text", "turns", "begun"), RENDERED.values(), ids=RENDERED.keys())
def test_rendered_prompt_is_undone(text: str, turns: list[Turn], begun: str) -> None:
    assert undone(text, "row 1") == (turns, begun)


@pytest.mark.parametrize(
    "text",
    [
        "What does [INST] mean, and [/INST]?",
        "Explain the tokens <|user|> and <|assistant|>.",
        "Explain the tokens <｜User｜> and <｜Assistant｜>.",
        "Which template writes <|im_start|>user\nHi<|im_end|>?",
        "What is the difference between ### Instruction: and ### Response: in a prompt?",
        "Why do people write '### Human: x' and '### Assistant: y'?",
        "Human: and Assistant: are the roles of HH-RLHF, are they not?",
        "Human rights: who wrote them down?",
        "Write a dialogue.\n\nHuman: Hello\n\nAssistant: Hi",
        "USER: what is that?",
        "In this log, USER: is written before ASSISTANT: and both are upper case.",
        "### Response: is a heading, what is under it?",
        "# Title\n\n## Input:\nx",
    ],
)
def test_text_that_mentions_marks_is_a_text(text: str) -> None:
    assert undone(text, "row 1") is None


def templates_with_known_marks() -> list[str]:
    stems = ("cohere", "deepseekv3", "gemma", "gemma3", "llama3", "llama3_2", "phi3", "phi3_5", "qwen2_5", "qwen3")
    return [path for path in real_templates() if Path(path).stem in stems]


@pytest.mark.parametrize("path", [pytest.param(path, id=Path(path).stem) for path in templates_with_known_marks()])
def test_what_a_real_template_renders_is_undone(path: str) -> None:
    """The oracle is the template itself: of what it wrote, the turns are what it was given."""
    tokenizer = byte_tokenizer(Path(path).read_text(encoding="utf-8"))
    tokenizer.bos_token = "<s>"
    turns = [Turn("user", "Why is 1 < 2?\n\nSay it."), Turn("assistant", "It is: so."), Turn("user", "How?")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    found = undone(text, "row 1")
    assert found is not None
    assert [turn for turn in found[0] if turn.role != "system"] == turns
    assert found[1] in ("", "<think>")


# In rows --------------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, *rows: dict[str, object]) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(path)


def test_rendered_rows_are_questions_and_answers(tmp_path: Path) -> None:
    expected = Example("1", "Who are you?", "A model.")
    for row in (
        {"text": "<s>[INST] Who are you? [/INST] A model. </s>"},
        {"text": "### Human: Who are you?### Assistant: A model."},
        {
            "prompt": "Below is an instruction.\n\n### Instruction:\nWho are you?\n\n### Response:\n",
            "completion": "A model.",
        },
        {"prompt": "<|user|>\nWho are you?<|end|>\n<|assistant|>\n", "completion": "A model."},
        {"chosen": "\n\nHuman: Who are you?\n\nAssistant: A model.", "rejected": "\n\nHuman: Who?\n\nAssistant: No."},
        {"instruction": "USER: Who are you? ASSISTANT:", "output": "A model."},
    ):
        (example,) = read(tmp_path, row)
        assert (example.question, example.answer) == (expected.question, expected.answer), row


def test_question_that_quotes_a_conversation_is_asked_whole(tmp_path: Path) -> None:
    for text in (
        "Human: Why?\n\nAssistant: So.\n\nIs that reply helpful?",
        "User: Why?\nAssistant: So.",
        "### Instruction:\nWhy?\n\n### Response:\nSo.\n\nIs that response right?",
    ):
        assert read(tmp_path, {"question": text, "answer": "no"}) == [Example("1", text, "no")]
    asked = read(tmp_path, {"prompt": "Human: Why?\n\nAssistant: So.\n\nHuman: How?\n\nAssistant:", "completion": "no"})
    assert asked == [Example("1", "How?", "no", (Turn("user", "Why?"), Turn("assistant", "So.")))]


def test_thought_that_a_prompt_opens_is_no_answer(tmp_path: Path) -> None:
    row = {"text": "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n"}
    assert read(tmp_path, row) == [Example("1", "Who?", None)]


def test_text_that_holds_the_answer_of_another_column_too_is_answered_once(tmp_path: Path) -> None:
    row = {"text": "### Instruction:\nWho?\n\n### Response:\nA model.", "output": "A model."}
    assert read(tmp_path, row) == [Example("1", "Who?", "A model.")]


@pytest.mark.parametrize("end", ["<|im_end|>\n", "<|eot_id|>", "</s>", "<end_of_turn>\n", "<｜end▁of▁sentence｜>"])
def test_mark_that_ends_a_reply_is_no_part_of_it(end: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Who?", "completion": f"Me.{end}"}))
    assert load_examples(path) == [Example("1", "Who?", "Me.")]


@pytest.mark.parametrize("reply", ["<|im_end|> ends a turn", "<s>struck</s>", "a < b|>"])
def test_reply_that_mentions_a_mark_is_whole(reply: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Who?", "completion": reply}))
    assert load_examples(path) == [Example("1", "Who?", reply)]


def test_reply_that_a_prompt_begins_is_continued(tmp_path: Path) -> None:
    row = {"prompt": "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\nI am", "completion": " a model."}
    assert read(tmp_path, row) == [Example("1", "Who?", "I am a model.")]
    row = {"prompt": "<｜User｜>Who?<｜Assistant｜><think>", "completion": "hm</think>Me."}
    assert read(tmp_path, row) == [Example("1", "Who?", "<think>hm</think>Me.")]


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside the checkout")
@pytest.mark.parametrize("case", ["18_guanaco", "18c_alpaca_prompt"])
def test_published_case(case: str) -> None:
    assert load_examples(CASES / case / "data.jsonl") == [Example("1", "Who are you?", "A model.")]
