"""Turns of conversations, as the rows of files hold them."""

from __future__ import annotations

import json
import re
from typing import Any

from sts_fast.data.values import encodable, kind_of
from sts_fast.errors import InputError

Turn = tuple[str, str]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool"),
}

_CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\r?\n(.*?)(<\|im_end\|>|\Z)", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")


def is_turns(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & {*value[0]})
    )


def parsed_turns(value: Any, where: str) -> list[Turn]:
    turns: list[Turn] = []
    for item in value:
        if not is_turns([item]):
            raise InputError(f"{where} has a turn that is {kind_of(item)}; write turns as role and content")
        name = item.get("role") if "role" in item else item["from"]
        role = ROLES.get(str(name).strip().lower())
        if role is None:
            raise InputError(f"{where} has a turn of the unknown role {name!r}; use system, user, assistant or tool")
        content = item["content"] if "content" in item else item.get("value")
        text = _turn_text(content, where)
        if not text.strip() and item.get("tool_calls"):
            text = encodable(json.dumps(item["tool_calls"], ensure_ascii=False, default=str), where, "tool_calls")
        if text.strip() or role in ("user", "tool"):
            turns.append((role, text))
    return turns


def _turn_text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list):  # parts, as of a multimodal chat
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"{where} has a turn with parts that are not text; keep only text")
        return "\n".join(encodable(part["text"], where, "content") for part in content)
    if not isinstance(content, str):
        raise InputError(f"{where} has a turn whose content is {kind_of(content)}; write it as text")
    return encodable(content, where, "content")


def chatml_turns(text: str, where: str) -> tuple[list[Turn], str]:
    """Turns of a prompt that was rendered already: the model's own template will render it again.

    The second value is what the open last turn makes the assistant begin with; a thought left empty does not count.
    """
    turns = [(match[1], match[2].strip(), bool(match[3])) for match in _CHATML_TURN.finditer(text)]
    prefill = ""
    if turns and turns[-1][0] == "assistant" and not turns[-1][2]:
        prefill = _EMPTY_THOUGHT.sub("", turns.pop()[1])
    return parsed_turns([{"role": role, "content": content} for role, content, _ in turns], where), prefill


def split_turns(turns: list[Turn], where: str) -> tuple[list[Turn], str, str | None]:
    """(earlier turns, question, answer): the last user turn that has a reply, else the last user turn."""
    user_turns = [i for i, (role, _) in enumerate(turns) if role == "user"]
    if not user_turns:
        raise InputError(f"{where} has no turn of the user; every conversation needs one")
    replied = [i for i in user_turns if i + 1 < len(turns) and turns[i + 1][0] == "assistant"]
    at = replied[-1] if replied else user_turns[-1]
    return turns[:at], turns[at][1], turns[at + 1][1] if replied else None
