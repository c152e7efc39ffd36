"""The one exception that the user can act on."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one sentence that names the thing and the remedy; the command line prints it after `error: `
    and exits with 2.
    """


def one_line(reason: object) -> str:
    """The reason in one line of at most 200 characters, for the middle of a message."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 200 else text[:200] + "…"
