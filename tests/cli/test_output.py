"""Commands that are killed go on from what they had computed, and end with the same results."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from killed import Ended, lasting, run
from tiny import Tiny

ASKED = ["--shots", 1, "--domain-shots", 1, "--limit", 12, "--top-n", 8, "--device", "cpu", "--batch-tokens", 400]
# By command, its words, and the passes of the whole model after which it is killed.
COMMANDS: dict[str, tuple[str, int]] = {
    "score": ("--train sums --estimators act,ntk,trial --trial-steps 4", 7),
    "compare": ("--train sums --train days --estimators act,trial --trial-steps 3", 8),
    "rollouts": (
        "--train sums --check reward:by_length --sample 2 --max-new-tokens 5 --ways verified,gradient",
        18,
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_killed_again_and_again_ends_as_if_it_were_not(
    command: str, tiny: Tiny, tmp_path: Path
) -> None:
    files = {"sums": tiny.train, **tiny.domains}
    given, most_passes = COMMANDS[command]
    words = [command, "--model", tiny.model, "--sae", tiny.saes["topk"], *ASKED]
    words += [files.get(word, word) for word in given.split()]
    words += [word for name, path in tiny.domains.items() for word in ("--domains", f"{name}={path}")]
    words += ["--output", tmp_path / "run"]
    undisturbed = run(words, tmp_path)
    assert undisturbed.code == 0, undisturbed.err
    expected = lasting(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")

    kept, ran, damaged = tmp_path / ".run.kept", list[Ended](), 0
    while not ran or ran[-1].code == -signal.SIGKILL:
        ran.append(run(words, tmp_path, most_passes=most_passes))
        assert len(ran) < 20
        assert not (tmp_path / "run").exists() or ran[-1].code == 0
        if len(ran) == 2:  # a bit of one file flips
            [path, *_] = sorted(kept.glob("*.safetensors"))
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        damaged += ran[-1].err.count("is damaged: it is made again")
    assert ran[-1].code == 0, ran[-1].err
    assert damaged == 1
    assert len(ran) > 3
    assert ran[-1].n_passes <= most_passes < undisturbed.n_passes / 2
    assert lasting(tmp_path / "run") == expected
    assert not kept.exists()
