"""Which training sets and domains forecasts are designed on, and which they are judged on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from study.real.sources import shuffled

DESIGN_SHARE = 3  # one in so many


def kind(domain: str) -> str:
    """Domains of one kind are split apart, so that each side has its third of every kind."""
    first = domain.split()[0]
    return first if first in ("pro", "mmlu", "rg", "text", "translation") else "other"


def draw(trains: Iterable[str], domains: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """{"design" and "judged": {"trains", "domains"}}, from the names alone."""
    by_kind = groupby(sorted(domains, key=lambda name: (kind(name), name)), key=kind)
    parts = [_parted(sorted(trains), "trains")], [_parted(list(names), which) for which, names in by_kind]
    return {
        side: {
            "trains": sorted(name for part in parts[0] for name in part[i]),
            "domains": sorted(name for part in parts[1] for name in part[i]),
        }
        for i, side in enumerate(("design", "judged"))
    }


def _parted(names: list[str], seed: str) -> tuple[list[str], list[str]]:
    mixed = shuffled(names, f"split {seed}")
    n_design = round(len(mixed) / DESIGN_SHARE)
    return mixed[:n_design], mixed[n_design:]
