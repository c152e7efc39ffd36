"""Turns of conversations, as the rows of files hold them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sts_fast.data.values import encodable, kind_of, parsed
from sts_fast.errors import UnusableRow, listed

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
CONTENT_KEYS = ("content", "value", "text", "parts")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# With these at 0 or false, trainers leave a turn out: OpenAI, ms-swift, Axolotl.
WEIGHT_KEYS = ("weight", "loss", "train")
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
    is_trained:   False of a reply that its data set excludes from training: it is shown, but is no answer
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    tool_call_id: str = ""
    is_trained: bool = True

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
    Raises UnusableRow for unknown roles, and for content other than text.
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


def split_turns(turns: Sequence[Turn], where: str) -> tuple[list[Turn], str, list[Turn], Turn | None]:
    """(earlier turns, question, steps, reply).

    The question is the last user turn with a reply to train on, else the last one. The reply is the last such turn of
    the assistant before the user speaks again; the steps are the calls and results between them.
    Raises UnusableRow where the user says nothing.
    """
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        raise UnusableRow(where, "no turn of the user", "every conversation needs one")
    ends = dict(zip(users, [*users[1:], len(turns)], strict=True))
    replies = {
        at: max((turns[i].is_trained, i) for i in range(at, end) if turns[i].role == "assistant")
        for at, end in ends.items()
        if any(turn.role == "assistant" for turn in turns[at:end])
    }
    at = max((at for at, (is_trained, _) in replies.items() if is_trained), default=users[-1])
    is_trained, end = replies.get(at, (False, ends[at]))
    return list(turns[:at]), turns[at].content, list(turns[at + 1 : end]), turns[end] if is_trained else None


def history_turns(value: Any, where: str) -> list[Turn]:
    """The turns of a `history` column: [question, answer] pairs, as Alpaca has them, or a conversation.

    Raises UnusableRow where it is another list.
    """
    pairs = parsed(value)
    if not isinstance(pairs, list):
        return []  # a text under such a name may be any remark
    if is_turns(pairs):
        return parsed_turns(pairs, where)
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise UnusableRow(where, "a history that is no list of [question, answer] pairs", "correct it")
    roles = ("user", "assistant")
    return [
        Turn(role, encodable(text, where, "history")) for pair in pairs for role, text in zip(roles, pair, strict=True)
    ]


def calls_turn(value: Any, where: str) -> list[Turn]:
    """The turn of the assistant that a list of tool calls is; none of anything else."""
    is_calls = isinstance(value, list) and value and all(isinstance(call, dict) for call in value)
    if not is_calls or not all({"name", "arguments"} <= call.keys() for call in value):
        return []
    return [Turn("assistant", "", tool_calls=tuple(_calls(value, where)))]


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
        message |= {} if turn.is_trained else {"weight": 0}
        messages.append(message)
    return messages


def check_no_media(fields: Mapping[str, Any], turns: Sequence[Turn], where: str) -> None:
    """Raises UnusableRow where a row has images, videos or audio beside its text.

    fields: the row by column names in lower case
    """
    signs = [sign for sign in _MEDIA_SIGNS if any(sign in turn.content for turn in turns)]
    for name in MEDIA_COLUMNS:
        value = parsed(fields.get(name))
        # A text under such a name may be any remark, unless the turns show where the image goes.
        if value in (None, "", [], {}) or (isinstance(value, str) and not signs and not name.endswith("s")):
            continue
        if isinstance(value, (str, list, dict, bytes)):
            raise UnusableRow(where, f"{name} in {name!r}", _MEDIA_REMEDY.format(" and ".join(["that column", *signs])))


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
        reason = f"a turn of the unknown role {item[key]!r}"
        raise UnusableRow(where, reason, "use system, user, assistant or tool")
    if role == "tools":
        if (declared := tools_turn(item.get("content"), where)) is None:
            raise UnusableRow(where, "a turn of tools that is no list of functions", "write each with its name")
        return [declared]
    given = next((item[key] for key in CONTENT_KEYS if key in item), None)
    if isinstance(given, list) and (results := [part for part in given if _is_result(part)]):
        said = [part for part in given if not _is_result(part)]
        turns = [_result(part, where) for part in results]
        return [*turns, *(_turns_of({**item, "content": said}, where) if said else ())]
    content, thoughts, calls = _content(given, where)
    if not {*CONTENT_KEYS, *REASONING_KEYS, "tool_calls", "function_call"} & item.keys():
        raise UnusableRow(where, f"a turn without content among {listed(item)}", "write its text as content")
    if role != "assistant":
        tool, call = (str(item.get(key) or "") if role == "tool" else "" for key in ("name", "tool_call_id"))
        return [Turn(role, content, name=tool, tool_call_id=call)]
    thoughts += [_reasoning(item[key], where) for key in REASONING_KEYS if item.get(key)][:1]
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
    is_trained = not any(item.get(key) == 0 for key in WEIGHT_KEYS)
    return [Turn(role, content, "\n\n".join(filter(None, thoughts)), tuple(calls), is_trained=is_trained)]


def _is_result(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "tool_result"


def _result(part: Mapping[str, Any], where: str) -> Turn:
    """The turn of a tool's result that is a part of a user's message, as Anthropic's API has it."""
    return Turn("tool", _content(part.get("content"), where)[0], tool_call_id=str(part.get("tool_use_id") or ""))


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
            raise UnusableRow(where, f"a turn with a part that is not text ({kind})", _MEDIA_REMEDY.format("the part"))
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
        raise UnusableRow(where, "a tool call without a name", "write it as name and arguments")
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
