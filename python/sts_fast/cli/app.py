"""The command `sts-fast`: its commands, its exit codes, its errors in one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sts_fast._version import __version__
from sts_fast.cli.ablate import ablate
from sts_fast.cli.capture import capture
from sts_fast.cli.console import Interrupted, fail, out
from sts_fast.cli.demo import demo
from sts_fast.cli.doctor import doctor
from sts_fast.cli.forecast import compare, score, shift
from sts_fast.cli.mix import mix
from sts_fast.cli.options import with_options
from sts_fast.cli.output import expand_config
from sts_fast.cli.overlap import overlap
from sts_fast.cli.profile import merge, profile, work
from sts_fast.cli.rollouts import rollouts
from sts_fast.cli.search import search
from sts_fast.cli.trace import trace
from sts_fast.cli.validate import report, validate
from sts_fast.errors import InputError
from sts_fast.model.memory import is_out_of_memory
from sts_fast.ops import _cpu

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Forecast which abilities fine-tuning will move, before any training.",
)

# Return value of typer after Ctrl-C: it catches KeyboardInterrupt.
INTERRUPTED = 130
# Base of the errors that typer raises for a wrong command line: its ClickException, which it does not export.
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    cmakedir: Annotated[
        bool, typer.Option("--cmakedir", help="Show where CMake's find_package finds the C++ core, and exit.")
    ] = False,
) -> None:
    if version:
        out.print(__version__, highlight=False)
    elif cmakedir:
        sys.stdout.write(f"{_cmakedir()}\n")
    elif context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def _cmakedir() -> Path:
    """The folder of sts_fastConfig.cmake, beside the core that this process runs."""
    folder = Path(_cpu.__file__).parents[1] / "lib" / "cmake" / "sts_fast"
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: install the package, as with pip install .")
    return folder


# Each command with an example of it.
COMMANDS: dict[Callable[..., None], str] = {
    score: "sts-fast score --model M --sae S --train train.jsonl --domains evals/ --estimators act,trial",
    compare: "sts-fast compare --model M --sae S --train a=a.jsonl --train b=b.jsonl --domains evals/",
    shift: "sts-fast shift --model M --sae S --train train.jsonl",
    rollouts: "sts-fast rollouts --model M --sae S --train questions.jsonl --check math --domains evals/",
    profile: "sts-fast profile --model M --sae S --train a=a.jsonl --domains evals/ --library library",
    work: "sts-fast work library/plans/0f3a91c2b7de/plan.json --rank 0 --world 8",
    merge: "sts-fast merge library/plans/0f3a91c2b7de/plan.json",
    search: "sts-fast search --library library --up law --keep math,code",
    capture: "sts-fast capture --model M --sae S --train train.jsonl --domains evals/ --output activations",
    mix: "sts-fast mix --model M --sae S --train train.jsonl --pool pool/ --from RUN --budget 2000",
    validate: "sts-fast validate RUN --before eval-before/ --after eval-after/",
    ablate: "sts-fast ablate RUN",
    trace: "sts-fast trace RUN --domain law --drop 5%",
    overlap: "sts-fast overlap TRUE-RUN RUN",
    report: "sts-fast report RUN",
    demo: "sts-fast demo",
    doctor: "sts-fast doctor --model M --sae S --train train.jsonl --domains evals/",
}
for command, example in COMMANDS.items():
    app.command(epilog=f"Example: {example}")(with_options(command))


def given_once(command: str) -> set[str]:
    """The options of a command that take one value; none of a word that is no command."""
    group: Any = typer.main.get_command(app)
    parameters = group.commands[command].params if command in group.commands else []
    return {word for parameter in parameters if not getattr(parameter, "multiple", True) for word in parameter.opts}


def main() -> None:
    """Entry point: exit code 0, or 2 with one line `error: ...` on standard error."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # of a scheduler that takes the machine back: as Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        expand_config(given_once)
        if app(prog_name="sts-fast", standalone_mode=False) == INTERRUPTED:
            raise KeyboardInterrupt
    except (InputError, OSError) as error:  # OSError: names that are too long, folders that may not be listed
        fail(str(error))
    except CommandLineError as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        fail(f"{message.replace('Value error, ', '')} See sts-fast --help")  # the words are the parser's
    except (typer.Abort, KeyboardInterrupt, Interrupted) as interrupt:
        _end_of_interrupt(f"interrupted: {interrupt}" if isinstance(interrupt, Interrupted) else "interrupted")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # of Python 3.11, while a class is made
            _end_of_interrupt("interrupted")
        if not is_out_of_memory(error):
            raise
        fail("out of memory: lower --batch-tokens, or use --dtype bfloat16")


def _end_of_interrupt(message: str) -> None:
    # After an interrupt inside exec(), as while a dataclass is imported, Python would end by the signal even though it
    # is caught here; the next exec() clears that state of CPython.
    exec("")
    fail(message)
