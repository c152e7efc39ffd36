"""From examples to token ids: each query without and with demonstrations, and which of its tokens pair up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sts_fast.data.demonstrations import demo_turns, draw_for
from sts_fast.data.examples import Example
from sts_fast.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from sts_fast.statistics import IntArray

TokenClass = Literal["query", "template", "last", "answer", "all"]
Turn = tuple[str, str]
# Are told how much of a stage is done, and of how much; Progress also which stage.
Tell = Callable[[int, int], None]
Progress = Callable[[str, int, int], None]

# Some chat templates print today's date; with a fixed one a forecast is the same tomorrow.
TEMPLATE_DATE = "26 Jul 2024"
FIXED_DATE = "{%- macro strftime_now(format) -%}" + TEMPLATE_DATE + "{%- endmacro %}"

# Stands in a template's text for an answer that is put there afterwards; from Unicode's private use area.
SIGN = "\ue0f5"

# Whose a token is that is no turn's.
TEMPLATE, STRADDLING = -1, -2

# A demonstration that stands in where a set has none: only the query's own turn is common to both prompts.
STAND_IN_DEMO: list[Turn] = [("user", "?"), ("assistant", "!")]


@dataclass(frozen=True)
class Prompt:
    """One query as it is sent to the model, and the tokens of it that are read.

    base_ids:     [n_base] int32, token ids without demonstrations
    demos_ids:    [n_demos] int32, token ids with demonstrations; empty where none were asked for
    positions:    [n_read] int32, positions in base_ids that are read
    paired:       [n_pairs] int32, those of `positions` whose token stands in demos_ids too
    paired_demos: [n_pairs] int32, positions in demos_ids; entry i is the same token as paired[i]
    n_special:    tokens of the query that are not read because they are special
    n_straddling: tokens that are not read because only a part of them is the user's, and the rest the template's
    question:     the query as the user gave it, without template, demonstrations and earlier turns; None if not known
    draw:         index of the draw of demonstrations that it is asked behind
    """

    id: str
    base_ids: IntArray
    demos_ids: IntArray
    positions: IntArray
    paired: IntArray
    paired_demos: IntArray
    n_special: int
    n_straddling: int = 0
    question: str | None = None
    draw: int = 0


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one training set or domain.

    n_too_long:   queries left out because they overrun the model's context
    n_unanswered: queries left out because answers are read and they have none
    warnings:     what a reader of the results should know
    shown:        of each draw of demonstrations, the ids of its examples
    """

    name: str
    prompts: list[Prompt]
    n_too_long: int
    n_unanswered: int
    warnings: tuple[str, ...] = ()
    shown: tuple[tuple[str, ...], ...] = ()

    @property
    def draw_of(self) -> IntArray:
        """[n_prompts] int32 index of the draw of demonstrations that each prompt is asked behind."""
        return np.asarray([prompt.draw for prompt in self.prompts], np.int32)

    @property
    def questions(self) -> tuple[str, ...] | None:
        """The text of every query; None where one of them is not known."""
        texts = tuple(prompt.question for prompt in self.prompts if prompt.question is not None)
        return texts if len(texts) == len(self.prompts) else None


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


