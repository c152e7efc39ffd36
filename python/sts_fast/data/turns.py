"""Turns of conversations, as the rows of files hold them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sts_fast.data.values import encodable, kind_of
from sts_fast.errors import InputError, UnusableRow

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    "tools": "tools",
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "function_response", "ipython"), "tool"),
}
# Roles whose turns open a conversation, before any demonstration: templates allow one of each.
HEAD_ROLES = ("tools", "system")

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# A turn may also be {"human": "..."}; words that other records use as keys are not taken for speakers.
SPEAKER_KEYS = ("system", "user", "human", "prompter", "assistant", "gpt", "chatgpt", "bot")

MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
_MEDIA_SIGNS = ("<image>", "<video>", "<audio>")
_MEDIA_REMEDY = "only text is read: leave such rows out, or remove {} to ask without it"


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; arguments: the JSON text of an object; id: what its result refers to, may be empty."""

    name: str
    arguments: str
    id: str = ""

    def __str__(self) -> str:
        return f'{{"name": {json.dumps(self.name, ensure_ascii=False)}, "arguments": {self.arguments or "{}"}}}'


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    role:         system, user, assistant or tool; 'tools' for the first turn of a conversation that declares tools
    content:      its text; of 'tools' the JSON list of their schemas
    reasoning:    what the assistant thinks before it replies, where that is apart from the content
    tool_calls:   what the assistant calls behind its content
    name, tool_call_id: of a tool's result: the tool, and the call that it answers; may be empty
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""

    @property
    def text(self) -> str:
        """The content, with the tool calls as JSON, one a line, behind it."""
        return "\n".join([*filter(None, [self.content]), *map(str, self.tool_calls)])


def is_turns(value: Any) -> bool:
    """Whether a value of a row is a conversation, also as JSON text or as {"role": [...], "content": [...]}."""
    return _items(value) is not None


def parsed_turns(value: Any, where: str) -> list[Turn]:
    """The turns of a value that `is_turns`; `where` names the row in errors.

    Turns are {role, content}, {from, value}, {speaker, text} or {"human": ..., "assistant": ...}. Thoughts and tool
    calls that are turns of their own, as in harmony's channels and in ShareGPT, join the turn that they lead to.
    Raises InputError for unknown roles, and for content other than text.
    """
    turns: list[Turn] = []
    for item in _items(value) or []:
        if not _is_turn(item):
            raise UnusableRow(where, f"a turn that is {kind_of(item)}", "write turns as role and content")
        for turn in _turns_of(item, where):
            if not (turn.content.strip() or turn.reasoning or turn.tool_calls or turn.role in ("user", "tool")):
                continue
            if turns and turn.role == "assistant" and _only_thinks(turns[-1]):
                thoughts = [turns.pop().reasoning, turn.reasoning]
                turns.append(replace(turn, reasoning="\n\n".join(filter(None, thoughts))))
            else:
                turns.append(turn)
    return turns


def tools_turn(value: Any, where: str) -> Turn | None:
    """The turn that declares the tools of a `tools` column: a list or its JSON text. None where it lists no tools."""
    tools = _loaded(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not tools:
        return None
    schemas: list[Any] = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        # Files with a schema of their own, such as Parquet, fill in the keys of all other tools with nulls.
        schemas.append({"type": "function", "function": _without_nulls(function)})
    return Turn("tools", encodable(json.dumps(schemas, ensure_ascii=False, default=str), where, "tools"))


def reasoning_of(fields: Mapping[str, Any], where: str) -> str:
    """What is written apart from a reply as its reasoning, in a message or in a row; empty where nothing is.

    fields: by key, or by column name in lower case
    Raises InputError where it is no text.
    """
    return next((_reasoning(fields[key], where) for key in REASONING_KEYS if fields.get(key)), "")


def split_turns(turns: Sequence[Turn], where: str) -> tuple[list[Turn], str, list[Turn], Turn | None]:
    """(earlier turns, question, steps, reply).

    The question is the last user turn that is replied to, else the last one. The reply is the last turn of the
    assistant before the user speaks again; the steps are the calls and results between them.
    """
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        raise InputError(f"{where} has no turn of the user; every conversation needs one")
    ends = dict(zip(users, [*users[1:], len(turns)], strict=True))
    replies = {
        at: max((i for i in range(at, end) if turns[i].role == "assistant"), default=None) for at, end in ends.items()
    }
    at = max((at for at, reply in replies.items() if reply is not None), default=users[-1])
    reply = replies[at]
    steps = turns[at + 1 : ends[at] if reply is None else reply]
    return list(turns[:at]), turns[at].content, list(steps), None if reply is None else turns[reply]


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as Hugging Face's chat templates and trainers take them; one that declares tools has the role 'tools'."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": call.id} if call.id else {}),
                    "function": {"name": call.name, "arguments": _arguments(call.arguments)},
                }
                for call in turn.tool_calls
            ]
        message |= {key: text for key in ("name", "tool_call_id") if (text := getattr(turn, key))}
        messages.append(message)
    return messages


def check_no_media(fields: Mapping[str, Any], turns: Sequence[Turn], where: str) -> None:
    """Raises InputError where a row has images, videos or audio beside its text.

    fields: the row by column names in lower case
    """
    signs = [sign for sign in _MEDIA_SIGNS if any(sign in turn.content for turn in turns)]
    for name in MEDIA_COLUMNS:
        value = fields.get(name)
        # A text under such a name may be any remark, unless the turns show where the image goes.
        if value in (None, "", [], {}) or (isinstance(value, str) and not signs and not name.endswith("s")):
            continue
        if isinstance(value, (str, list, dict, bytes)):
            raise InputError(f"{where} has {name} in {name!r}; " + _MEDIA_REMEDY.format("that column"))


