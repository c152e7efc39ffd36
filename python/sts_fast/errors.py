"""The exception for wrong input, and pieces of its messages."""

from collections.abc import Iterable


class InputError(ValueError):
    """Raised for input that cannot be used.

    The message is one sentence that names the thing and the remedy; the command line prints it after `error: `
    and exits with 2. It names options as on the command line: `--top-n` is the Python argument `top_n`. Where the two
    names differ otherwise, the `Option` of the argument's dataclass has the one of the command line.
    """


class SetTooSmall(InputError):
    """Raised for a set that has too few examples or prompts, where other sets may still be used."""


class UnusableRow(InputError):
    """Raised for a row of a file that holds no example, though other rows may.

    where:  the file and the row; reason: what the row has, as in "no question"; remedy: what to do about it
    """

    def __init__(self, where: str, reason: str, remedy: str) -> None:
        super().__init__(f"{where} has {reason}; {remedy}")
        self.reason = reason


def one_line(reason: object) -> str:
    """The reason in one line of at most 361 characters, for the middle of a message.

    A longer one keeps its start, and its end, where a remedy would be.
    """
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) <= 361 else f"{text[:200]}…{text[-160:]}"


def listed(names: Iterable[object], most: int = 20) -> str:
    """The first names, separated by commas, and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
