"""The pages of the reference: the command line, Python, options, C++ and files, each from its source."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from typer.models import ParameterInfo

import sts_fast
from sts_fast.cli.app import app
from sts_fast.data.options import Checked, annotations_of, choices_of, element_choices_of, option_of, type_of

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "csrc" / "include" / "sts"

# The pages of the public names, by room of the package.
PYTHON = {
    "forecasts": ("Forecasts", ("forecast",)),
    "profiles": ("Profiles and libraries", ("profile",)),
    "saes": ("SAEs and their statistics", ("sae", "ops")),
    "data": ("Data", ("data", "errors")),
    "activations": ("Activations in files", ("model",)),
    "outcomes": ("Outcomes and calibration", ("outcomes",)),
    "reports": ("Reports", ("report",)),
    "more": ("Mixtures, RL and ablation", ("mix", "rollouts", "ablate")),
}
# Public, but no name of the package itself, as importing it loads torch.
OF_TRAINING = "sts_fast.trainer.TransferMonitor"
OPTIONS_PAGE = "reference/options.md"
CPP_PAGE, FILES_PAGE = "reference/cpp.md", "reference/files.md"

# By schema, the file that it describes.
SCHEMAS = {
    "forecast/scores.schema.json": "scores.json",
    "forecast/trace.schema.json": "trace.json",
    "ablate/ablation.schema.json": "ablation.json",
    "mix/mix.schema.json": "mix.json",
    "outcomes/calibration/calibration.schema.json": "calibration.json",
}
PAGE_OF = {
    **{path.relative_to(ROOT).as_posix(): CPP_PAGE for path in HEADERS.glob("*.h")},
    **{f"python/sts_fast/{schema}": FILES_PAGE for schema in SCHEMAS},
}


def pages() -> dict[str, str]:
    """Text by page."""
    return {
        "reference/command-line.md": command_line(),
        **{f"reference/{name}.md": python(title, rooms) for name, (title, rooms) in PYTHON.items()},
        "reference/training.md": f"# Training\n\n::: {OF_TRAINING}\n",
        OPTIONS_PAGE: options(),
        CPP_PAGE: cpp(),
        FILES_PAGE: file_formats(),
    }


def command_line() -> str:
    """All commands with all of their options, as typer is given them."""
    parts = [
        "# Command line",
        "An error is one line on standard error, with exit code 2. `--config run.yaml` gives any options of a command.",
    ]
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.epilog is not None
        parts += [f"## {command.callback.__name__}", inspect.getdoc(command.callback) or ""]
        parts.append(f"```bash\n{command.epilog.removeprefix('Example: ')}\n```")
        panels: dict[str | None, list[tuple[str, ...]]] = {}
        for parameter in inspect.signature(command.callback).parameters.values():
            given = next(extra for extra in get_args(parameter.annotation) if isinstance(extra, ParameterInfo))
            typed = [word for word in (given.default, *(given.param_decls or ())) if isinstance(word, str)]
            words = ", ".join(f"`{word}`" for word in typed or [parameter.name.upper()])
            row = (words, value_of(type_of(parameter.annotation)), default_of(parameter), given.help or "")
            panels.setdefault(given.rich_help_panel, []).append(row)
        for panel, rows in panels.items():
            parts += [f"**{panel}**"] if panel else []
            parts.append(table(("option", "value", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def value_of(kind: Any) -> str:
    """What an option takes: nothing, one of some words, or a value of a type."""
    kinds = [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) is not Literal else [kind]
    plain = kinds[0] if kinds else kind
    if choices := choices_of(plain):
        return ", ".join(f"`{choice}`" for choice in choices)
    return "" if plain is bool else plain.__name__.lower()


def default_of(parameter: Any) -> str:
    """The default of a parameter or of a dataclass's field."""
    missing = (inspect.Parameter.empty, dataclasses.MISSING)
    value = parameter.default
    if value in missing:
        return "required" if (make := getattr(parameter, "default_factory", missing[1])) in missing else f"`{make()}`"
    return "" if value is None or value is False else f"`{value}`"


def python(title: str, rooms: tuple[str, ...]) -> str:
    """The public names that come from some rooms, in the order of the alphabet, functions first."""
    names = [name for name in sts_fast.__all__ if room_of(getattr(sts_fast, name)) in rooms]
    names.sort(key=lambda name: (inspect.isclass(getattr(sts_fast, name)), name))
    # Under the names of their modules: `sts_fast.mix` is also a package.
    paths = (f"::: {getattr(sts_fast, name).__module__}.{name}" for name in names)
    return "\n\n".join([f"# {title}", "Import them from `sts_fast`.", *paths]) + "\n"


