"""What is done to a command in a place: each accident returns what went wrong, and counts what it saw."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from commands import Command, commands
from process import Ended, Fault, State, Words, copied, run, start, state, visible
from tiny import Tiny

SIGNALS = (signal.SIGKILL, None, signal.SIGINT, None, signal.SIGTERM)  # None: SIGKILL around a change of names
ROOMY = "size=64m,nr_inodes=10000"


@dataclass(frozen=True)
class Place:
    """A folder that a command runs in, and what it holds before and after an undisturbed run."""

    command: Command
    folder: Path
    words: Words
    before: State
    after: State
    moments: int
    seconds: float

    @property
    def earlier(self) -> bool:
        return any(name.startswith("out") for name in self.before)


class Places:
    """The places of all commands, by name, with earlier results of it or without."""

    def __init__(self, root: Path, tiny: Tiny) -> None:
        self.root = root
        self.commands = commands(root, tiny)
        self.made: dict[tuple[str, bool], Place] = {}

    def make(self, name: str, earlier: bool) -> Place:
        command = self.commands[name]
        folder = self.root / f"{name.replace(' ', '_')}-{'earlier' if earlier else 'empty'}"
        folder.mkdir()
        for words in (*command.before, *(command.earlier if earlier else ())):
            _well(run(words, folder))
        words = (*command.words, *(command.overwrite if earlier else ()))
        with copied(folder, self.free()) as at:
            ended = _well(run(words, at))
            after = state(at)
        assert after == visible(after), f"{name} leaves something hidden among {sorted(after)}"
        return Place(command, folder, words, state(folder), after, ended.moments, ended.seconds)

    def free(self) -> Path:
        """A name that no other process uses."""
        return self.root / f"at-{os.getpid()}"


def _well(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


Accident = Callable[[Places, str, int, random.Random, Counter[str]], list[str]]


def kill(places: Places, name: str, number: int, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Ends it by a signal, anywhere; looks at what it left; and runs it again."""
    place = places.made[name, number % 2 == 1]
    sent = SIGNALS[number % len(SIGNALS)]
    while True:
        if sent is None:
            fault = Fault(moment=rng.randrange(place.moments), exchanges=rng.random() < 0.7)
        else:
            fault = Fault(sent, after=rng.uniform(0.01, place.seconds))
        with copied(place.folder, places.free()) as at:
            ended = run(place.words, at, fault)
            if ended.code == 0:
                counts["ended before"] += 1
                continue
            counts["kills"] += 1
            if sent in (None, signal.SIGKILL):
                told = [] if ended.code == -signal.SIGKILL else [f"ended with {ended.code}: {ended.err}"]
            else:
                told = [] if ended.refused("interrupted") else [f"{sent} ended it with {ended.code}: {ended.err}"]
            return [f"{fault}: {line}" for line in told + again(place, at, counts)]


