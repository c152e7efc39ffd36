"""What the command line shows of names that come from files, and of progress where there is no terminal."""

from __future__ import annotations

import io

import pytest

from sts_fast.cli import console
from sts_fast.cli.app import COMMANDS, app
from sts_fast.cli.console import Lines, Table, VisibleConsole, fail, printable, show
from sts_fast.data.progress import WHOLE, with_whole


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


def test_a_line_tells_of_the_whole_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sets of 400 and 100 tokens: after 50 of 100 prompts of the first, 40% of all; 120 s for 200 of 500."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    tell = with_whole(Lines("prompts").tell, {"law": 400, "art": 100})
    assert tell is not None
    for after, stage, done in ((0, "law", 0), (120, "law", 50), (120, "law", 100), (60, "art", 50)):
        now[0] += after
        tell(stage, done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "law: 50 of 100 prompts, 0.417 a second, 120 s left; 40% of all sets, 3 min left",
        "art: 50 of 100 prompts; 90% of all sets, 33 s left",
    ]


def test_a_stage_that_is_passed_over_is_done() -> None:
    told: list[tuple[str, int, int]] = []
    tell = with_whole(lambda *stage: told.append(stage), {"law": 30, "art": 50, "music": 20})
    assert tell is not None
    for stage, done, total in (("law", 1, 3), ("music", 1, 2), ("maps", 1, 9), ("law", 3, 3)):
        tell(stage, done, total)
    whole = [(done, total) for stage, done, total in told if stage == WHOLE]
    assert whole == [(10, 100), (90, 100), (90, 100)]
    assert [stage for stage, _, _ in told] == [WHOLE, "law", WHOLE, "music", "maps", WHOLE, "law"]
    assert with_whole(None, {"law": 1}) is None


def test_every_command_has_an_example_of_itself() -> None:
    assert [command.callback.__name__ for command in app.registered_commands if command.callback] == [
        command.__name__ for command in COMMANDS
    ]
    for command, example in COMMANDS.items():
        assert example.startswith(f"sts-fast {command.__name__}")