def _items(value: Any) -> list[Any] | None:
    """The messages of a value that is a conversation, None of another."""
    if isinstance(value, str):
        # As CSV files hold them; a text in brackets that is no conversation is a text.
        value = _loaded(value) if value.lstrip()[:2] in ("[{", "[\n", "[ ", '{"') else None
    if isinstance(value, dict):
        columns = [(key, value[key]) for keys in (ROLE_KEYS, CONTENT_KEYS) for key in keys if key in value]
        if len(columns) != 2 or not all(isinstance(column, list) for _, column in columns):
            return None
        (role, roles), (content, contents) = columns
        if len(roles) != len(contents):
            return None
        value = [{role: one, content: text} for one, text in zip(roles, contents, strict=True)]
    return value if isinstance(value, list) and value and _is_turn(value[0]) else None


def _is_turn(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    spoken = [item[key] for key in SPEAKER_KEYS if key in item]
    return bool({*ROLE_KEYS} & {*item}) or (bool(spoken) and all(isinstance(text, str | None) for text in spoken))


def _turns_of(item: Mapping[str, Any], where: str) -> list[Turn]:
    """The turns of one message: one, but {"human": ..., "assistant": ...} holds two."""
    key = next((key for key in ROLE_KEYS if key in item), None)
    if key is None:
        return [
            Turn(ROLES[key], encodable(text, where, key))
            for key in item
            if key in SPEAKER_KEYS and (text := item[key]) is not None
        ]
    name = str(item[key]).strip().lower()
    role = ROLES.get(name)
    if role is None:
        raise InputError(f"{where} has a turn of the unknown role {item[key]!r}; use system, user, assistant or tool")
    if role == "tools":
        if (declared := tools_turn(item.get("content"), where)) is None:
            raise InputError(f"{where} has a turn of tools that is no list of functions; write each with its name")
        return [declared]
    content, thoughts, calls = _content(next((item[key] for key in CONTENT_KEYS if key in item), None), where)
    if role != "assistant":
        tool, call = (str(item.get(key) or "") if role == "tool" else "" for key in ("name", "tool_call_id"))
        return [Turn(role, content, name=tool, tool_call_id=call)]
    thoughts.append(reasoning_of(item, where))
    for key in ("tool_calls", "function_call"):
        calls += _calls(item.get(key), where)
    recipient = str(item.get("recipient") or "")
    if recipient.startswith("functions."):
        called = {"name": recipient.removeprefix("functions."), "arguments": content}
        content, calls = "", [*calls, _call(called, where)]
    elif item.get("channel") == "analysis":
        content, thoughts = "", [*thoughts, content]
    elif name in ("function_call", "tool_call") and (loaded := _loaded(content)) is not content:
        content, calls = "", [*calls, *_calls(loaded, where)]
    return [Turn(role, content, "\n\n".join(filter(None, thoughts)), tuple(calls))]


def _only_thinks(turn: Turn) -> bool:
    return bool(turn.reasoning) and not turn.content and not turn.tool_calls


def _reasoning(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UnusableRow(where, f"a turn whose reasoning is {kind_of(value)}", "write it as text")
    return encodable(value, where, "reasoning")


def _content(content: Any, where: str) -> tuple[str, list[str], list[ToolCall]]:
    """(text, thoughts, tool calls) of a message's content: a text, or parts as of a multimodal chat."""
    if content is None:
        return "", [], []
    if isinstance(content, str):
        return encodable(content, where, "content"), [], []
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise UnusableRow(where, f"a turn whose content is {kind_of(content)}", "write it as text")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for part in content:
        if isinstance(part, str):
            texts.append(encodable(part, where, "content"))
        elif isinstance(part, dict) and part.get("type") == "thinking":
            thoughts.append(_reasoning(part.get("thinking"), where))
        elif isinstance(part, dict) and part.get("type") == "tool_use":
            calls.append(_call({**part, "arguments": part.get("input")}, where))
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(encodable(part["text"], where, "content"))
        else:
            kind = part.get("type") or next(iter(part), "nothing") if isinstance(part, dict) else kind_of(part)
            raise InputError(
                f"{where} has a turn with a part that is not text ({kind}); " + _MEDIA_REMEDY.format("the part")
            )
    return "\n".join(texts), thoughts, calls


def _calls(value: Any, where: str) -> list[ToolCall]:
    value = _loaded(value) if isinstance(value, str) else value
    if not value:
        return []
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _call(value: Any, where: str) -> ToolCall:
    """A call as {"function": {name, arguments}} or {name, arguments}."""
    function = (value.get("function") or value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has a tool call without a name; write it as name and arguments")
    given: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
    arguments = _loaded(given) if isinstance(given, str) else _without_nulls(given)
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    return ToolCall(
        encodable(function["name"], where, "tool_calls"),
        encodable(text, where, "tool_calls"),
        encodable(value.get("id") or "", where, "tool_calls"),
    )


def _loaded(text: str) -> Any:
    """A list or object that a text spells as JSON, or as Python prints it; else the text itself."""
    for load in (json.loads, ast.literal_eval):
        try:
            value = load(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, (list, dict)):
            return value
    return text


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
