"""The command line `sts-fast`: one file per command, or per group of commands that share their options."""

from sts_fast.cli.app import main

__all__ = ["main"]
