"""A plan of the tiny model's sets, and the profiles that one process makes of them without a plan."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tiny import Tiny

import sts_fast
from sts_fast.profile.work import ProfilePlan

OPTIONS: dict[str, Any] = {"shots": 1, "domain_shots": 2, "limit": 12, "demo_draws": 2, "shard_tokens": 900}


def digests(library: Path) -> dict[str, str]:
    """SHA-256 of every file of every profile in a library."""
    return {
        str(path.relative_to(library)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in sts_fast.Library(library)
        for path in sorted(folder.iterdir())
    }


def sources(tiny: Tiny) -> dict[str, Any]:
    saes = [tiny.saes["topk"], tiny.saes["jumprelu"]]
    return {"model": tiny.model, "sae": saes, "trains": {"sums": tiny.train}, "domains": tiny.domains, **OPTIONS}


def plan_of(tiny: Tiny, library: Path) -> ProfilePlan:
    return sts_fast.plan_profiles(**sources(tiny), library=library, threads=1)


def typed(tiny: Tiny, library: Path) -> list[str]:
    """The command line of the plan of `planned`."""
    given = sources(tiny)
    command = ["profile", "--model", str(given["model"]), "--threads", "1", "--library", str(library)]
    for option, values in (
        ("--sae", given["sae"]),
        ("--train", [f"{name}={path}" for name, path in given["trains"].items()]),
        ("--domains", [f"{name}={path}" for name, path in given["domains"].items()]),
    ):
        command += [word for value in values for word in (option, str(value))]
    for option in ("shots", "domain_shots", "limit", "demo_draws", "shard_tokens"):
        command += [f"--{option.replace('_', '-')}", str(given[option])]
    return command
