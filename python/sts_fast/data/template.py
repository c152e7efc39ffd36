"""Renders conversations as token ids, and tells which of the tokens are part of a turn's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_fast.data.turns import Turn
from sts_fast.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from sts_fast.statistics import IntArray

# Some chat templates print today's date; with a fixed one a forecast is the same tomorrow.
TEMPLATE_DATE = "26 Jul 2024"
FIXED_DATE = "{%- macro strftime_now(format) -%}" + TEMPLATE_DATE + "{%- endmacro %}"

# Stands in a template's text for an answer that is put there afterwards; from Unicode's private use area.
SIGN = "\ue0f5"

# Whose a token is that is no turn's.
TEMPLATE, STRADDLING = -1, -2


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
        try:
            self._chat_template = FIXED_DATE + str(tokenizer.get_chat_template()) if self.is_chat else None
        except ValueError as error:  # several templates, none of them the default
            raise InputError(f"the model's tokenizer does not say which chat template to use: {error}") from error
        # Templates of models that see images may want a turn as a list of parts, and show nothing of a plain text.
        self._in_parts = self.is_chat and not self._shows_questions() and self._shows_questions(in_parts=True)

    def token_ids(self, turns: Sequence[Turn]) -> IntArray:
        """[n] int32 token ids of (role, text) turns; a conversation that ends with the user is left open to answer.

        Raises InputError where the model's chat template refuses the turns.
        """
        return self.written_ids(self._written(turns))

    def written_ids(self, text: str) -> IntArray:
        """[n] int32 token ids of a conversation that is written already, with BOS where there is to be one."""
        return self._tokens(text)[0]

    def owned_ids(self, turns: Sequence[Turn], n_own: int) -> tuple[IntArray, IntArray]:
        """Token ids of (role, text) turns as in `token_ids`, and the owner of each token among the last n_own turns.

        Returns [n] int32 ids, and [n] int32 owners: 0 to n_own - 1 where a token is part of the text of that turn,
        TEMPLATE where it is not, STRADDLING where only a part of it is. Blanks around a text belong to either.
        Raises InputError as `token_ids` does.
        """
        text = self._written(turns)
        ids, offsets = self._tokens(text)
        named = ~np.isin(ids, self.special_ids)
        if named.any() and not (offsets[named, 1] > offsets[named, 0]).any():
            offsets = self._searched_offsets(text, ids)
        spans = [self._span(turns, i, text) for i in range(len(turns) - n_own, len(turns))]
        return ids, token_owners(offsets, text, spans)

    def _written(self, turns: Sequence[Turn]) -> str:
        return self.text(turns) if self.is_chat else plain_text(turns)

    def _span(self, turns: Sequence[Turn], i: int, text: str) -> tuple[int, int]:
        """Range of a turn's text in a rendered conversation: the part that changes with a sign in its place.

        Of a text that the template writes more than once, the last.
        """
        role, content = turns[i]
        if not content.strip():
            return 0, 0
        here, there = _characters(text), _characters(self._written([*turns[:i], (role, SIGN), *turns[i + 1 :]]))
        start = common_prefix_length(here, there)
        end = len(here) - min(common_suffix_length(here, there), len(here) - start, len(there) - start)
        last = text.rfind(content.strip(), start, end)
        return (start, end) if last < 0 else (last, last + len(content.strip()))

    def _tokens(self, text: str) -> tuple[IntArray, IntArray]:
        """[n] int32 token ids of a rendered text, and [n, 2] int32 the characters from start to end of each token.

        Plain text gets BOS where there is to be one. The range of BOS is empty, and so are all where the tokenizer does
        not tell them.
        """
        is_fast = self.tokenizer.is_fast
        read = self.tokenizer(text, add_special_tokens=not self.is_chat, verbose=False, return_offsets_mapping=is_fast)
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
        text = self._rendered(turns)
        if not any(content.strip() in text for role, content in turns if role == "user"):
            raise InputError("the model's chat template does not write what the user says: give it another template")
        cut = [i for i, (role, answer) in enumerate(turns) if role == "assistant" and answer.strip() not in text]
        if not cut:
            return text
        signs = {i: f"{SIGN}{i}{SIGN}" for i in cut}
        signed = self._rendered([(role, signs.get(i, content)) for i, (role, content) in enumerate(turns)])
        if any(signed.count(sign) != 1 for sign in signs.values()):
            return text
        for i, sign in signs.items():
            signed = signed.replace(sign, turns[i][1].strip())
        return signed

    def _shows_questions(self, *, in_parts: bool = False) -> bool:
        self._in_parts = in_parts
        try:
            return SIGN in self._rendered([("user", SIGN)])
        except InputError:
            return False

    def _rendered(self, turns: Sequence[Turn]) -> str:
        messages: list[Any] = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}
            for role, text in turns
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=turns[-1][0] != "assistant",
                    chat_template=self._chat_template,
                    tokenize=False,
                    date_string=TEMPLATE_DATE,
                )
            )
        except Exception as error:  # a template is a program: jinja2's errors, but also TypeError and the like
            roles = ", ".join(role for role, _ in turns)
            raise InputError(f"the model's chat template cannot render turns of {roles}: {error}") from error


def plain_text(turns: Sequence[Turn]) -> str:
    """Question and answer text for models without a chat template; it ends with "Answer:" where the answer is due."""
    forms = {"user": "Question: {}\nAnswer:", "assistant": " {}\n\n"}
    return "".join(forms.get(role, "{}\n\n").format(text) for role, text in turns).rstrip("\n")


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
