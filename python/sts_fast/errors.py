"""The one exception that the user can act on."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one sentence that names the thing and the remedy; the command line prints it after `error: `
    and exits with 2.
    """
