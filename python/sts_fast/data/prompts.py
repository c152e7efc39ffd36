"""From examples to token ids: each query without and with demonstrations, and which of its tokens pair up."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from sts_fast.data.demonstrations import demo_turns, draw_for
from sts_fast.data.examples import Example
from sts_fast.data.template import STRADDLING, TEMPLATE, PromptTemplate, common_suffix_length
from sts_fast.data.turns import HEAD_ROLES, Turn
from sts_fast.errors import listed

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from sts_fast.statistics import IntArray

TokenClass = Literal["query", "template", "last", "answer", "all"]
# Are told how much of a stage is done, and of how much; Progress also which stage.
Tell = Callable[[int, int], None]
Progress = Callable[[str, int, int], None]

# What a rendered prompt begins with, whatever the template.
_BEGINS_RENDERED = re.compile(r"\s*(?:<\|[\w ]+\|>|<s>|<bos>|\[(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\])")

# A demonstration that stands in where a set has none: only the query's own turn is common to both prompts.
STAND_IN_DEMO = [Turn("user", "?"), Turn("assistant", "!")]


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

    @property
    def read_plain(self) -> tuple[IntArray, IntArray]:
        """What is sent without demonstrations, and the positions of it that are read."""
        return self.base_ids, self.positions


@dataclass(frozen=True)
class SetWarning:
    """A warning about one set.

    text: the same for all sets that it is true of; which: how much of this set, as in "3 of 20 examples of 'law'"
    """

    text: str
    which: str

    def __str__(self) -> str:
        return f"{self.text} ({self.which})"


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one training set or domain.

    n_too_long:   queries left out because they overrun the model's context
    n_unanswered: queries left out because answers are read and they have none
    shown:        of each draw of demonstrations, the ids of its examples
    """

    name: str
    prompts: list[Prompt]
    n_too_long: int
    n_unanswered: int
    warnings: tuple[SetWarning, ...] = ()
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

    draws: demonstrations; the queries are dealt out over them, so that each is asked behind one, none behind itself.
        Whether a query fits does not change its draw: else long draws would be asked short questions only

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
    for dealt, row in enumerate(np.random.default_rng(seed).permutation(len(queries))):
        if len(chosen) == limit:
            break
        query = queries[row]
        if tokens == "answer" and query.answer is None:
            n_unanswered += 1
            continue
        draw = draw_for(query, draws, dealt) if draws else 0
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
    asked = [queries[row] for row, _ in chosen]
    return PromptSet(
        name,
        [prompt for _, prompt in chosen],
        n_too_long,
        n_unanswered,
        (
            *_lost_answers(name, draws, turns_of, template),
            *changes(name, [(*example.turns, example.reply) for example in (*asked, *chain(*draws))], template),
            *_marks(name, asked, template),
        ),
        tuple(tuple(demo.id for demo in demos) for demos in draws),
    )


def set_warnings(prompt_sets: Sequence[PromptSet]) -> list[str]:
    """The warnings of some sets, each once, with the sets that it is true of."""
    groups: dict[str, list[str]] = {}
    for warning in (warning for prompt_set in prompt_sets for warning in prompt_set.warnings):
        groups.setdefault(warning.text, []).append(warning.which)
    return [str(SetWarning(text, listed(which, most=4))) for text, which in groups.items()]


def changes(
    name: str, conversations: Sequence[Sequence[Turn | None]], template: PromptTemplate
) -> tuple[SetWarning, ...]:
    """Warnings of what is changed in the conversations of a set because the chat template does not write it."""
    counts = Counter(note for turns in conversations for note in template.notes([turn for turn in turns if turn]))
    return tuple(
        SetWarning(f"the model's chat template {note}", f"{count} of {len(conversations)} conversations of '{name}'")
        for note, count in counts.items()
    )


def _marks(name: str, asked: Sequence[Example], template: PromptTemplate) -> tuple[SetWarning, ...]:
    """A warning where the text of conversations contains marks: these are not read, and may come from a template."""
    found: list[set[str]] = []
    for example in asked:
        texts = [turn.content for turn in (*example.turns, example.reply) if turn is not None and turn.role != "tools"]
        begins = (_BEGINS_RENDERED.match(text) for text in texts)
        of_tokenizer = (mark for mark in template.marks if any(mark in text for text in texts))
        found.append({*of_tokenizer, *(match[0].strip() for match in begins if match)})
    marks = sorted(set().union(*found))
    if not marks:
        return ()
    return (
        SetWarning(
            f"the text of examples contains special tokens or marks of a chat template, as {listed(marks, 5)}, which "
            "are not read as text: remove them, and where they are prompts that were rendered already, give messages "
            "or the bare questions",
            f"{sum(map(bool, found))} of {len(asked)} examples of '{name}'",
        ),
    )


def _lost_answers(
    name: str, draws: Sequence[Sequence[Example]], turns_of: Sequence[list[Turn]], template: PromptTemplate
) -> tuple[SetWarning, ...]:
    """A warning where the chat template cuts into the demonstrations; some drop the thoughts of earlier turns.

    turns_of: the turns of each draw
    """
    if not draws or not template.is_chat:
        return ()
    n_lost = 0
    for demos, turns in zip(draws, turns_of, strict=True):
        text = template.text([*turns, STAND_IN_DEMO[0]])
        replies = [template.fitted([*demo.turns, demo.reply])[-1] for demo in demos if demo.reply is not None]
        n_lost += sum(reply.content.strip() not in text or reply.reasoning.strip() not in text for reply in replies)
    if not n_lost:
        return ()
    return (
        SetWarning(
            "the model's chat template shows demonstrations without a part of their answer, since it drops the "
            "thoughts of earlier turns: what they demonstrate is the rest",
            f"{n_lost} of {sum(map(len, draws))} demonstrations of '{name}'",
        ),
    )


def _pair(
    query: Example, demo_turns: list[Turn], template: PromptTemplate, tokens: TokenClass, context_length: int | None
) -> Prompt | None:
    """The prompt of one query, or None where it overruns the context."""
    turns = query.turns
    # Tools and the system turn open the conversation, so they go before the demonstrations.
    n_system = next((i for i, turn in enumerate(turns) if turn.role not in HEAD_ROLES), len(turns))
    answer = [query.reply] if tokens in ("answer", "all") and query.reply is not None else []
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
