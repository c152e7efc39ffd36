"""Renders conversations as token ids, and tells which of the tokens are part of a turn's text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data import fitting
from sts_fast.data.fitting import Fit
from sts_fast.data.turns import REASONING_KEYS, Turn, messages_of
from sts_fast.errors import InputError, listed, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from sts_fast.statistics import IntArray

# Some chat templates print today's date; with a fixed one a forecast is the same tomorrow.
TEMPLATE_DATE = "26 Jul 2024"
FIXED_DATE = "{%- macro strftime_now(format) -%}" + TEMPLATE_DATE + "{%- endmacro %}"

# Stands in a template's text for an answer that is put there afterwards; from Unicode's private use area.
SIGN = "\ue0f5"

# What opens thoughts in the turn of their reply; marks such as <|channel|> open a turn of their own.
_THOUGHT_MARK = re.compile(r"(?:<[^<>|]+>|\[[A-Z]+\])\s*\Z")

# Whose a token is that is no turn's.
TEMPLATE, STRADDLING = -1, -2


@dataclass(frozen=True)
class Thoughts:
    """How a template writes what the assistant thinks before it replies.

    has_key: it reads the thoughts from a key of the message; else they are part of the content
    before, between: what is written in front of the thoughts, and between them and the reply
    in_reply: the thoughts are in the same turn as the reply, so that they can be written where the reply is
    """

    has_key: bool
    before: str
    between: str
    in_reply: bool = True

    def whole(self, turn: Turn) -> str:
        """The reply with its thoughts in front, as the template writes them."""
        if not turn.reasoning or not self.in_reply:
            return turn.content.strip()
        return f"{self.before}{turn.reasoning.strip()}{self.between}{turn.content.strip()}".strip()


# How models write thoughts into the content, by a mark that is in their templates.
_IN_CONTENT = {
    "<think>": Thoughts(False, "<think>\n", "\n</think>\n\n"),
    "</think>": Thoughts(False, "<think>\n", "\n</think>\n\n"),
    "[/THINK]": Thoughts(False, "[THINK]", "[/THINK]"),
}


class PromptTemplate:
    """Renders turns as token ids: with the tokenizer's own chat template, else as plain question and answer text.

    prepend_bos: put the tokenizer's BOS before plain text even where the tokenizer itself does not (SAEs record how
        they were trained); a chat template always decides for itself, so that no prompt gets two.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, prepend_bos: bool = False) -> None:
        self.tokenizer = tokenizer
        self.is_chat = bool(getattr(tokenizer, "chat_template", None))
        self.prepend_bos = prepend_bos and tokenizer.bos_token_id is not None
        # Turn marks such as <|start_header_id|> are special tokens too, but not named ones.
        marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = np.asarray(sorted(marks | set(tokenizer.all_special_ids)), dtype=np.int32)
        marks_of_ids = map(str, tokenizer.convert_ids_to_tokens(self.special_ids.tolist()))
        self.marks = [mark for mark in marks_of_ids if mark.strip()]
        self._chat_template = self._dated() if self.is_chat else None
        # Templates of models that see images may want a turn as a list of parts, and show nothing of a plain text.
        self._in_parts = self.is_chat and not self._shows_questions() and self._shows_questions(in_parts=True)
        self._fits: dict[tuple[Turn, ...], Fit] = {}

    def token_ids(self, turns: Sequence[Turn]) -> IntArray:
        """[n] int32 token ids of turns; a conversation that ends with the user is left open to answer.

        Raises InputError where the model's chat template refuses the turns.
        """
        return self.written_ids(self._written(turns))

    def written_ids(self, text: str) -> IntArray:
        """[n] int32 token ids of a conversation that is written already, with BOS where there is to be one."""
        return self._tokens(text)[0]

    def owned_ids(self, turns: Sequence[Turn], n_own: int) -> tuple[IntArray, IntArray]:
        """Token ids of turns as in `token_ids`, and the owner of each token among the last n_own turns.

        Returns [n] int32 ids, and [n] int32 owners: 0 to n_own - 1 where a token is part of what that turn says (its
        text, its reasoning, the name and the arguments of its tool calls), TEMPLATE where it is not, STRADDLING where
        only a part of it is. Blanks around a text belong to either. Raises InputError as `token_ids` does.
        """
        text = self._written(turns)
        ids, offsets = self._tokens(text)
        named = ~np.isin(ids, self.special_ids)
        if named.any() and not (offsets[named, 1] > offsets[named, 0]).any():
            offsets = self._searched_offsets(text, ids)
        of_turns = [self._spans(turns, i, text) for i in range(len(turns) - n_own, len(turns))]
        owners = token_owners(offsets, text, [span for spans in of_turns for span in spans])
        turn_of_span = np.asarray([i for i, spans in enumerate(of_turns) for _ in spans], np.int32)
        owners[owners >= 0] = turn_of_span[owners[owners >= 0]]
        return ids, owners

    def fitted(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns as the chat template is given them."""
        return self._fit(turns).apply(turns) if self.is_chat else list(turns)

    def notes(self, turns: Sequence[Turn]) -> tuple[str, ...]:
        """What the chat template makes it necessary to change in a conversation, each as in `fitting.NOTES`."""
        return self._fit(turns).notes() if self.is_chat else ()

    def _written(self, turns: Sequence[Turn]) -> str:
        return self.text(turns) if self.is_chat else plain_text(turns)

    def _spans(self, turns: Sequence[Turn], i: int, text: str) -> list[tuple[int, int]]:
        """Ranges of what a turn says in a rendered conversation, none of which is empty."""
        turn, spans = turns[i], []
        if turn.content.strip() and turn.role != "tools":
            spans.append(self._span(turns, i, replace(turn, content=SIGN), turn.content, text))
        if turn.reasoning.strip():
            spans.append(self._span(turns, i, replace(turn, reasoning=SIGN), turn.reasoning, text))
        for at, call in enumerate(turn.tool_calls):
            for other in (replace(call, name=SIGN), replace(call, arguments=f'{{"{SIGN}": "{SIGN}"}}')):
                calls = (*turn.tool_calls[:at], other, *turn.tool_calls[at + 1 :])
                own = call.name if other.name == SIGN else call.arguments
                spans.append(self._span(turns, i, replace(turn, tool_calls=calls), own, text))
        return [(start, end) for start, end in spans if end > start]

    def _span(self, turns: Sequence[Turn], i: int, other: Turn, own: str, text: str) -> tuple[int, int]:
        """Range of a rendered conversation that changes where turn i is another one.

        own: what stands there; where the template writes it more than once, the last
        """
        here, there = _characters(text), _characters(self._written([*turns[:i], other, *turns[i + 1 :]]))
        start = common_prefix_length(here, there)
        end = len(here) - min(common_suffix_length(here, there), len(here) - start, len(there) - start)
        last = text.rfind(own.strip(), start, end)
        return (start, end) if last < 0 else (last, last + len(own.strip()))

    def _tokens(self, text: str) -> tuple[IntArray, IntArray]:
        """[n] int32 token ids of a rendered text, and [n, 2] int32 the characters from start to end of each token.

        Plain text gets BOS where there is to be one. The range of BOS is empty, and so are all where the tokenizer does
        not tell them.
        """
        is_fast = self.tokenizer.is_fast
        try:
            read = self.tokenizer(
                text, add_special_tokens=not self.is_chat, verbose=False, return_offsets_mapping=is_fast
            )
        except Exception as error:  # of tokenizers, which has no class of its own
            raise InputError(f"the model's tokenizer cannot read a prompt ({one_line(error)}): get it again") from error
        ids = np.asarray(read.input_ids, np.int32)
        offsets = np.asarray(read.offset_mapping if is_fast else np.zeros((len(ids), 2)), np.int32).reshape(-1, 2)
        if self.is_chat:
            return ids, offsets
        if self.prepend_bos and ids[:1].tolist() != [self.tokenizer.bos_token_id]:
            ids = np.concatenate([np.asarray([self.tokenizer.bos_token_id], np.int32), ids])
            offsets = np.concatenate([np.zeros((1, 2), np.int32), offsets])
        if ids[-1:].tolist() == [self.tokenizer.eos_token_id] and len(ids) > 1:
            return ids[:-1], offsets[:-1]  # some tokenizers close every text, but the model is to go on from here
        return ids, offsets

    def _searched_offsets(self, text: str, ids: IntArray) -> IntArray:
        """[n, 2] int32 the characters of each token, searched for behind the token before it; empty if not found."""
        offsets, at = np.zeros((len(ids), 2), np.int32), 0
        for i, token in enumerate(ids.tolist()):
            piece = str(self.tokenizer.decode([token], skip_special_tokens=False)).strip()
            start = text.find(piece, at) if piece else -1
            if start >= 0:
                offsets[i] = start, start + len(piece)
                at = start + len(piece)
        return offsets

    def text(self, turns: Sequence[Turn]) -> str:
        """The conversation as the chat template writes it, but with every answer whole.

        Some templates cut the thoughts out of all answers but the last; a demonstration without them demonstrates
        something else. Where a part of an answer is missing, the template is given a sign to write in its place, and
        the answer is put where the sign stands. An answer whose sign the template does not write either stays cut.
        """
        turns = self.fitted(turns)
        text = self._rendered(turns)
        if not any(turn.content.strip() in text for turn in turns if turn.role == "user"):
            raise InputError("the model's chat template does not write what the user says: give it another template")
        whole = {i: self._whole(turn) for i, turn in enumerate(turns) if turn.role == "assistant"}
        signs = {i: f"{SIGN}{i}{SIGN}" for i, answer in whole.items() if answer not in text}
        if not signs:
            return text
        signed = self._rendered(
            [replace(turn, content=signs[i], reasoning="") if i in signs else turn for i, turn in enumerate(turns)]
        )
        if any(signed.count(sign) != 1 for sign in signs.values()):
            return text
        for i, sign in signs.items():
            if whole[i].startswith("<think>"):  # in place of the empty thought that some templates write
                signed = re.sub(rf"<think>\s*</think>\s*{sign}", sign, signed)
            signed = signed.replace(sign, whole[i])
        return signed

    @cached_property
    def _thoughts(self) -> Thoughts | None:
        """How the template writes thoughts; None where it does not."""
        asked, replied, asked_again, thought, reply = (f"{SIGN}{i}{SIGN}" for i in range(5))
        before = [Turn("user", asked), Turn("assistant", replied), Turn("user", asked_again)]
        try:
            text = self._rendered([*before, Turn("assistant", reply, thought)], has_key=True)
        except InputError:
            text = ""
        if thought in text and reply in text.partition(thought)[2]:
            between = text.partition(thought)[2].partition(reply)[0]
            mark = _THOUGHT_MARK.search(text.partition(thought)[0])
            return Thoughts(True, mark[0] if mark else "", between, mark is not None)
        template = str(self._chat_template)
        return next((thoughts for mark, thoughts in _IN_CONTENT.items() if mark in template), None)

    def _whole(self, turn: Turn) -> str:
        return turn.content.strip() if self._thoughts is None else self._thoughts.whole(turn)

    def _fit(self, turns: Sequence[Turn]) -> Fit:
        """The least change with which the template writes all of a conversation; else, with which it writes any."""
        shape = fitting.signed(turns, SIGN)
        if shape not in self._fits:
            second = None
            for fit in fitting.fits(shape):
                changed = fit.apply(shape)
                try:
                    text = self._rendered(changed)
                except InputError:
                    continue
                second = second or fit
                thoughts_lost = self._thoughts is None and any(turn.reasoning for turn in changed)
                if fitting.written(changed, text) and not thoughts_lost:
                    self._fits[shape] = fit
                    break
            else:
                self._fits[shape] = second or Fit()
        return self._fits[shape]

    def _dated(self, tools: list[Any] | None = None) -> str:
        """The tokenizer's chat template, with a fixed date; some tokenizers have another one for tools."""
        try:
            return FIXED_DATE + str(self.tokenizer.get_chat_template(tools=tools))
        except ValueError as error:  # several templates, none of them the default
            raise InputError(
                f"the model's tokenizer has the chat templates {listed(self.tokenizer.chat_template)} and none is "
                "called default: rename one of them in its tokenizer_config.json"
            ) from error

    @cached_property
    def _tool_template(self) -> str:
        return self._dated([])

    def _shows_questions(self, *, in_parts: bool = False) -> bool:
        self._in_parts = in_parts
        try:
            return SIGN in self._rendered([Turn("user", SIGN)])
        except InputError:
            return False

    def _rendered(self, turns: Sequence[Turn], *, has_key: bool | None = None) -> str:
        """The conversation as the chat template writes it; has_key: thoughts are in a key, whatever is known of it."""
        if has_key is None and any(turn.reasoning for turn in turns):
            has_key = self._thoughts is not None and self._thoughts.has_key
        spoken = [turn for turn in turns if turn.role != "tools"]
        tools = [tool for turn in turns if turn.role == "tools" for tool in json.loads(turn.content)]
        if not has_key:
            spoken = [
                replace(turn, content=self._whole(turn), reasoning="") if turn.reasoning else turn for turn in spoken
            ]
        messages = messages_of(spoken)
        for message, turn in zip(messages, spoken, strict=True):
            if turn.reasoning:
                # Templates differ in the name of the key, and each reads one of them.
                message |= dict.fromkeys(REASONING_KEYS, turn.reasoning)
            if self._in_parts:
                message["content"] = [{"type": "text", "text": turn.content}]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools or None,
                    add_generation_prompt=not spoken or spoken[-1].role != "assistant",
                    chat_template=self._tool_template if tools else self._chat_template,
                    tokenize=False,
                    date_string=TEMPLATE_DATE,
                )
            )
        except Exception as error:  # a template is a program: jinja2's errors, but also TypeError and the like
            roles = ", ".join(turn.role for turn in spoken)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(
                f"the model's chat template cannot render turns of {roles}: {reason}; leave out rows with such turns, "
                "or give the tokenizer another template"
            ) from error


