"""What the command line shows of names that come from files, and of progress where there is no terminal."""

from __future__ import annotations

import io

import pytest

from sts_fast.cli import console
from sts_fast.cli.app import COMMANDS, app
from sts_fast.cli.console import Lines, Table, VisibleConsole, fail, printable, show


def test_control_characters_are_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    name = "law\x1b[2J\x1b]0;title\x07\x9b31m\x7f"
    shown = "law␛[2J␛]0;title␇�31m�"
    assert printable(f"{name}\t\n") == f"{shown}\t\n"
    written = io.StringIO()
    out = VisibleConsole(file=written, width=60)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    out.print(table)
    out.print(f"a {name}", markup=False, highlight=False)
    assert written.getvalue().count(shown) == 4
    assert "\x1b" not in written.getvalue()
    show(name)
    with pytest.raises(SystemExit):
        fail(name)
    assert capsys.readouterr().err == f"{shown}\nerror: {shown}\n"


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    lines = Lines("prompts")
    for after, stage, done in ((0, "law", 0), (10, "law", 10), (25, "law", 20), (5, "law", 40), (31, "law", 50),
                               (40, "law", 80), (40, "art", 5), (40, "art", 20), (40, "law", 100)):  # fmt: skip
        now[0] += after
        lines.tell(stage, done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "law: 20 of 100 prompts, 0.571 a second, 140 s left",
        "law: 50 of 100 prompts, 0.704 a second, 71 s left",
        "law: 80 of 100 prompts, 0.721 a second, 28 s left",
        "art: 5 of 100 prompts",
        "art: 20 of 100 prompts, 0.375 a second, 213 s left",
    ]


def test_every_command_has_an_example_of_itself() -> None:
    assert [command.callback.__name__ for command in app.registered_commands if command.callback] == [
        command.__name__ for command in COMMANDS
    ]
    for command, example in COMMANDS.items():
        assert example.startswith(f"sts-fast {command.__name__}")
