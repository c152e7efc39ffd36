"""Makes prompts of rollouts: each completion after its prompt, and the verified ones as demonstrations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.data.prompts import Prompt, PromptSet, changes
from sts_fast.data.rendered import undone
from sts_fast.data.template import SIGN, PromptTemplate, plain_text
from sts_fast.data.turns import Turn
from sts_fast.errors import InputError
from sts_fast.rollouts.dims import Completions
from sts_fast.rollouts.read import Rollout, Rollouts
from sts_fast.signed.objectives import group_spread

if TYPE_CHECKING:
    from sts_fast.statistics import IntArray

SIGN_OF_SYSTEM = SIGN * 2


class Rendering:
    """Renders prompts as they are sent, and finds the user's text in prompts that were logged as text.

    Trainers log a prompt with the template's marks, without its special tokens, or not rendered at all.
    """

    def __init__(self, template: PromptTemplate) -> None:
        self.template = template
        tokenizer = template.tokenizer
        marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.marks = sorted((marks | set(tokenizer.all_special_tokens)) - {""}, key=len, reverse=True)
        shapes: list[list[Turn]] = [
            [Turn("user", SIGN)],
            [Turn("system", SIGN_OF_SYSTEM), Turn("user", SIGN)],
        ]
        rendered = [text for turns in shapes if (text := self._rendered(turns))]
        forms = [form(text) for of in (rendered, map(self._unmarked, rendered)) for text in of]
        self._forms = [pattern for pattern in forms if pattern is not None]

    def turns(self, prompt: str | tuple[Turn, ...]) -> tuple[Turn, ...] | None:
        """The conversation of a prompt; None for a text that is sent unchanged, without a template."""
        if not isinstance(prompt, str):
            return prompt
        for text in (prompt.strip(), self._unmarked(prompt).strip()):
            for pattern in self._forms:
                if (match := pattern.fullmatch(text)) and match["user"]:
                    parts = match.groupdict()
                    system = [Turn("system", parts["system"])] if parts.get("system") else []
                    return (*system, Turn("user", parts["user"]))
        if not self.template.is_chat:
            return None
        turns, begun = undone(prompt, "the rollouts") or ([], "")
        return tuple(turns) if turns and turns[-1].role == "user" and not begun else (Turn("user", prompt.strip()),)

    def prompt_ids(self, prompt: str | tuple[Turn, ...]) -> IntArray:
        """[n] int32 token ids of a prompt, ready for a completion. Raises InputError as PromptTemplate.token_ids."""
        turns = self.turns(prompt)
        return self.template.written_ids(str(prompt)) if turns is None else self.template.token_ids(turns)

    def ended(self, completion: str) -> tuple[str, bool]:
        """A completion without the special tokens at its end, and whether there were any."""
        text, n = completion, -1
        while n != len(text):
            n, text = len(text), text.rstrip()
            text = next((text.removesuffix(mark) for mark in self.marks if text.endswith(mark)), text)
        return (text, True) if len(text) < len(completion.rstrip()) else (completion, False)

    def _rendered(self, turns: list[Turn]) -> str:
        try:
            return self.template.text(turns) if self.template.is_chat else plain_text(turns)
        except InputError:  # a template may refuse system turns
            return ""

    def _unmarked(self, text: str) -> str:
        for mark in self.marks:
            text = text.replace(mark, "")
        return text


def form(rendered: str) -> re.Pattern[str] | None:
    """Pattern of texts rendered like this one, which contains signs for its turns; None where a sign is missing."""
    text = re.escape(rendered.strip())
    if text.replace(SIGN_OF_SYSTEM, "").count(SIGN) != 1 or text.count(SIGN_OF_SYSTEM) > 1:
        return None
    text = text.replace(SIGN_OF_SYSTEM, "(?P<system>.*?)").replace(SIGN, r"\s*(?P<user>.*?)\s*")
    return re.compile(text, re.DOTALL)


def with_endings(rollouts: Rollouts, rendering: Rendering) -> Rollouts:
    """Completions without their end marks. Where some have one, those without count as cut off, unless it is known."""
    ended = [rendering.ended(row.completion) for row in rollouts.rows]
    tells = any(end for _, end in ended)
    rows = [
        replace(row, completion=text, truncated=not end if row.truncated is None and tells else row.truncated)
        for row, (text, end) in zip(rollouts.rows, ended, strict=True)
    ]
    return replace(rollouts, rows=rows)


def read_completions(
    rollouts: Rollouts, rendering: Rendering, *, context_length: int | None, limit: int | None, seed: int
) -> Completions:
    """The completions of a random sample of `limit` prompts whose completions differ in advantage, in their order.

    Prompt and completion are tokenised apart, as they were when the completion was sampled. All tokens of the
    completion are read, except special ones. Empty completions, and those longer than the model's context, are left
    out after the advantages have been computed.

    Raises InputError where no prompt has completions of different advantage, or none of these can be read.
    """
    advantages, group_of = rollouts.advantages, rollouts.group_of
    apart = np.flatnonzero(group_spread(advantages, group_of) > 0)
    if not len(apart):
        what = "reward" if rollouts.rows[0].advantage is None else "advantage"
        why = (
            "every prompt has only one completion: sample several of each"
            if np.bincount(group_of).max() == 1
            else f"all completions of a prompt have the same {what}: take prompts neither too easy nor too hard"
        )
        raise InputError(f"the rewards do not show which completions are better, because {why}")
    rows_of: dict[int, list[int]] = {}
    for i, group in enumerate(group_of.tolist()):
        rows_of.setdefault(group, []).append(i)
    chosen: dict[int, list[tuple[int, Prompt]]] = {}
    n_too_long = n_empty = 0
    for group in np.random.default_rng(seed).permutation(apart).tolist():
        if len(chosen) == limit:
            break
        readable: list[tuple[int, Prompt]] = []
        for place, i in enumerate(rows_of[group]):
            prompt = _completion_prompt(rollouts.rows[i], f"{group + 1}.{place + 1}", rendering)
            if prompt is None:
                n_empty += 1
            elif context_length is not None and len(prompt.base_ids) > context_length:
                n_too_long += 1
            else:
                readable.append((i, prompt))
        if len({float(advantages[i]) for i, _ in readable}) > 1:
            chosen[group] = readable
    if not chosen:
        raise InputError(
            f"no prompt has two readable completions of different reward: {n_empty} are empty, and {n_too_long} "
            f"exceed the model's context of {context_length} tokens: give shorter rollouts, or a model with a longer "
            "context"
        )
    kept = [chosen[group] for group in sorted(chosen)]
    rows = [i for readable in kept for i, _ in readable]
    return Completions(
        PromptSet(
            "correlation",
            [prompt for readable in kept for _, prompt in readable],
            n_too_long,
            n_empty,
            changes("correlation", [_query_of(rollouts.rows[i], rendering).turns for i in rows], rendering.template),
        ),
        advantages[rows],
        np.repeat(np.arange(len(kept)), [len(readable) for readable in kept]),
    )


def _completion_prompt(row: Rollout, name: str, rendering: Rendering) -> Prompt | None:
    """A prompt with its completion; None where the completion has no token to read."""
    template, none = rendering.template, np.empty(0, np.int32)
    ids = template.tokenizer(row.completion, add_special_tokens=False, verbose=False).input_ids
    completion = np.asarray(ids, dtype=np.int32)
    is_special = np.isin(completion, template.special_ids)
    if not row.completion.strip() or is_special.all():
        return None
    before = rendering.prompt_ids(row.prompt)
    positions = (len(before) + np.flatnonzero(~is_special)).astype(np.int32)
    return Prompt(
        id=name,
        base_ids=np.concatenate([before, completion]),
        demos_ids=none,
        positions=positions,
        paired=none,
        paired_demos=none,
        n_special=int(is_special.sum()),
        question=_query_of(row, rendering).question,
    )


def _query_of(row: Rollout, rendering: Rendering) -> Example:
    """The prompt of a rollout as an example without answer: its last question, and the turns before it."""
    turns = rendering.turns(row.prompt) or (Turn("user", str(row.prompt).strip()),)
    at = max(i for i, turn in enumerate(turns) if turn.role == "user")
    return Example(str(row.group + 1), turns[at].content, None, tuple(turns[:at]), tuple(turns[at + 1 :]))


@dataclass(frozen=True)
class Verified:
    """A policy's own verified completions.

    queries: every prompt, in order; demos: the best verified completion of each prompt that has one, best first
    lowest:  smallest reward of a verified completion
    alike:   True if none is verified because all rewards are the same
    """

    queries: list[Example]
    demos: list[Example]
    lowest: float
    alike: bool


def verified_demos(rollouts: Rollouts, rendering: Rendering, lowest: float | None) -> Verified:
    """The completions whose reward is at least `lowest`, as demonstrations.

    lowest: by default halfway between the smallest and the largest reward; where these are equal, none is verified
    """
    rewards = rollouts.rewards
    none_is_better = lowest is None and rewards.min() == rewards.max()
    lowest = float(rewards.min() + rewards.max()) / 2 if lowest is None else lowest
    queries: dict[int, Example] = {}
    best: dict[int, tuple[float, Example]] = {}
    for row in rollouts.rows:
        query = _query_of(row, rendering)
        example = replace(query, answer=row.completion)
        queries.setdefault(row.group, query)
        verified = row.reward >= lowest and not none_is_better
        if verified and row.completion.strip() and row.reward > best.get(row.group, (-np.inf, None))[0]:
            best[row.group] = row.reward, example
    demos = [example for _, example in sorted(best.values(), key=lambda rewarded: -rewarded[0])]
    return Verified(_distinct(list(queries.values())), demos, lowest, none_is_better)


def _distinct(examples: Sequence[Example]) -> list[Example]:
    """Each question once: a prompt may occur at several steps."""
    return list({(example.context, example.question): example for example in reversed(examples)}.values())[::-1]
