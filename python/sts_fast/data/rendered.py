"""Prompts that were rendered already: their turns, which the model's own template will render again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from sts_fast.data.turns import ROLES, Turn, parsed_turns

# What tokenizers write before the first turn.
_START = (
    r"(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<\|endoftext\|>|<｜begin▁of▁sentence｜>|\[gMASK\]\s*<sop>|\s)*"
)
_END = r"</s>|<\|endoftext\|>|<\|end_of_text\|>"
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True)
class Layout:
    """How a template writes turns.

    header: pattern of the start of a turn, with a group `role`, and perhaps `channel` and `recipient`
    end:    pattern of what closes a turn
    needs:  pattern that a text must contain too, where people write such headers themselves as well; else ""
    before: pattern of the text before the first header, which is the system turn
    """

    header: str
    end: str
    needs: str = ""
    before: str = ""


_VICUNA = r"(?:A chat between .*?)?"
_LAYOUTS = (
    Layout(r"<\|im_start\|>(?P<role>\w+)(?:\r?\n|<\|im_sep\|>)", r"<\|im_end\|>"),  # ChatML, Phi-4
    Layout(r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>", r"<\|eot_id\|>|<\|eom_id\|>"),  # Llama 3
    Layout(r"<\|header_start\|>(?P<role>\w+)<\|header_end\|>", r"<\|eot\|>"),  # Llama 4
    Layout(r"<start_of_turn>(?P<role>user|model)\n", r"<end_of_turn>"),  # Gemma
    Layout(  # harmony, of gpt-oss
        r"<\|start\|>(?P<role>[\w.]+)(?: to=(?P<to>[\w.]+))?(?:<\|channel\|>(?P<channel>\w+)"
        r"(?: to=(?P<recipient>[\w.]+))?[^<]*(?:<\|constrain\|>\w+)?)?(?:<\|message\|>|\Z)",
        r"<\|end\|>|<\|return\|>|<\|call\|>",
    ),
    Layout(r"<\|start_of_role\|>(?P<role>\w+)<\|end_of_role\|>", r"<\|end_of_text\|>"),  # Granite
    Layout(  # Command R
        r"<\|START_OF_TURN_TOKEN\|><\|(?P<role>SYSTEM|USER|CHATBOT)_TOKEN\|>", r"<\|END_OF_TURN_TOKEN\|>"
    ),
    Layout(  # Zephyr, Phi-3, Tulu, GLM-4, OpenAssistant
        r"<\|(?P<role>system|user|assistant|prompter|observation)\|>", r"</s>|<\|end\|>|<\|endoftext\|>"
    ),
    Layout(  # DeepSeek, whose system turn has no header
        r"<[｜|](?P<role>User|Assistant)[｜|]>",
        r"<｜end▁of▁sentence｜>",
        before=r"(?:(?<=<｜begin▁of▁sentence｜>)[^<]*)?",
    ),
    Layout(  # Alpaca
        r"^#{2,3} ?(?P<role>System|Instruction|Input|Response):[ \t]*", _END, r"^#{2,3} ?Response:", r".*?"
    ),
    Layout(  # Guanaco, whose turns may be on one line
        r"#{2,3} ?(?P<role>System|Human|User|Assistant):[ \t]*", _END, r"#{2,3} ?Assistant:", _VICUNA
    ),
    Layout(r"^(?P<role>Human|User|Assistant):[ \t]*", _END, r"^Assistant:"),  # HH-RLHF
    Layout(  # Vicuna, whose turns may be on one line
        r"(?:^|(?<=\s)|(?<=</s>))(?P<role>USER|ASSISTANT):[ \t]*", r"</s>", r"\sASSISTANT:", _VICUNA
    ),
)
# Without one of these a text is not rendered; most texts have none.
_ANY = re.compile(r"<\||<｜|<start_of_turn>|\[INST\]|^#{2,3} ?\w+:|^(?:Human|User):|USER:", re.MULTILINE)
_ROLES = {**ROLES, "instruction": "user", "input": "user", "response": "assistant", "chatbot": "assistant"}
# What templates write of their own accord into the system turn, or where it would be.
_OWN = re.compile(
    r"Below is an instruction that describes a task.*"
    r"|You are ChatGPT, a large language model trained by OpenAI\.\nKnowledge cutoff.*"
    r"|Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\s*",
    re.DOTALL,
)

_LAST_MARK = re.compile(rf"(?:{'|'.join(layout.end for layout in _LAYOUTS)})\Z")
_INST = re.compile(r"\[INST\](?P<user>.*?)\[/INST\](?P<assistant>.*?)(?=(?:<s>\s*)?\[INST\]|\Z)", re.DOTALL)
_SYS = re.compile(r"\s*<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)
_SYSTEM_PROMPT = r"\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]"


def undone(text: str, where: str, reply: str = "") -> tuple[list[Turn], str] | None:
    """The turns of a text that some chat template rendered, None of any other text; `where` names the row in errors.

    The second value is what the open last turn makes the assistant begin with; a thought left empty does not count.
    Only a text that begins with the marks of a template is rendered: one that mentions them is not. Nor is one that
    ends with a reply although the row has another one, where its marks are words that people write too: it quotes a
    conversation.

    reply: that of the row, where it has one apart from the text
    """
    text = text.strip()
    if not _ANY.search(text):
        return None
    marked, worded = ([layout for layout in _LAYOUTS if bool(layout.needs) == are] for are in (False, True))
    found = _undone_inst(text) or _first(text, marked)
    is_worded = found is None
    found = found or _first(text, worded)
    if found is None:
        return None
    messages, is_open = found
    if is_worded and is_open and reply.strip() and reply.strip() not in messages[-1]["content"] != "":
        return None
    for message in messages:
        if message["role"] == "system":
            message["content"] = _OWN.sub("", message["content"])
    begun = _EMPTY_THOUGHT.sub("", messages.pop()["content"]) if is_open else ""
    return parsed_turns(messages, where), begun


def without_end(reply: str) -> str:
    """A reply without the marks with which a template closes a turn; <s>HTML</s> is none."""
    text = reply.rstrip()
    if "<s>" in text or not _LAST_MARK.search(text):
        return reply
    return without_end(_LAST_MARK.sub("", text))


def _first(text: str, layouts: Iterable[Layout]) -> tuple[list[dict[str, str]], bool] | None:
    return next(filter(None, (_undone_headers(text, layout) for layout in layouts)), None)


def _undone_headers(text: str, layout: Layout) -> tuple[list[dict[str, str]], bool] | None:
    """(messages, whether the last one is an open turn of the assistant)."""
    flags = re.DOTALL | re.MULTILINE
    start = re.match(rf"{_START}(?P<before>{layout.before}){_START}(?={layout.header})", text, flags)
    if start is None or (layout.needs and not re.search(layout.needs, text, flags)):
        return None
    headers = [*re.finditer(layout.header, text, flags)]
    messages: list[dict[str, str]] = [{"role": "system", "content": start["before"].strip()}]
    closed = True
    for header, following in zip(headers, [*headers[1:], None], strict=True):
        of_turn = text[header.end() : None if following is None else following.start()]
        content, *behind = re.split(layout.end, of_turn, maxsplit=1)
        closed = bool(behind)
        role = _ROLES.get(header["role"].lower(), header["role"])
        if header["role"] == "Input" and messages[-1]["role"] == "user":
            messages[-1]["content"] += "\n\n" + content.strip()
            continue
        message = {"role": role, "content": content.strip()}
        if role.startswith("functions."):
            message |= {"role": "tool", "name": role.removeprefix("functions.")}
        of_header = header.groupdict()
        message |= {key: of_header[key] for key in ("channel", "recipient") if of_header.get(key)}
        message |= {"recipient": of_header["to"]} if of_header.get("to") else {}
        messages.append(message)
    if layout.needs and messages[1]["role"] == "assistant":
        return None  # a text that contains such words
    return messages, messages[-1]["role"] == "assistant" and not closed


def _undone_inst(text: str) -> tuple[list[dict[str, str]], bool] | None:
    """The same of Llama 2 and Mistral."""
    start = re.match(rf"{_START}(?:{_SYSTEM_PROMPT})?\s*(?=\[INST\])", text, re.DOTALL)
    if start is None or not _INST.search(text):
        return None
    messages = [{"role": "system", "content": (start[1] or "").strip()}]
    closed = True
    for turn in _INST.finditer(text):
        user, reply = turn["user"], turn["assistant"]
        if system := _SYS.match(user):
            messages[0]["content"], user = system[1], user[system.end() :]
        content, *behind = reply.split("</s>", maxsplit=1)
        closed = bool(behind)
        messages += [{"role": "user", "content": user.strip()}, {"role": "assistant", "content": content.strip()}]
    return messages, not closed