def room_of(value: Any) -> str:
    return getattr(value, "__module__", "sts_fast._version").split(".")[1]


def options() -> str:
    """The keywords of the functions, by dataclass."""
    parts = [
        "# Options",
        "Functions take these as keywords, and commands as options: `domain_shots=2` is `--domain-shots 2`.",
    ]
    for each in sorted(option_classes(), key=lambda each: each.__name__):
        bases = [base for base in each.__bases__ if base is not Checked]
        own = {name: annotation for name, annotation in annotations_of(each).items() if name in each.__annotations__}
        defaults = {field.name: field for field in dataclasses.fields(each)}
        rows = (
            (f"`{name}`", spelled(type_of(annotation)), default_of(defaults[name]), option.help)
            for name, annotation in own.items()
            if (option := option_of(annotation)) is not None
        )
        links = ", ".join(f"[{base.__name__}](#{base.__name__.lower()})" for base in bases)
        parts += [f"## {each.__name__}", table(("keyword", "type", "default", "meaning"), rows)]
        parts += [f"And those of {links}."] if links else []
    return "\n\n".join(parts) + "\n"


def option_classes(of: Any = Checked) -> Iterator[Any]:
    """The dataclasses of options that functions of the package take, and what they are made of."""
    found = {}
    for each in of.__subclasses__():
        if not each.__module__.startswith("sts_fast.cli"):
            found[each] = None
            found |= dict.fromkeys(option_classes(each))
    yield from found


def spelled(kind: Any) -> str:
    """A type in words: the values of a Literal, else the names of its parts."""
    if choices := choices_of(kind) or element_choices_of(kind):
        return ", ".join(f"`{choice}`" for choice in choices)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    names = [part.__name__ if isinstance(part, type) and not get_args(part) else str(part) for part in parts]
    return " or ".join(re.sub(r"\b\w+\.", "", name) for name in names if name != "NoneType")


def cpp() -> str:
    """The headers of the core; each begins with what it is for."""
    parts = ["# C++ and C", "[How to embed the core](../embedding.md) in a program, without Python or torch."]
    for path in sorted(HEADERS.glob("*.h"), key=lambda path: (path.name != "sae_ops.h", path.name)):
        parts += [f"## sts/{path.name}", f"```cpp\n{path.read_text(encoding='utf-8')}```"]
    return "\n\n".join(parts) + "\n"


def file_formats() -> str:
    """The JSON files by their schemas."""
    parts = [
        "# Files",
        "What commands write is replaced as a whole, or left as it was. Tables are Parquet, tensors are safetensors; "
        "[the manual](../manual.md#your-own-forecast) lists the files of a run. The JSON files follow these "
        "schemas, which are in the package.",
    ]
    for path, name in SCHEMAS.items():
        schema = json.loads((ROOT / "python" / "sts_fast" / path).read_text(encoding="utf-8"))
        rows = ((f"`{key}`", form, meaning) for key, form, meaning in keys(schema, schema, ""))
        parts += [f"## {name}", f"`sts_fast/{path}`", table(("key", "form", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def keys(schema: Any, whole: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(key, form, meaning) of everything in an object, those of objects in it behind them."""
    for name, value in schema.get("properties", {}).items():
        part, meaning = value, value.get("description", "")
        while "$ref" in part:
            part = whole["$defs"][part["$ref"].rsplit("/", 1)[1]]
            meaning = meaning or part.get("description", "")
        yield f"{prefix}{name}", form_of(part), meaning
        yield from keys(part, whole, f"{prefix}{name}.")
        if isinstance(items := part.get("items"), dict):
            inner = whole["$defs"][items["$ref"].rsplit("/", 1)[1]] if "$ref" in items else items
            yield from keys(inner, whole, f"{prefix}{name}[].")


def form_of(part: Any) -> str:
    if "const" in part:
        return json.dumps(part["const"])
    if "enum" in part:
        return ", ".join(map(json.dumps, part["enum"]))
    if options := part.get("oneOf") or part.get("anyOf"):
        return " or ".join(dict.fromkeys(form_of(option) for option in options))
    kinds = part.get("type", "any")
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([cell if "`" in cell else cell.replace("|", "\\|") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
