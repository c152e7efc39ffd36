"""Finds the tables behind what the user gave as a set: paths, names of the hub, tasks, rows in memory, or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sts_fast.data.folders import Origin, Use, chosen_split, domain_origins, path_origin
from sts_fast.data.hub import hub_name, hub_origin
from sts_fast.data.lm_eval import is_tasks, task_origins
from sts_fast.data.memory import Rows, is_rows, is_splits, memory_table
from sts_fast.data.tables import KINDS, exists
from sts_fast.errors import InputError

# One place, or several whose rows are one set.
Place = str | Path | Rows
Places = Place | Sequence[Place]


def origin_of(source: object, use: Use, name: str) -> Origin:
    """The tables of one set. name: of the set.

    Raises InputError where there is nothing of the kind, a folder or data set holds several sets and none is for the
    use, or a table is given twice.
    """
    if isinstance(source, (str, Path)):
        return _place_origin(source, use)
    if is_splits(source):
        splits = cast(Mapping[str, Any], source)
        chosen = chosen_split(f"'{name}' in memory", splits, use)
        left_out = [split for split in splits if split != chosen]
        return Origin([memory_table(f"'{name}' in memory", splits[chosen])], left_out)
    if is_rows(source):
        return Origin([memory_table(f"'{name}' in memory", cast(Rows, source))])
    if not isinstance(source, (list, tuple)) or not source:
        raise InputError(
            f"'{name}' is a {type(source).__name__}; give {KINDS}; or a list of dicts, a data set of "
            "datasets, a data frame; or a list of any of these"
        )
    joined = _joined([origin_of(part, use, f"{name} {i}") for i, part in enumerate(source, start=1)])
    names = [table.name for table in joined.tables]
    if twice := [table for table in names if names.count(table) > 1]:
        raise InputError(f"{twice[0]} is given twice for the set '{name}'; give it once")
    return joined


def named_place(text: str) -> tuple[str | None, str]:
    """(name, place) of `name=place`; the name is None where a path of the whole text exists, or it has no `=`."""
    name, equals, place = text.partition("=")
    return (None, text) if not equals or exists(Path(text)) else (name.strip(), place.strip())


def check_places(places: Sequence[str]) -> None:
    """Raises InputError for a place that is no path that exists, nor can be a name of the hub or a task."""
    for place in places:
        if hub_name(place) is None and not is_tasks(place) and not exists(Path(place)):
            raise InputError(f"{place} does not exist; give {KINDS}")


def domains_of(sources: Sequence[Place], use: Use) -> Iterator[tuple[str, Origin, bool]]:
    """Yields (name, tables, whether a category column splits it) of each domain of some sources.

    Places that are given under the same name are one domain.
    """
    named: dict[str, list[str]] = {}
    for source in sources:
        name, place = named_place(source) if isinstance(source, str) else (None, "")
        if name is not None:
            if not name or not place:
                raise InputError(f"domain {source!r} lacks its name or its path; write NAME=PATH")
            named.setdefault(name, []).append(place)
    for source in sources:
        name = named_place(source)[0] if isinstance(source, str) else None
        if name is not None:
            if name in named:
                yield name, origin_of(named.pop(name), use, name), False
        elif not isinstance(source, (str, Path)):
            yield "in memory", origin_of(source, use, "domains"), True
        elif is_tasks(str(source)):
            yield from ((task, origin, False) for task, origin in task_origins(str(source), use))
        elif (hub := hub_name(str(source))) and not exists(Path(source)):
            yield hub, hub_origin(str(source), use), True
        else:
            yield from domain_origins(Path(source), use)


def _joined(origins: Sequence[Origin]) -> Origin:
    return Origin(
        [table for origin in origins for table in origin.tables],
        list(dict.fromkeys(split for origin in origins for split in origin.left_out)),
    )


def _place_origin(place: str | Path, use: Use) -> Origin:
    if is_tasks(str(place)):
        return _joined([origin for _, origin in task_origins(str(place), use)])
    if not exists(Path(place)) and hub_name(str(place)) is not None:
        return hub_origin(str(place), use)
    return path_origin(Path(place), use)
