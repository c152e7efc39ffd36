"""Training sets and domains: the examples that the user named, and the prompts made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict, TypeVar, cast

from sts_fast.data.columns import UNREMARKABLE, ReadRows, RowsBlock, reading_lines, row_blocks, row_warnings
from sts_fast.data.demonstrations import choose_demos, room_for_demos
from sts_fast.data.examples import Example, are_examples, read_domains, read_examples
from sts_fast.data.folders import Use
from sts_fast.data.memory import is_rows, is_splits
from sts_fast.data.options import Checked, Option
from sts_fast.data.prompts import PromptSet, SetWarning, TokenClass, build_prompts
from sts_fast.data.sources import Place, Places, named_place, origin_of
from sts_fast.data.tables import Table
from sts_fast.data.template import PromptTemplate
from sts_fast.data.turns import Turn
from sts_fast.errors import InputError, SetTooSmall, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = Places | Sequence[Example]
Sources = Mapping[str, Source] | Sequence[Place] | Place
ReadSet = tuple[list[Example], ReadRows | None]
Kind = Literal["train", "domain"]
Made = TypeVar("Made")

Limit = Annotated[int | None, Option("Most prompts of a set, drawn at random; 0 for all.", least=1)]
Seed = Annotated[int, Option("Of the sample of prompts and the intervals.", least=0)]
Strict = Annotated[bool, Option("Stop at a bad row, a domain that cannot be used, or an SAE that does not fit.")]

MIN_PROMPTS = 8


@dataclass(frozen=True)
class Fields(Checked):
    """Columns that hold questions and answers, by set name ('train', a domain's); '' for all sets not named.

    strict: raises InputError for the first row without an example, instead of leaving it out with a count
    """

    TITLE = "Data"

    question_fields: Annotated[
        Mapping[str, str],
        Option("Column of the questions: FIELD, or SET=FIELD for one set; repeatable.", "--question-field"),
    ] = field(default_factory=dict)
    answer_fields: Annotated[
        Mapping[str, str],
        Option("Column of the answers: FIELD, or SET=FIELD for one set; repeatable.", "--answer-field"),
    ] = field(default_factory=dict)
    strict: Strict = False

    def read(self, name: str, source: Source, use: Use) -> ReadSet:
        """The examples of a set, and what became of its rows; None where examples were given."""
        if are_examples(source):
            return list(source), None
        question, answer = (of.get(name, of.get("")) for of in (self.question_fields, self.answer_fields))
        return read_examples(origin_of(source, use, name), question, answer, strict=self.strict)


class FieldsOptions(TypedDict, total=False):
    """`Fields` as keywords."""

    question_fields: Mapping[str, str]
    answer_fields: Mapping[str, str]


@dataclass(frozen=True)
class Sets:
    """The examples of the training sets and the domains by name.

    demos:   those to demonstrate with, where given apart
    read_rows: what became of the rows, by use and name; where examples were given, there are none
    """

    trains: dict[str, list[Example]]
    domains: dict[str, list[Example]]
    demos: dict[str, list[Example]]
    read_rows: dict[tuple[Use, str], ReadRows]

    @classmethod
    def read(
        cls,
        trains: Mapping[str, Source],
        domains: Sources,
        demos: Sources | None,
        fields: Fields,
        domain_use: Use = "domain",
    ) -> Sets:
        """domain_use: the use of the domains' splits; 'train' where they are trained on.

        Raises InputError where there is no set at all, or something in a file cannot be used."""
        if not trains and not domains:
            raise InputError("there is no set to read: give a training set or a domain")
        of_trains = {name: fields.read(name, source, "train") for name, source in trains.items()}
        of_domains = _read_sets(_by_name(domains), fields, list(trains), domain_use)
        if "train" in of_domains and "train" in trains:
            raise InputError(
                "a domain cannot be called 'train', the name of the training set: rename it, as in new=path"
            )
        of_demos = _read_demos({} if demos is None else _by_name(demos), fields, [*of_trains, *of_domains])
        uses: tuple[tuple[Use, Mapping[str, ReadSet]], ...]
        uses = (("train", of_trains), ("domain", of_domains), ("demos", of_demos))
        return cls(
            _examples(of_trains),
            _examples(of_domains),
            _examples(of_demos),
            {(use, name): rows for use, sets in uses for name, (_, rows) in sets.items() if rows},
        )

    def lines(self) -> list[str]:
        """A line for each way in which columns were read, and one for what was not read beside them."""
        return [*reading_lines(self._rows_beside(None)), *self.left_out()]

    def told(self) -> list[str]:
        """The same lines, and the warnings, for commands that keep no warnings of their sets."""
        return [*self.lines(), *(f"warning: {warning}" for warning in self.warnings())]

    def warnings(self, train: str | None = None) -> list[str]:
        """Warnings about the rows of the domains, and of one or all training sets."""
        return row_warnings(self._rows_beside(train))

    def blocks(self, train: str) -> list[RowsBlock]:
        """Counts and columns of the rows of the domains and of a training set."""
        return row_blocks(self._rows_beside(train))

    def _rows_beside(self, train: str | None) -> list[tuple[str, ReadRows]]:
        others = {name for use, name in self.read_rows if use == "train" and train not in (None, name)}
        return [
            (f"demonstrations of {name}" if use == "demos" else name, rows)
            for (use, name), rows in self.read_rows.items()
            if rows.n_rows and (use == "domain" or name not in others)
        ]

    def tables(self, use: Use, name: str | None = None) -> list[Table]:
        """The tables that the sets of a use were read from, or one of them, each once."""
        origins = [rows.origin for key, rows in self.read_rows.items() if key == (use, name or key[1])]
        return list({table.name: table for origin in origins for table in origin.tables}.values())

    def left_out(self) -> list[str]:
        """For each use, a line that names the splits and folders that were not read; none where everything was."""
        of_uses: dict[Use, str] = {"train": "training sets", "domain": "domains", "demos": "demonstrations"}
        lines = []
        for use, sets in of_uses.items():
            names = {name: None for key, of in self.read_rows.items() if key[0] == use for name in of.origin.left_out}
            lines += [f"Not read beside the {sets}: {listed(names)}"] if names else []
        return lines


@dataclass(frozen=True)
class Drawing(Checked):
    """Number of prompts that are read of each set, and the seed that draws them.

    limit: most prompts of a set, None for all, drawn with `seed`
    seed:  of everything that is drawn, bootstraps too
    """

    TITLE = "Data"

    limit: Limit = 256
    seed: Seed = 0


class DrawingOptions(TypedDict, total=False):
    """`Drawing` as keywords."""

    limit: int | None
    seed: int


@dataclass(frozen=True)
class Sampling(Drawing):
    """Options that decide, besides its examples, which prompts a set has.

    shots, domain_shots: demonstrations of a training set (for D_N), of a domain (for the estimator 'icl')
    demo_draws: times that demonstrations are drawn, of a set that has enough; its prompts are dealt out over them
    tokens: which tokens are read; see build_prompts
    """

    TITLE = "Data"

    shots: Annotated[int, Option("Demonstrations of the training set.", least=1)] = 2
    domain_shots: Annotated[int, Option("Demonstrations of each domain, for icl.", least=1)] = 5
    demo_draws: Annotated[
        int, Option("Draws of demonstrations, over which a set's prompts are dealt out; intervals cover them.", least=1)
    ] = 5
    tokens: Annotated[TokenClass, Option("Which tokens are read.")] = "query"

    def prompts(
        self,
        name: str,
        examples: Sequence[Example],
        demos: Sequence[Example] | None,
        template: PromptTemplate,
        context_length: int | None,
        *,
        kind: Kind,
        show: bool,
        tokens: TokenClass | None = None,
    ) -> PromptSet:
        """Prompts of a set; tokens: other ones than those of the others are read.

        Demonstrations are set aside even where they are not shown, so that the same queries are asked either way.
        An example that repeats another one is left out first: a prompt that is read twice is no further evidence.
        """
        shots = self.shots if kind == "train" else self.domain_shots
        tokens = tokens or self.tokens
        once = distinct(examples, with_answers=tokens in ("answer", "all"))
        chosen = choose_demos(
            *(name, once, shots, self.demo_draws, demos),
            required=show,
            fits=room_for_demos(once, template, shots, context_length, self.seed),
        )
        prompt_set = build_prompts(
            name,
            chosen.queries,
            template,
            draws=chosen.draws if show else (),
            tokens=tokens,
            context_length=context_length,
            limit=self.limit,
            seed=self.seed,
        )
        losses = _losses(prompt_set, len(examples), len(examples) - len(once), context_length)
        if show and chosen.n_too_long:
            text = "examples are too long to demonstrate with, for too few questions would fit behind them"
            losses.append(SetWarning(f"{text}: later ones are shown", f"{chosen.n_too_long} examples of '{name}'"))
        return replace(prompt_set, warnings=(*losses, *prompt_set.warnings))


class SamplingOptions(DrawingOptions, total=False):
    """`Sampling` as keywords."""

    shots: int
    domain_shots: int
    demo_draws: int
    tokens: TokenClass


def distinct(examples: Sequence[Example], *, with_answers: bool) -> list[Example]:
    """The examples without those that ask again, but for blanks, what an earlier one asks after the same turns.

    with_answers: only those whose answer is the same too repeat another one. Otherwise, of examples that ask the same,
        the first with an answer is kept, in the place of the first.
    """
    groups = repeats_of(examples, with_answers=with_answers)
    return [next((example for example in group if example.answer is not None), group[0]) for group in groups]


def repeats_of(examples: Sequence[Example], *, with_answers: bool) -> list[list[Example]]:
    """The examples in groups that ask the same, in the order of the first ones; see distinct."""
    groups: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        answer = [str(example.answer), example.reasoning, str(example.tool_calls)] if with_answers else []
        texts = (str(example.context), example.question, str(example.steps), *answer)
        groups.setdefault(tuple(" ".join(text.split()) for text in texts), []).append(example)
    return list(groups.values())


def _losses(prompt_set: PromptSet, n_examples: int, n_repeated: int, context_length: int | None) -> list[SetWarning]:
    """Warnings of examples that repeat others, and of a large share left out for another reason."""
    of_set, warnings = f"the examples of '{prompt_set.name}'", []
    if n_repeated:
        which = f"{n_repeated} of the {n_examples} examples of '{prompt_set.name}'"
        warnings.append(SetWarning("examples that repeat another one are left out", which))
    n_read = len(prompt_set.prompts)
    for n, why in (
        (prompt_set.n_too_long, f"overran the model's context of {context_length} tokens"),
        (prompt_set.n_unanswered, "have no answer to read"),
    ):
        if n > UNREMARKABLE * (n + n_read):
            warnings.append(SetWarning(f"examples were left out: they {why}", f"{n / (n + n_read):.0%} of {of_set}"))
    return warnings


def _examples(sets: Mapping[str, ReadSet]) -> dict[str, list[Example]]:
    return {name: examples for name, (examples, _) in sets.items()}


def _by_name(sources: Sources) -> Mapping[str, Source] | Sequence[Place]:
    """Sets by name, or a list of places that are still to be split into sets."""
    if isinstance(sources, Mapping) and not is_splits(sources):
        return sources
    one_place = isinstance(sources, (str, Path)) or is_rows(sources) or is_splits(sources)
    places = cast(Sequence[Place], [sources] if one_place else sources)
    return [str(place) if isinstance(place, Path) else place for place in places]


def _read_sets(
    sets: Mapping[str, Source] | Sequence[Place], fields: Fields, other_names: Sequence[str], use: Use
) -> Mapping[str, ReadSet]:
    if isinstance(sets, Mapping):
        return {name: fields.read(name, source, use) for name, source in sets.items()}
    if not sets:
        for name in (*fields.question_fields, *fields.answer_fields):
            if name and name not in other_names:
                raise InputError(f"a field is named for '{name}', but the sets are {', '.join(other_names)}")
        return {}
    return read_domains(sets, fields.question_fields, fields.answer_fields, other_names, use, strict=fields.strict)


def _read_demos(
    demos: Mapping[str, Source] | Sequence[Place], fields: Fields, names: Sequence[str]
) -> dict[str, ReadSet]:
    """Demonstrations by set; a file split by category may hold more categories than there are domains."""
    groups = [demos] if isinstance(demos, Mapping) else _same_name(demos)
    demonstrations: dict[str, ReadSet] = {}
    for group in groups:
        sets = _read_sets(group, fields, [*fields.question_fields, *fields.answer_fields], "demos")
        unknown = [name for name in sets if name not in names]
        if unknown and (isinstance(group, Mapping) or len(unknown) == len(sets)):
            raise InputError(f"demonstrations are given for '{unknown[0]}', but the sets are {', '.join(names)}")
        for name in (name for name in sets if name in names):
            if name in demonstrations:
                raise InputError(f"demonstrations for '{name}' are in two sources; give both as {name}=path")
            demonstrations[name] = sets[name]
    return demonstrations


def _same_name(places: Sequence[Place]) -> list[list[Place]]:
    """Places in groups: those of one name together, each other one alone."""
    groups: dict[object, list[Place]] = {}
    for i, place in enumerate(places):
        name = named_place(place)[0] if isinstance(place, str) else None
        groups.setdefault(i if name is None else name, []).append(place)
    return list(groups.values())


def common_template(tokenizer: PreTrainedTokenizerBase, starts: Sequence[tuple[str, bool]]) -> PromptTemplate:
    """Template of the prompts that all SAEs read; they must agree on the token that starts a text.

    starts: of each SAE its source, and whether the texts that it was trained on start with BOS
    """
    templates = {has_bos: PromptTemplate(tokenizer, prepend_bos=has_bos) for _, has_bos in starts}
    if len({tuple(template.token_ids([Turn("user", "?")])) for template in templates.values()}) > 1:
        with_bos = next(source for source, has_bos in starts if has_bos)
        without_bos = next(source for source, has_bos in starts if not has_bos)
        raise InputError(
            f"the SAE {with_bos} was trained on texts that start with BOS, but {without_bos} was not: "
            "forecast with each apart"
        )
    return next(iter(templates.values()))


def check_enough(prompt_set: PromptSet, context_length: int | None, kind: Kind) -> None:
    """Raises SetTooSmall, with the reasons, where a set keeps fewer than MIN_PROMPTS prompts."""
    n = len(prompt_set.prompts)
    if n >= MIN_PROMPTS:
        return
    reasons = []
    if prompt_set.n_too_long:
        reasons.append(
            f"{prompt_set.n_too_long} overran the model's context of {context_length} tokens: show fewer or shorter "
            "demonstrations, or add shorter questions"
        )
    if prompt_set.n_unanswered:
        reasons.append(f"{prompt_set.n_unanswered} have no answer to read: add answers, or use --tokens query")
    reason = "; ".join(reasons) or "add examples, or raise --limit"
    name = f"{'training set' if kind == 'train' else 'domain'} '{prompt_set.name}'"
    name = "the training set" if prompt_set.name == "train" else name
    raise SetTooSmall(f"{name} keeps {n} prompts, but at least {MIN_PROMPTS} are needed ({reason})")


def large_enough(what: str, making: Iterable[Callable[[], Made]]) -> tuple[list[Made], list[str]]:
    """What can be made of sets, and a warning about each that has too few examples or prompts and is left out.

    what: 'domain', or 'set'; making: of each set, makes it, or raises SetTooSmall

    Raises InputError where none can be made.
    """
    made: list[Made] = []
    too_small: list[str] = []
    for make in making:
        try:
            made.append(make())
        except SetTooSmall as error:
            too_small.append(str(error))
    if too_small and not made:
        raise InputError(too_small[0] + ("" if len(too_small) == 1 else f"; and no other {what} can be used either"))
    return made, [f"a {what} is left out: {why}" for why in too_small]