def build_prompts(
    name: str,
    queries: Sequence[Example],
    template: PromptTemplate,
    *,
    draws: Sequence[Sequence[Example]] = (),
    tokens: TokenClass = "query",
    context_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> PromptSet:
    """Prompts of a random sample of `limit` queries that fit into the model's context, in the order of the set.

    draws: demonstrations; the queries are dealt out over them, so that each is asked behind one, none behind itself

    The tokens read are, for `tokens`:
      query     those of the question's own text, and of earlier turns of its conversation, but not of a system turn
                before the demonstrations; nothing that the template writes
      template  the same, and what the template writes around them: all that the prompt has in common, at the end, with
                one that carries demonstrations (longest common token suffix)
      last      the last of these: the one that the answer follows
      answer    those of the answer's own text, which is put after the query
      all       query and answer, where there is one
    never special tokens, nor those of which only a part is the user's text. Which examples are drawn depends on `seed`,
    the examples, and which of them fit.

    Raises ValueError for an unknown token class.
    """
    if tokens not in get_args(TokenClass):
        raise ValueError(f"tokens must be one of {', '.join(get_args(TokenClass))}, not '{tokens}'")
    turns_of = [demo_turns(demos) for demos in draws]
    chosen: list[tuple[int, Prompt]] = []
    n_too_long = n_unanswered = 0
    for row in np.random.default_rng(seed).permutation(len(queries)):
        if len(chosen) == limit:
            break
        query = queries[row]
        if tokens == "answer" and query.answer is None:
            n_unanswered += 1
            continue
        draw = draw_for(query, draws, len(chosen)) if draws else 0
        if draw is None:
            continue  # it is shown itself
        prompt = _pair(query, turns_of[draw] if draws else [], template, tokens, context_length)
        if prompt is None:
            n_too_long += 1
            continue
        if tokens == "answer" and not len(prompt.positions):
            n_unanswered += 1
            continue
        chosen.append((int(row), replace(prompt, draw=draw)))
    chosen.sort(key=lambda item: item[0])
    return PromptSet(
        name,
        [prompt for _, prompt in chosen],
        n_too_long,
        n_unanswered,
        _lost_answers(name, draws, turns_of, template),
        tuple(tuple(demo.id for demo in demos) for demos in draws),
    )


def _lost_answers(
    name: str, draws: Sequence[Sequence[Example]], turns_of: Sequence[list[Turn]], template: PromptTemplate
) -> tuple[str, ...]:
    """A warning where the chat template cuts into the demonstrations; some drop the thoughts of earlier turns.

    turns_of: the turns of each draw
    """
    if not draws or not template.is_chat:
        return ()
    n_lost = 0
    for demos, turns in zip(draws, turns_of, strict=True):
        text = template.text([*turns, STAND_IN_DEMO[0]])
        n_lost += sum((demo.answer or "").strip() not in text for demo in demos)
    if not n_lost:
        return ()
    return (
        f"the model's chat template shows {n_lost} of the {sum(map(len, draws))} demonstrations of '{name}' without a "
        "part of their answer (it drops the thoughts of earlier turns): what they demonstrate is the rest",
    )


def _query_turns(example: Example) -> list[Turn]:
    return [*example.context, ("user", example.question)]


def _pair(
    query: Example, demo_turns: list[Turn], template: PromptTemplate, tokens: TokenClass, context_length: int | None
) -> Prompt | None:
    """The prompt of one query, or None where it overruns the context."""
    turns = _query_turns(query)
    # A system turn opens the conversation, so it goes before the demonstrations.
    n_system = next((i for i, (role, _) in enumerate(turns) if role != "system"), len(turns))
    answer: list[Turn] = [("assistant", query.answer)] if tokens in ("answer", "all") and query.answer else []
    own = [*turns[n_system:], *answer]
    n_read = len(answer) if tokens == "answer" else len(own)

    base_ids, owners = template.owned_ids([*turns, *answer], n_read)
    if context_length is not None and len(base_ids) > context_length:
        return None
    demos_ids, demo_owners = np.empty(0, np.int32), np.empty(0, np.int32)
    if demo_turns:
        demos_ids, demo_owners = template.owned_ids([*turns[:n_system], *demo_turns, *own], n_read)
    if context_length is not None and len(demos_ids) > context_length:
        return None
    if tokens in ("template", "last"):
        # All that the prompt has in common, at the end, with one behind a demonstration.
        behind = template.token_ids([*turns[:n_system], *STAND_IN_DEMO, *own])
        n_common = common_suffix_length(base_ids, behind)
        owners = np.where(np.arange(len(base_ids)) < len(base_ids) - n_common, TEMPLATE, 0)
        n_paired = common_suffix_length(base_ids, demos_ids)
        demo_owners = np.where(np.arange(len(demos_ids)) < len(demos_ids) - n_paired, TEMPLATE, 0)
    special, demo_special = (np.isin(ids, template.special_ids) for ids in (base_ids, demos_ids))
    positions = np.flatnonzero((owners >= 0) & ~special)
    if tokens == "last":
        positions = positions[-1:]
    pairs = [
        _pairs(
            base_ids, positions[owners[positions] == i], demos_ids, np.flatnonzero((demo_owners == i) & ~demo_special)
        )
        for i in range(max(len(own), 1))
    ]
    paired, paired_demos = (np.concatenate(of_turns).astype(np.int32) for of_turns in zip(*pairs, strict=True))
    return Prompt(
        id=query.id,
        base_ids=base_ids,
        demos_ids=demos_ids,
        positions=positions.astype(np.int32),
        paired=paired,
        paired_demos=paired_demos,
        n_special=int(((owners >= 0) & special).sum()),
        n_straddling=int(((owners == STRADDLING) & ~special).sum()),
        question=query.question,
    )


def _pairs(
    ids: IntArray, here: NDArray[np.int64], demos_ids: IntArray, there: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions in two prompts that hold the same token of the same text, counted from the text's end."""
    n = common_suffix_length(ids[here], demos_ids[there])
    return here[len(here) - n :], there[len(there) - n :]


def show_prompt(prompt_set: PromptSet, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first prompt of a set as the model gets it, special tokens and all, without and with demonstrations."""
    if not prompt_set.prompts:
        return f"{prompt_set.name}: no prompt"
    first = prompt_set.prompts[0]
    parts = [("without demonstrations", first.base_ids), ("with demonstrations", first.demos_ids)]
    return "\n".join(
        f"--- {prompt_set.name}, prompt 1 of {len(prompt_set.prompts)}, {how}, {len(ids)} tokens\n"
        f"{tokenizer.decode(ids.tolist(), skip_special_tokens=False)}"
        for how, ids in parts
        if len(ids)
    )


def prompts_sha256(prompt_sets: Sequence[PromptSet]) -> str:
    """SHA-256 of every token that the prompts send, without and with demonstrations, and of their sets' names."""
    sha256 = hashlib.sha256()
    for prompt_set in prompt_sets:
        sha256.update(f"{prompt_set.name} {len(prompt_set.prompts)} ".encode())
        for prompt in prompt_set.prompts:
            for ids in (prompt.base_ids, prompt.demos_ids):
                sha256.update(f"{len(ids)} ".encode() + ids.astype("<i4").tobytes())
    return sha256.hexdigest()


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
