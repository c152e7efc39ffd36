"""Makes typer's options of the dataclasses of options that commands take; see data.options."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from sts_fast.cli.arguments import or_none, values_by_set
from sts_fast.cli.console import set_quiet
from sts_fast.data.options import Option, annotations_of, check, element_choices_of, option_of, title_of, type_of

Model = Annotated[str, Option("Model: folder or hub id; or a folder of sts-fast capture.")]
SAEs = Annotated[
    list[str],
    Option(
        "SAE: folder or file, release/id as sae-lens names it, or owner/repository:folder of the hub; repeatable: "
        "several share every forward pass.",
    ),
]
Train = Annotated[
    list[str],
    Option(
        "Training set: file or folder of questions and answers, or owner/name:config of the hub; several are one set."
    ),
]
Domains = Annotated[
    list[str],
    Option(
        "name=path, a folder of files, a file with a category column, owner/name:config of the hub, or lm-eval:TASK; "
        "repeatable."
    ),
]
Demos = Annotated[list[str] | None, Option("Demonstrations: name=path (train=path for the training set); repeatable.")]
ShowPrompts = Annotated[bool, Option("Print the first prompt of each set as it is sent, to standard error.")]
Quiet = Annotated[bool, Option("Tell the result and warnings alone, no progress.")]
AsJson = Annotated[bool, Option("Print the results as JSON instead of tables.", "--json")]


class Fixed:
    """Part of the annotation of a command's parameter: fields of its dataclass that the command sets and hides."""

    def __init__(self, **values: Any) -> None:
        self.values = values


@dataclass(frozen=True)
class Flag:
    """An option of a command: its parameter for typer, and the function from the typed value to the field's value."""

    parameter: inspect.Parameter
    read: Callable[[Any], Any]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it.

    A parameter that is a dataclass becomes one option for each field that has an `Option`. A field that two dataclasses
    have becomes one option, at the place of the last. A parameter with an `Option` of its own becomes that option, and
    any other is unchanged. Every command has the option --quiet.
    """
    flags: dict[str, Flag] = {}
    made: dict[str, Callable[[dict[str, Any]], Any]] = {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        annotation = hints[name]
        if is_dataclass(kind := type_of(annotation)):
            fixed = next((extra.values for extra in get_args(annotation)[1:] if isinstance(extra, Fixed)), {})
            of_kind = _flags_of(kind, fixed)
            for field in of_kind:
                flags.pop(field, None)
            flags |= of_kind
            made[name] = functools.partial(_make, kind, fixed, list(of_kind))
        else:
            default = MISSING if parameter.default is parameter.empty else parameter.default
            as_it_is = Flag(parameter.replace(annotation=annotation, kind=parameter.KEYWORD_ONLY), lambda typed: typed)
            flags[name] = as_it_is if option_of(annotation) is None else _flag(name, annotation, default)
            made[name] = operator.itemgetter(name)

    flags["quiet"] = _flag("quiet", Quiet, False)

    @functools.wraps(command)
    def run(**typed: Any) -> None:
        set_quiet(typed["quiet"])
        values = {name: flags[name].read(value) for name, value in typed.items()}
        command(**{name: make(values) for name, make in made.items()})

    parameters = [flag.parameter for flag in flags.values()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _flags_of(kind: Any, fixed: Mapping[str, Any]) -> dict[str, Flag]:
    """By field, the options of a dataclass that are not fixed."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
    }
    return {
        name: _flag(name, annotation, defaults[name], title_of(kind, name))
        for name, annotation in annotations_of(kind).items()
        if option_of(annotation) is not None and name not in fixed
    }


def _make(kind: Any, fixed: Mapping[str, Any], offered: Sequence[str], values: dict[str, Any]) -> Any:
    return kind(**fixed, **{name: values[name] for name in offered})


def _flag(name: str, annotation: Any, default: Any, title: str | None = None) -> Flag:
    option = option_of(annotation)
    assert option is not None
    word = option.on_command_line(name)
    kind, default, read = _typed(word, type_of(annotation), default)
    parameter = inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, typer.Option(word, help=option.help, rich_help_panel=title)],
        default=inspect.Parameter.empty if default is MISSING else default,
    )

    def checked(typed: Any) -> Any:
        value = read(typed)
        check(name, annotation, value)
        return value

    return Flag(parameter, checked)


def _typed(word: str, kind: Any, default: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """A field's type and default on the command line, and the function that reads its value.

    Names from a list are separated by commas. For other sequences and for mappings the option is repeated. Where a
    number may be None, but is not by default, 0 stands for None.
    """
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if element_choices_of(kind):
        return str, ",".join(default), lambda typed: tuple(name.strip() for name in typed.split(","))
    if get_origin(kind) is Mapping:
        return list[str] | None, None, functools.partial(values_by_set, word, number=get_args(kind)[1] is float)
    if get_origin(kind) is Sequence:
        return list[str] | None, None, lambda typed: tuple(typed or ())
    if {*parts} == {int, type(None)} and isinstance(default, int):
        return int, default, functools.partial(or_none, word)
    if len(parts) > 2:  # files, and values that are text here but may be objects in Python
        return (Path if Path in parts else str) | None, default, lambda typed: typed
    return kind, default, lambda typed: typed
