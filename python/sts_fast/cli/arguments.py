"""Turns what was typed into arguments of the package's functions."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sts_fast.data.hub import hub_name
from sts_fast.data.lm_eval import is_tasks, tasks_name
from sts_fast.data.options import Option
from sts_fast.data.sources import check_places, named_place
from sts_fast.errors import InputError
from sts_fast.ops import _cpu, backend
from sts_fast.places import PLACES, place_name, split_name
from sts_fast.sae import SAE, load_sae

MOST_THREADS = 1024
Threads = Annotated[int | None, Option("Threads of the core; default: all cores.")]


def named_trains(values: list[str]) -> dict[str, list[str]]:
    """By name, the places of the training sets; several that are given under one name are one set."""
    trains: dict[str, list[str]] = {}
    unnamed: set[str] = set()
    for value in values:
        given, place = named_place(value)
        by_place = tasks_name(place) if is_tasks(place) else hub_name(place) or Path(place).name.partition(".")[0]
        name = by_place if given is None else given
        if name in ("", ".", "..", *unnamed) or "/" in name or (given is None and name in trains):
            raise InputError(f"--train {value} needs a name of its own: write it as name=path")
        unnamed |= {name} if given is None else set()
        trains.setdefault(name, []).append(place)
    check_places([place for places in trains.values() for place in places])
    return trains


@dataclass(frozen=True)
class Places:
    """Places where SAEs are read; each option is given once for all SAEs, or once for each."""

    TITLE = "SAE"

    hook: Annotated[
        list[str] | None,
        Option(
            "Where the SAE reads, instead of where its files say: blocks.12.hook_mlp_out, or a module's path; once "
            "for all SAEs, or once for each."
        ),
    ] = None
    layer: Annotated[
        list[int] | None,
        Option("Read after this layer (or at its --hook), instead of where the files say; as --hook."),
    ] = None
    norm_scaling_factor: Annotated[
        list[float] | None, Option("Factor of an SAE's input, if its files lack it; as --hook.")
    ] = None

    def load(self, sources: list[str], dtype: str | None) -> list[SAE]:
        """The SAEs, each with its options of the command line."""

        def for_each(option: str, values: list[Any] | None) -> list[Any]:
            if len(values or [None]) not in (1, len(sources)):
                raise InputError(
                    f"{option} is given {len(values or [])} times for {len(sources)} SAEs: give it once, or once "
                    "for each"
                )
            return list(values or [None]) * (len(sources) if len(values or [None]) == 1 else 1)

        chosen = (
            for_each("--hook", self.hook),
            for_each("--layer", self.layer),
            for_each("--norm-scaling-factor", self.norm_scaling_factor),
        )
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
                raise InputError(f"--hook {hook} exists in every layer: choose one with --layer")
            where = {"hook": place_name(hook, layer)} if both else {"hook": hook, "layer": layer}
            loaded.append(load_sae(source, norm_scaling_factor=factor, dtype=dtype, **where))
        return loaded


@dataclass(frozen=True)
class Core:
    """Options of the native core."""

    TITLE = "Computation"

    precision: Annotated[
        str | None, Option("Precision on CUDA: bf16, bf16x2 or fp32; default: by the SAE's weights.")
    ] = None
    threads: Threads = None

    def apply(self) -> None:
        set_threads(self.threads)
        try:
            backend.set_precision(self.precision)
        except ValueError as error:
            raise InputError(f"--{error}") from error


def values_by_set(option: str, rows: list[str] | None, *, number: bool = False) -> dict[str, Any]:
    """Values of an option by set; '' for a value that is for all sets."""
    values: dict[str, Any] = {}
    for row in rows or []:
        name, equals, text = row.rpartition("=")
        if number and name in values:
            raise InputError(f"{option} is given twice for '{name}': give it once")
        if not text or (not name and (equals or number)):
            raise InputError(f"{option} takes {'SET=NUMBER' if number else 'FIELD or SET=FIELD'}, not '{row}'")
        try:
            values[name] = float(text) if number else text
        except ValueError as error:
            raise InputError(f"{option} takes SET=NUMBER, not '{row}'") from error
    return values


def or_none(option: str, number: int) -> int | None:
    """None for 0, which means no limit on the command line."""
    if number < 0:
        raise InputError(f"{option} must be at least 1, or 0 for all, not {number}")
    return number or None


def set_threads(threads: int | None) -> None:
    """Sets the number of threads of the native core; None changes nothing."""
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise InputError(f"--threads must lie between 1 and {MOST_THREADS}, not {threads}")
    _cpu.set_num_threads(threads)


def typed_options() -> list[str]:
    """Returns the options of the command line in their order, each once; defaults are not among them."""
    words = (word.partition("=")[0] for word in sys.argv[2:])
    return list(dict.fromkeys(word for word in words if word.startswith("--")))


def typed_command() -> str:
    """The command as typed, without options that change no result: --output, --overwrite, --threads, --json,
    --quiet.
    """
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in ("--output", "--threads"):
            next(words, None)
        elif not word.startswith(("--output=", "--threads=")) and word not in ("--json", "--overwrite", "--quiet"):
            kept.append(word)
    return shlex.join(["sts-fast", *kept])