def plain_text(turns: Sequence[Turn]) -> str:
    """Question and answer text for models without a chat template; it ends with "Answer:" where the answer is due."""
    forms = {"user": "Question: {}\n", "assistant": "Answer: {}\n\n"}
    texts = ((turn.role, "\n\n".join(filter(None, [turn.reasoning, turn.text]))) for turn in turns)
    text = "".join(forms.get(role, "{}\n\n").format(text) for role, text in texts).rstrip("\n")
    return text if turns and turns[-1].role == "assistant" else f"{text}\nAnswer:"


def token_owners(offsets: IntArray, text: str, spans: Sequence[tuple[int, int]]) -> IntArray:
    """[n] int32 index of the span that each token's characters are in; TEMPLATE outside, STRADDLING across an end.

    offsets: [n, 2] the characters of each token in `text`; blanks around others do not count
    """
    inked = np.concatenate([[0], np.cumsum([not character.isspace() for character in text])])
    starts, ends = offsets[:, 0], offsets[:, 1]
    n_inked = inked[ends] - inked[starts]
    owners = np.full(len(offsets), TEMPLATE, np.int32)
    for i, (start, end) in enumerate(spans):
        n_inside = inked[np.clip(ends, start, end)] - inked[np.clip(starts, start, end)]
        owners[(n_inside > 0) & (n_inside == n_inked)] = i
        owners[(n_inside > 0) & (n_inside < n_inked)] = STRADDLING
        owners[(n_inked == 0) & (ends > starts) & (starts >= start) & (ends <= end)] = i
    return owners


def common_prefix_length(a: NDArray[Any], b: NDArray[Any]) -> int:
    """Number of equal tokens, or characters, at the start of two sequences."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def common_suffix_length(a: NDArray[Any], b: NDArray[Any]) -> int:
    """Number of equal tokens, or characters, at the end of two sequences."""
    return common_prefix_length(a[::-1], b[::-1])


def _characters(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
