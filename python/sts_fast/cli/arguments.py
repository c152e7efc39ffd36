"""What was typed, as the functions of the package take it."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError
from sts_fast.ops import _cpu
from sts_fast.places import PLACES, place_name, split_name
from sts_fast.sae import SAE, load_sae

MOST_THREADS = 1024


def named_trains(values: list[str]) -> dict[str, Path]:
    trains: dict[str, Path] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        path = Path(rest if equals and not Path(value).exists() else value)
        name = name if str(path) == rest and equals else path.name.partition(".")[0]
        if name in ("", ".", "..", *trains) or "/" in name:
            raise InputError(f"--train {value} needs a name of its own: write it as name=path")
        trains[name] = path
    return trains


def load_saes(
    sources: list[str],
    hooks: list[str] | None,
    layers: list[int] | None,
    factors: list[float] | None,
    *,
    dtype: str | None,
) -> list[SAE]:
    """The SAEs, with what the command line says of each: an option is given once for all of them, or once for each."""

    def for_each(option: str, values: list[Any] | None) -> list[Any]:
        if len(values or [None]) not in (1, len(sources)):
            raise InputError(f"{option} is given {len(values or [])} times for {len(sources)} SAEs: once, or once each")
        return list(values or [None]) * (len(sources) if len(values or [None]) == 1 else 1)

    chosen = (for_each("--hook", hooks), for_each("--layer", layers), for_each("--norm-scaling-factor", factors))
    loaded = []
    for source, hook, layer, factor in zip(sources, *chosen, strict=True):
        both = hook is not None and layer is not None
        if both and split_name(hook)[1] is not None:
            raise InputError(
                f"--layer and --hook say the same thing: give one of them, or --hook as {', '.join(PLACES)}"
            )
        if layer is not None and layer < 0:
            raise InputError(f"--layer counts from 0, and is not {layer}")
        if hook is not None and layer is None and hook.removeprefix("hook_") in (*PLACES, "z"):
            raise InputError(f"--hook {hook} is a place of every layer: say of which, with --layer")
        where = {"hook": place_name(hook, layer)} if both else {"hook": hook, "layer": layer}
        loaded.append(load_sae(source, norm_scaling_factor=factor, dtype=dtype, **where))
    return loaded


def fields(option: str, values: list[str] | None) -> dict[str, str]:
    fields = {}
    for value in values or []:
        name, equals, field = value.rpartition("=")
        if not field or (equals and not name):
            raise InputError(f"{option} takes FIELD or SET=FIELD, not '{value}'")
        fields[name] = field
    return fields


def set_threads(threads: int | None) -> None:
    """Of the native core; None leaves it as it is."""
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise InputError(f"--threads must lie between 1 and {MOST_THREADS}, not {threads}")
    _cpu.set_num_threads(threads)


def plain_value(value: Any) -> Any:
    return str(value) if isinstance(value, StrEnum) else value


def typed_command() -> str:
    """The command as typed, less the options that change where results go and how fast, but not what they are."""
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in ("--output", "--threads"):
            next(words, None)
        elif not word.startswith(("--output=", "--threads=")) and word != "--json":
            kept.append(word)
    return shlex.join(["sts-fast", *kept])
