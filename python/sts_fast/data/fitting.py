"""Changes of a conversation that a chat template refuses as it is, as trainers make them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from sts_fast.data.turns import ToolCall, Turn

# What a reader is told of each change, after "the model's chat template".
NOTES = {
    "system_in_user": "has no system turn: it is put in front of the next question",
    "results_as_user": "has no turns of tools: their results are written as turns of the user",
    "without_opening": "does not let the assistant open a conversation: what it says before the user is left out",
    "joined": "does not take two turns of one role in a row: they are joined",
    "numbered_calls": "does not take the ids of tool calls: they are numbered",
    "calls_as_text": "does not write tool calls: they are written as JSON behind the text of the turn",
    "text_in_reasoning": "does not take a text beside both reasoning and tool calls: it is put behind the reasoning",
    "without_text_of_calls": "does not write a text beside tool calls: it is left out",
    "without_reasoning": "does not write the assistant's reasoning: it is left out",
    "without_tools": "does not write which tools there are: they are left out",
}


@dataclass(frozen=True)
class Fit:
    """Changes of the conversations of one shape, none by default; see NOTES.

    text_arguments: the arguments of tool calls are given as JSON text; what is written is the same
    """

    system_in_user: bool = False
    results_as_user: bool = False
    without_opening: bool = False
    joined: bool = False
    text_in_reasoning: bool = False
    without_text_of_calls: bool = False
    without_reasoning: bool = False
    without_tools: bool = False
    text_arguments: bool = False
    numbered_calls: bool = False
    calls_as_text: bool = False

    def notes(self) -> tuple[str, ...]:
        return tuple(NOTES[one.name] for one in fields(self) if one.name in NOTES and getattr(self, one.name))

    def apply(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns as the template takes them."""
        changed = list(turns)
        if self.without_tools:
            changed = [turn for turn in changed if turn.role != "tools"]
        if self.text_in_reasoning:
            changed = [
                replace(turn, content="", reasoning=f"{turn.reasoning}\n\n{turn.content}") if _says_all(turn) else turn
                for turn in changed
            ]
        if self.without_text_of_calls:
            changed = [replace(turn, content="") if turn.tool_calls else turn for turn in changed]
        if self.without_reasoning:
            changed = [replace(turn, reasoning="") for turn in changed]
        if self.calls_as_text:
            changed = [replace(turn, content=turn.text, tool_calls=()) for turn in changed]
        if self.text_arguments:
            changed = [replace(turn, tool_calls=tuple(map(_with_text, turn.tool_calls))) for turn in changed]
        if self.numbered_calls:
            changed = _numbered(changed)
        if self.results_as_user:
            changed = [Turn("user", turn.content) if turn.role == "tool" else turn for turn in changed]
        if self.without_opening:
            changed = _without_opening(changed)
        if self.system_in_user:
            changed = _system_in_user(changed)
        return _joined(changed) if self.joined else changed


def fits(turns: Sequence[Turn]) -> Iterator[Fit]:
    """Fits that may make a template take the turns, those with the fewest changes first."""
    roles = [turn.role for turn in turns]
    has_calls = any(turn.tool_calls for turn in turns)
    spoken = [role for role in roles if role not in ("tools", "system")]
    relevant = {
        "text_arguments": has_calls,
        "numbered_calls": has_calls,
        "text_in_reasoning": any(map(_says_all, turns)),
        "without_text_of_calls": any(turn.tool_calls and turn.content for turn in turns),
        "without_reasoning": any(turn.reasoning for turn in turns),
        "calls_as_text": has_calls,
        "without_tools": "tools" in roles,
        "system_in_user": "system" in roles,
        "results_as_user": "tool" in roles,
        "joined": True,
        "without_opening": bool(spoken) and spoken[0] != "user",
    }
    names = [name for name, is_relevant in relevant.items() if is_relevant]
    for n in range(len(names) + 1):
        for chosen in itertools.combinations(names, n):
            if "text_in_reasoning" in chosen and "without_reasoning" in chosen:
                continue  # the text would be lost too
            yield Fit(**dict.fromkeys(chosen, True))


def _says_all(turn: Turn) -> bool:
    return bool(turn.content and turn.reasoning and turn.tool_calls)


def _with_text(call: ToolCall) -> ToolCall:
    return replace(call, arguments=json.dumps(call.arguments, ensure_ascii=False))


def _numbered(turns: Sequence[Turn]) -> list[Turn]:
    """With ids of nine digits, as Mistral's templates ask for; results are numbered in the order of the calls."""
    numbered: list[Turn] = []
    n_calls = n_results = 0
    for turn in turns:
        calls = [replace(call, id=f"{n_calls + i:09}") for i, call in enumerate(turn.tool_calls)]
        n_calls += len(calls)
        one = replace(turn, tool_calls=tuple(calls))
        if turn.role == "tool":
            one, n_results = replace(one, tool_call_id=f"{n_results:09}"), n_results + 1
        numbered.append(one)
    return numbered


def _without_opening(turns: Sequence[Turn]) -> list[Turn]:
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    return [turn for i, turn in enumerate(turns) if i >= first or turn.role in ("tools", "system")]


def _system_in_user(turns: Sequence[Turn]) -> list[Turn]:
    merged: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "system":
            waiting.append(turn.content.strip())
        elif turn.role == "user" and waiting:
            merged.append(replace(turn, content="\n\n".join([*waiting, turn.content])))
            waiting = []
        else:
            merged.append(turn)
    return [*merged, Turn("user", "\n\n".join(waiting))] if waiting else merged


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    joined: list[Turn] = []
    for turn in turns:
        last = joined[-1] if joined else None
        if last is None or last.role != turn.role or turn.role not in ("user", "assistant"):
            joined.append(turn)
            continue
        joined[-1] = replace(
            last,
            content="\n\n".join(filter(None, [last.content, turn.content])),
            reasoning="\n\n".join(filter(None, [last.reasoning, turn.reasoning])),
            tool_calls=(*last.tool_calls, *turn.tool_calls),
        )
    return joined


def signed(turns: Sequence[Turn], sign: str) -> tuple[Turn, ...]:
    """Turns of the same shape in which every text is a sign of its own: all that a fit depends on."""
    return tuple(_signed(turn, i, sign) for i, turn in enumerate(turns))


def _signed(turn: Turn, i: int, sign: str) -> Turn:
    said, thought, called = (f"{sign}{kind}{i}{sign}" for kind in ("said", "thought", "called"))
    if turn.role == "tools":
        schema = {"name": called, "description": sign, "parameters": {"type": "object", "properties": {}}}
        return Turn("tools", json.dumps([{"type": "function", "function": schema}], ensure_ascii=False))
    arguments = json.dumps({sign: sign}, ensure_ascii=False)
    return replace(
        turn,
        content=said if turn.content.strip() else "",
        reasoning=thought if turn.reasoning else "",
        tool_calls=tuple(
            ToolCall(f"{called}{at}", arguments if call.arguments.startswith("{") else sign, call.id)
            for at, call in enumerate(turn.tool_calls)
        ),
    )


def written(turns: Sequence[Turn], text: str) -> bool:
    """Whether a text holds all that signed turns of a fit say.

    Of the assistant, the tool calls and the text beside them: templates may cut into replies and thoughts.
    """
    names = [call.name for turn in turns for call in turn.tool_calls]
    names += [tool["function"]["name"] for turn in turns if turn.role == "tools" for tool in json.loads(turn.content)]
    contents = [turn.content for turn in turns if turn.role in ("system", "user", "tool") or turn.tool_calls]
    return all(part.strip() in text for part in [*names, *contents])
