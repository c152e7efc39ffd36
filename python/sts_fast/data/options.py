"""Options as fields of dataclasses, each written once.

    shots: Annotated[int, Option("Demonstrations of the training set.", least=1)] = 2

The field is a keyword in Python, a row of --help and an option of every command that takes its dataclass (see
cli.options), and is checked when the dataclass is made. A field without an `Option` is for Python alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from inspect import get_annotations
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sts_fast.errors import InputError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """The part of an option's annotation that is not its type.

    help:  its row in --help
    name:  on the command line, where it is another than the field's
    least: the smallest value
    """

    help: str
    name: str | None = None
    least: int | None = None

    def on_command_line(self, field: str) -> str:
        return self.name or f"--{field.replace('_', '-')}"


class Checked:
    """Base of the dataclasses of options: raises InputError for a value that its field's annotation rules out.

    Where a field takes the name of a dtype, it takes a dtype of torch or numpy too.

    A dataclass says with `TITLE` under which heading of --help its own options stand.
    """

    def __post_init__(self) -> None:
        options: Any = type(self)
        for name, annotation in annotations_of(options).items():
            if "float32" in choices_of(type_of(annotation)):
                object.__setattr__(self, name, dtype_name(getattr(self, name)))
            check(name, annotation, getattr(self, name))


@cache
def annotations_of(options: Any) -> dict[str, Any]:
    """By field the annotation of a dataclass: its own fields first, then those of its bases from left to right."""
    hints = get_type_hints(options, include_extras=True)
    return {name: hints[name] for base in options.__mro__ for name in get_annotations(base)}


def title_of(options: Any, field: str) -> str | None:
    """The heading of --help for one of a dataclass's fields: the TITLE of the class that it comes from."""
    owner = next(base for base in options.__mro__ if field in get_annotations(base))
    title: str | None = vars(owner).get("TITLE")
    return title


def option_of(annotation: Any) -> Option | None:
    return next((entry for entry in getattr(annotation, "__metadata__", ()) if isinstance(entry, Option)), None)


def type_of(annotation: Any) -> Any:
    """The type itself, of an annotation with an `Option` or without."""
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def choices_of(kind: Any) -> tuple[str, ...]:
    """Values that a Literal, or a union of some, allows; empty for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return tuple(choice for part in get_args(kind) for choice in choices_of(part))
    return ()


def element_choices_of(kind: Any) -> tuple[str, ...]:
    """Values that each element of a Sequence of Literals may have; empty for other types."""
    return choices_of(get_args(kind)[0]) if get_origin(kind) is Sequence else ()


def part(options: Callable[..., T], whole: object) -> T:
    """The dataclass of some options, taken from another one that has more or fewer."""
    return options(**{name: getattr(whole, name) for name in annotations_of(options) if hasattr(whole, name)})


def shows(options: Any, keywords: Any) -> Callable[[F], F]:
    """Makes the signature of a function with **options name each of them, with its type and default, for completion.

    options: their dataclass; keywords: their TypedDict
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        named = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        known = {field.name: field for field in fields(options)}
        more = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=_default_of(known[name]),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in keywords.__annotations__.items()
            if name not in signature.parameters
        ]  # fmt: skip
        function.__signature__ = signature.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        return function

    return decorate


def _default_of(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def dtype_name(dtype: Any) -> Any:
    """'float32' of torch.float32, numpy.float32 and numpy.dtype('float32'); names and None as they are."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    return dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")


def check(name: str, annotation: Any, value: Any) -> None:
    """Raises InputError for a value that the annotation of its field rules out."""
    kind, option = type_of(annotation), option_of(annotation)
    if option is None or (value is None and type(None) in get_args(kind)):
        return
    word = option.on_command_line(name)
    if (choices := choices_of(kind)) and value not in choices:
        raise InputError(f"{word} must be one of {', '.join(choices)}, not '{value}'")
    if choices := element_choices_of(kind):
        for element in value:
            if element not in choices:
                raise InputError(f"{word} must be among {', '.join(choices)}, not '{element}'")
        if not value or len({*value}) < len(value):
            raise InputError(f"{word} must name one or more, each once")
    if option.least is not None and (value is None or value < option.least):
        raise InputError(f"{word} must be at least {option.least}, not {value}")
