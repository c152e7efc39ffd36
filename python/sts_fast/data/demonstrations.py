"""The rows of a set that are shown before its queries, in several draws, because a score hangs on which they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.data.examples import Example
from sts_fast.data.turns import HEAD_ROLES, Turn
from sts_fast.errors import SetTooSmall

if TYPE_CHECKING:
    from sts_fast.data.template import PromptTemplate

Fits = Callable[[Example], bool]

# Number of examples whose lengths stand for those of a set's queries, and the shares of the queries that demonstrations
# are to leave room for, in the order in which they are tried.
N_MEASURED, SHARES_WITH_ROOM = 64, (0.5, 0.1, 0.0)


@dataclass(frozen=True)
class Demonstrations:
    """The examples that are shown before a set's queries, and the queries.

    draws:   each [shots] examples that are shown together, in this order; no example is in two. Empty where there are
        too few
    queries: the examples that are asked. With several draws a query may be shown before others, never before itself
    n_too_long: examples that were passed over because too few queries would fit behind them
    """

    draws: tuple[tuple[Example, ...], ...]
    queries: list[Example]
    n_too_long: int = 0


def choose_demos(
    name: str,
    examples: Sequence[Example],
    shots: int,
    n_draws: int = 1,
    demos: Sequence[Example] | None = None,
    *,
    required: bool = True,
    fits: Sequence[Fits] = (lambda example: True,),
) -> Demonstrations:
    """The demonstrations of a set, and its queries.

    A draw has the first `shots` answered examples that fit, counted from its start; the starts are spread evenly over
    the set, the first at its first row. There are at most `n_draws`, and fewer where they would share examples.

    demos:    examples to demonstrate with; by default those of the set itself
    required: False where they are only set aside, so that the same queries are asked whether they are shown or not;
        where there are too few, none is
    fits:     whether a demonstration leaves room for queries; the next one counts where there is no draw by this one
    Raises SetTooSmall where there are fewer than `shots` answered examples that fit, or no query is left.
    """
    if not shots:
        return Demonstrations((), list(examples))
    answered = [example for example in (examples if demos is None else demos) if example.answer is not None]
    draws: list[tuple[Example, ...]] = []
    n_too_long = 0
    for leaves_room in fits:
        if not draws:
            draws, n_too_long = _draws(answered, shots, min(n_draws, len(answered) // shots), leaves_room)
    if not draws and required:
        source = f"'{name}'" if demos is None else f"the demonstrations given for '{name}'"
        long = f", {n_too_long} of them too long to leave room for a question" if n_too_long else ""
        raise SetTooSmall(
            f"{source} has {len(answered)} answered examples{long}, but {shots} are to be shown as demonstrations: "
            "lower --shots (training set) or --domain-shots (domains), or give answered examples with --demos"
        )
    queries = [query for query in examples if not draws or draw_for(query, draws, 0) is not None]
    if not queries and required:
        raise SetTooSmall(f"'{name}' has no example left to ask once its demonstrations are set aside: add examples")
    return Demonstrations(tuple(draws), queries, n_too_long) if queries else Demonstrations((), list(examples))


def _draws(answered: Sequence[Example], shots: int, n_draws: int, fits: Fits) -> tuple[list[tuple[Example, ...]], int]:
    """(draws, number of examples passed over because they do not fit)."""
    draws: list[tuple[Example, ...]] = []
    unused, n_too_long = dict.fromkeys(range(len(answered))), 0
    for k in range(n_draws):
        start = k * len(answered) // n_draws
        draw: list[Example] = []
        for i in [*(i for i in unused if i >= start), *(i for i in unused if i < start)]:
            if len(draw) == shots:
                break
            del unused[i]
            if fits(answered[i]):
                draw.append(answered[i])
            else:
                n_too_long += 1
        if len(draw) == shots:
            draws.append(tuple(draw))
    return draws, n_too_long


def draw_for(query: Example, draws: Sequence[Sequence[Example]], first: int) -> int | None:
    """Index of a draw that does not show the query itself, the first one from `first` on, going round."""
    going_round = (k % len(draws) for k in range(first, first + len(draws)))
    return next((k for k in going_round if not any(same_question(query, shown) for shown in draws[k])), None)


def same_question(one: Example, other: Example) -> bool:
    return (one.context, one.question) == (other.context, other.question)


def room_for_demos(
    examples: Sequence[Example], template: PromptTemplate, shots: int, context_length: int | None, seed: int
) -> list[Fits]:
    """By the shares of SHARES_WITH_ROOM: whether `shots` demonstrations so long leave them room in the context.

    The lengths of the queries are those of N_MEASURED examples, drawn with `seed`.
    """
    if context_length is None or not examples:
        return [lambda example: True]
    drawn = np.random.default_rng(seed).permutation(len(examples))[:N_MEASURED]
    lengths = [len(template.token_ids(examples[i].turns)) for i in drawn]

    @cache
    def length(example: Example) -> int:
        return len(template.token_ids([*demo_turns([example]), Turn("user", "?")]))

    def fits_beside(query_length: float) -> Fits:
        return lambda example: length(example) <= (context_length - query_length) / shots

    return [fits_beside(float(np.quantile(lengths, share))) for share in SHARES_WITH_ROOM]


def demo_turns(demos: Sequence[Example]) -> list[Turn]:
    """Turns of demonstrations without tools and system turns: templates allow one of each, and show the query's."""
    return [
        turn for demo in demos for turn in (*demo.turns, demo.reply) if turn is not None and turn.role not in HEAD_ROLES
    ]
