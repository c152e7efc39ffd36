"""`python -m sts_fast` is the command `sts-fast`."""

from sts_fast.cli import main

main()