def full_disk(places: Places, name: str, number: int, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Runs it on a disk with too little room or too few inodes, and again with enough."""
    place = places.made[name, number % 2 == 1]
    with mounted(places.free()) as disk, copied(place.folder, disk / "at") as at:
        used = os.statvfs(disk)
        if number % 3 == 2:
            limit = f"nr_inodes={used.f_files - used.f_ffree + rng.randrange(1, 10)}"
        else:
            limit = f"size={(used.f_blocks - used.f_bfree) * used.f_frsize // 1024 + rng.randrange(1, 150)}k"
        ended = _run_on(disk, limit, place, at)
        counts["full disks" if ended.code else "had room"] += 1
        told = [] if ended.code == 0 or ended.refused("No space left") else [f"ended with {ended.code}: {ended.err}"]
        return [f"{limit}: {line}" for line in told + again(place, at, counts)]


def read_only(places: Places, name: str, number: int, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Runs it on a disk that cannot be written to, and again when it can."""
    place = places.made[name, number % 2 == 1]
    with mounted(places.free()) as disk, copied(place.folder, disk / "at") as at:
        ended = _run_on(disk, "ro", place, at)
        counts["accidents"] += 1
        told = [] if ended.refused("Read-only file system") else [f"ended with {ended.code}: {ended.err}"]
        return told + again(place, at, Counter())


def _run_on(disk: Path, limit: str, place: Place, at: Path) -> Ended:
    subprocess.run(["mount", "-o", f"remount,{limit}", disk], check=True)
    try:
        return run(place.words, at)
    finally:
        subprocess.run(["mount", "-o", f"remount,rw,{ROOMY}", disk], check=True)


def again(place: Place, at: Path, counts: Counter[str]) -> list[str]:
    """Looks at what an accident left, and runs the command again."""
    left = state(at)
    if not any(name.startswith("out") for name in left):  # killed where no two names can be exchanged
        left = {name.replace(".out.earlier", "out"): digest for name, digest in left.items()}
    left = visible(left)
    told = torn(place, left)
    if left == place.before:
        counts["earlier left whole"] += 1
    elif left == place.after:
        counts["new left whole"] += 1
        if place.command.overwrite and not place.earlier:  # again, it would take the next free name
            shutil.rmtree(at / "out")
    elif not told:
        counts["parts left whole"] += 1
    ended = run(place.words, at)
    if ended.code != 0:
        return [*told, f"the same command again ends with {ended.code}: {ended.err}"]
    differs = {name for name, _ in {*state(at).items()} ^ {*place.after.items()}}
    if differs:
        return [*told, f"the same command again gives other bytes: {sorted(differs)}"]
    counts["same bytes again"] += 1
    return told


def torn(place: Place, left: State) -> list[str]:
    """What is neither as before nor as after; of results that are put in place in parts, the parts that are not."""
    if left in (place.before, place.after):
        return []
    names = {*left, *place.before, *place.after} - {"out/activations.json"}  # it names the shards that are there
    parts = {name: [name] for name in names}
    if place.command.kind == "sets":
        folders = {name.rpartition("/")[0] for name in names}
        parts = {folder: [name for name in names if name.rpartition("/")[0] == folder] for folder in folders}
    elif place.command.kind == "whole":
        parts = {"out": sorted(names)}

    def of(whole: State, part: list[str]) -> State:
        return {name: whole[name] for name in part if name in whole}

    return [
        f"{name} is neither the earlier nor the new one"
        for name, part in parts.items()
        if of(left, part) not in (of(place.before, part), of(place.after, part))
    ]


def two_at_once(places: Places, name: str, number: int, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Runs it twice at the same time; new results of both have a folder of their own."""
    place = places.made[name, number % 2 == 1]
    with copied(place.folder, places.free()) as at:
        ended = [end() for end in [start(place.words, at) for _ in range(2)]]
        found, expected = state(at), dict(place.after)
        if place.command.overwrite and not place.earlier:
            expected |= {name.replace("out", "out-2", 1): digest for name, digest in expected.items()}
    counts["accidents"] += 1
    told = [one.err for one in ended if one.code != 0]
    return told + ([] if found == expected else [f"two at once leave {sorted({*found.items()} ^ {*expected.items()})}"])


def something_else(places: Places, name: str, number: int, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Finds something there that is not its own: a folder, a file, a link to a folder, a link in a hidden place."""
    place, told = places.made[name, False], []
    with copied(place.folder, places.free()) as at:
        (at / "others").mkdir()
        (at / "others" / "notes.txt").write_text("mine")
        for put in ("folder", "file", "link", "hidden"):
            out = at / ("out" if put != "hidden" else ".out.kept")
            if put == "folder":
                shutil.copytree(at / "others", out)
            elif put == "file":
                out.write_text("mine")
            else:
                out.symlink_to(at / "others")
            before = state(at)
            ended = run((*place.words, *place.command.overwrite), at)
            counts["accidents"] += 1
            if not ended.refused():
                told.append(f"with another's {put} in its place, it ended with {ended.code}: {ended.err}")
            if state(at) != before:
                told.append(f"it changed another's {put}")
            shutil.rmtree(out) if put == "folder" else out.unlink()
        # Under a name as its own temporaries have, but a link.
        (at / f".out.{'0' * 16}.tmp").symlink_to(at / "others")
        told += [] if run(place.words, at).code == 0 else ["a planted link stops it"]
        counts["accidents"] += 1
        if (at / "others" / "notes.txt").read_text() != "mine":
            told.append("it followed a planted link")
    return told


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """An empty disk in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", ROOMY, "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        mounting = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False)
        return mounting.returncode == 0 and subprocess.run(["umount", folder], check=False).returncode == 0
