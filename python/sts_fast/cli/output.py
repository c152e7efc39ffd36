"""Folders of results: their names, the file of options beside them, and commands from such a file."""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from sts_fast import files
from sts_fast._version import __version__
from sts_fast.cli.console import Interrupted, is_quiet, say
from sts_fast.data.options import Option
from sts_fast.errors import InputError, one_line
from sts_fast.profile.library import Library
from sts_fast.profile.profile import Profile

# Options that say where results go and how they are shown; they are not written beside them.
NOT_KEPT = ("output", "overwrite", "config", "json", "quiet", "threads")
CONFIG = "--config"


@dataclass(frozen=True)
class Output:
    """Options of the results: their folder, and the file that options are read from."""

    TITLE = "Results"

    output: Annotated[Path | None, Option("Folder for the results; default: sts-fast-COMMAND-DATE.")] = None
    overwrite: Annotated[bool, Option("Replace the results that --output holds; default: the next free name.")] = False
    config: Annotated[
        Path | None, Option("File of options, such as run.yaml of earlier results; typed ones come first.")
    ] = None  # read by with_config, before the options are

    @contextmanager
    def folder(self) -> Iterator[files.Results]:
        """The folder of a command's results, put in place when it is whole; see files.results."""
        place = self.output or Path(f"{_default_name()}-{datetime.date.today().isoformat()}")
        if self.overwrite:
            _check_inputs(place)
        results: files.Results | None = None
        try:
            with files.results(place, overwrite=self.overwrite) as results:
                yield results
                (results.folder / files.RESULTS_FILE).write_text(typed_config(), encoding="utf-8")
        except KeyboardInterrupt:
            if results is None or not results.placed:
                raise Interrupted("no result was written") from None
            raise Interrupted(f"the results are in {results.path}") from None
        if is_quiet() and os.path.realpath(results.path) != os.path.realpath(place):
            say(f"warning: {place} holds results already: these are in {results.path}")

    @contextmanager
    def kept(self) -> Iterator[files.Kept]:
        """What the command computes, kept in a folder beside the results until they are whole."""
        place = self.output or Path(f"{_default_name()}-{hashlib.sha256(typed_config().encode()).hexdigest()[:8]}")
        with _kept_in(files.hidden(place, "kept")) as kept:
            yield kept


@contextmanager
def kept_beside(folder: Path) -> Iterator[files.Kept]:
    """What a command that writes into a run's folder computes, kept beside it until the command has ended well."""
    folder = folder.absolute()
    with _kept_in(files.hidden(folder, f"{sys.argv[1]}.kept")) as kept:
        yield kept


@contextmanager
def _kept_in(folder: Path) -> Iterator[files.Kept]:
    """What a command computes, kept in a folder until it has ended well; see files.kept."""
    with files.kept(folder):
        for profile in Library(folder):
            try:
                Profile.load(profile)
            except InputError:  # as after a power cut
                say(f"{profile} is damaged: it is made again")
                shutil.rmtree(profile)
        kept = files.Kept(folder, say)
        try:
            yield kept
        except BaseException:
            counts = {"profiles": len(Library(folder)), **kept.counts()}
            if done := ", ".join(f"{n} {name}" for name, n in counts.items() if n):
                say(f"What was done so far ({done}) is kept in {folder}: the same command goes on from there")
            raise


@contextmanager
def completed(folder: Path) -> Iterator[None]:
    """Where what is done so far stays in a folder: an interrupt says so, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        left = f"what was done so far is in {folder}: the same command goes on from there"
        raise Interrupted(left if folder.is_dir() and any(folder.iterdir()) else "no result was written") from None


def _check_inputs(place: Path) -> None:
    """Raises InputError where something that was typed lies in the folder that is to be replaced."""
    folder = os.path.realpath(place)
    for word in sys.argv[2:]:
        path = word.rpartition("=")[2]
        if os.path.exists(path) and os.path.realpath(path).startswith(folder + os.sep):
            raise InputError(f"--overwrite would delete {path}, which the command reads: give another --output")


def _default_name() -> str:
    return f"sts-fast-{sys.argv[1]}"


def typed_config() -> str:
    """The options of the command line, as YAML that --config reads."""
    options: dict[str, list[Any]] = {}
    words = sys.argv[2:]
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            after = words[i + 1 : i + 2]
            of_word: Any = value if equals else True if not after or after[0].startswith("--") else after[0]
            options.setdefault(name, []).append(of_word)
    plain = {name: of if len(of) > 1 else of[0] for name, of in options.items() if name not in NOT_KEPT}
    head = f"# sts-fast {__version__}: sts-fast {sys.argv[1]} --config {files.RESULTS_FILE} makes it again\n"
    return head + (yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if plain else "")


def with_config(words: list[str], once: Collection[str] = ()) -> list[str]:
    """A command line with the options of its --config typed out, but those that it types itself.

    once: options that take one value

    Raises InputError where the file cannot be read, does not hold options by name, or has several values of one that
    takes one.
    """
    at = next((i for i, word in enumerate(words) if word == CONFIG or word.startswith(f"{CONFIG}=")), None)
    if at is None:
        return words
    alone = words[at] == CONFIG
    if alone and at + 1 == len(words):
        return words  # the parser says what is missing
    path = Path(words[at + 1] if alone else words[at].partition("=")[2])
    typed = [*words[:at], *words[at + 1 + alone :]]
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a file of options: {one_line(error)}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path} is no file of options: give names and values, as 'top-n: 50'")
    given = {word.partition("=")[0] for word in typed}
    more: list[str] = []
    for name, value in options.items():
        word = f"--{name}"
        if word in given or value is None or value is False:
            continue
        if isinstance(value, list) and word in once:
            raise InputError(f"{path}: {name} takes one value, and {len(value)} are listed: give one")
        for element in value if isinstance(value, list) else [value]:
            if isinstance(element, (dict, list)):
                raise InputError(f"{path}: {name} must be a value, or a list of some")
            more += [word] if element is True else [word, str(element)]
    return [*typed, *more]


def expand_config(once: Callable[[str], Collection[str]]) -> None:
    """Replaces --config on this process's command line by the options of its file.

    once: from the name of a command to its options that take one value

    Raises InputError as with_config, and where such an option was typed twice.
    """
    words = sys.argv[1:]
    names = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    if CONFIG in names or len({*names}) < len(names):
        of_command = once(words[0])
        for name in dict.fromkeys(names):
            if name in of_command and names.count(name) > 1:
                raise InputError(f"{name} is given twice or more often, but takes one value: give it once")
        sys.argv[1:] = with_config(words, of_command)
