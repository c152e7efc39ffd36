"""Kills commands and fills disks: earlier results stay whole, and the same command again gives the same bytes.

    make faults                              300 kills, 30 full disks, and other accidents
    PYTHONPATH=tests python tests/faults/faults.py --kills 1000 --disks 0 --seed 7 --only score --only mix

Disks are filled where one can be mounted in memory, as root.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported: threads are not forked

import argparse
import importlib
import multiprocessing
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import tiny
import torch
from accidents import Accident, Places, can_mount, full_disk, kill, read_only, something_else, two_at_once

import sts_fast
from sts_fast.model.stored import writing

WORKERS = 2
# Two at once, something else in the way: of results that are put in place as a whole, and of those in parts.
OF_TWO = ("score", "compare", "mix", "profile", "capture", "trace")
OF_WHOLE = ("score", "compare")
OF_READ_ONLY = ("score", "capture", "profile", "trace", "validate --fit")
Job = tuple[Accident, str, int]

_places: Places
_seed: int


def imports() -> None:
    """What commands import, once for all of them; nothing is computed, which would start threads."""
    for name in ("jinja2", "pandas", "pyarrow.parquet", "scipy.stats", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    for name in sts_fast.__all__:
        getattr(sts_fast, name)
    torch.set_num_threads(1)
    writing.SHARD_PROMPTS = 4  # several shards of a set


def jobs(names: list[str], n_kills: int, n_disks: int, n_others: int) -> list[Job]:
    """Kills and full disks in turn of all commands, and other accidents of some."""
    kills: list[Job] = [(kill, names[i % len(names)], i // len(names)) for i in range(n_kills)]
    disks: list[Job] = [(full_disk, names[i % len(names)], i // len(names)) for i in range(n_disks)]
    others: list[Job] = [(two_at_once, name, i) for name in OF_TWO if name in names for i in (0, 1)]
    others += [(something_else, name, 0) for name in OF_WHOLE if name in names]
    if can_mount():
        others += [(read_only, name, i) for name in OF_READ_ONLY if name in names for i in (0, 1)]
    else:
        print("no disk can be mounted here, so that none is filled")
        disks = []
    return kills + disks + others[:n_others]


def work(job: Job) -> tuple[str, Counter[str], list[str]]:
    accident, name, number = job
    counts: Counter[str] = Counter()
    what = f"{name}, {accident.__name__} {number}"
    told = accident(_places, name, number, random.Random(f"{_seed} {what}"), counts)
    return name, counts, [f"{what}: {line}" for line in told]


def table(totals: dict[str, Counter[str]]) -> str:
    totals = totals | {"all": sum(totals.values(), Counter())}
    columns, width = sorted(totals["all"]), max(map(len, totals))
    lines = [" | ".join((" " * width, *columns))]
    for name, of in totals.items():
        lines.append(" | ".join((name.ljust(width), *(str(of[column]).rjust(len(column)) for column in columns))))
    return "\n".join(lines)


def main() -> None:
    global _places, _seed
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--disks", type=int, default=30)
    parser.add_argument("--others", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a command; repeatable", action="append")
    parser.add_argument("--material", type=Path, help="folder of tests/tiny.py, where it is made already")
    options = parser.parse_args()
    imports()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        material = options.material or Path(folder) / "tiny"
        if options.material is None:  # in a process of its own, because it computes
            with fork.Pool(1) as pool:
                pool.apply(tiny.make, (material,))
        _places, _seed = Places(Path(folder), tiny.at(material)), options.seed
        names = [name for name in _places.commands if options.only is None or name in options.only]
        both = [(name, earlier) for name in names for earlier in (False, True)]
        with fork.Pool(WORKERS) as pool:
            _places.made.update(zip(both, pool.starmap(_places.make, both, 1), strict=True))
        totals, n_faults = {name: Counter[str]() for name in names}, 0
        with fork.Pool(WORKERS) as pool:
            todo = jobs(names, options.kills, options.disks, options.others)
            for name, counts, told in pool.imap_unordered(work, todo):
                totals[name] += counts
                n_faults += len(told)
                for line in told:
                    print(line, flush=True)
    print(table(totals))
    print(f"{n_faults} faults")
    sys.exit(1 if n_faults else 0)


if __name__ == "__main__":
    main()
