"""Data sets of the Hugging Face hub, by name: owner/name, owner/name:config or owner/name:config:split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sts_fast.data.folders import Origin, Use, chosen_split
from sts_fast.data.memory import memory_table
from sts_fast.data.tables import suffix_of
from sts_fast.errors import InputError, one_line

_NAME = re.compile(r"(?P<repository>\w[\w.-]*/(?P<name>\w[\w.-]*))(?::(?P<config>[^:]+)(?::(?P<split>.+))?)?")
# Before it, datasets ran programs that repositories contain.
FIRST_WITHOUT_PROGRAMS = 4


def hub_name(text: str) -> str | None:
    """The name of the data set without its owner, in a text that can be the name of one; None in any other text."""
    match = _NAME.fullmatch(text)
    return match["name"] if match and suffix_of(Path(match["repository"])) is None else None


def hub_origin(text: str, use: Use) -> Origin:
    """The rows of a data set: of the split that is named, or else of the one for a use.

    The cache of `datasets` is read first; with HF_HUB_OFFLINE=1 nothing else is. No program of a repository is run.

    Raises InputError where the data set is not available, or has several configurations and none is named.
    """
    match = _NAME.fullmatch(text)
    assert match is not None
    load = _loader(text)
    try:
        loaded = load(match["repository"], match["config"], split=match["split"])
    except Exception as error:  # the network, the hub, the cache or a damaged file can raise anything
        raise InputError(
            f"{text} is no file or folder, and no such data set can be loaded from the hub ({one_line(error)}); "
            "correct the path, or name it as owner/name:config:split"
        ) from error
    left_out: list[str] = []
    if isinstance(loaded, Mapping):
        chosen = chosen_split(text, loaded, use)
        left_out = [split for split in loaded if split != chosen]
        loaded = loaded[chosen]
    config = match["config"] or getattr(loaded.info, "config_name", None) or "default"
    name = f"{match['repository']}:{config}:{loaded.split or match['split']}"
    version = _version(loaded)
    return Origin([memory_table(f"{name}@{version}" if version else name, loaded)], left_out)


def _loader(text: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{text} is no file or folder; to load it from the hub, datasets is needed: "
            "pip install 'sts-fast[datasets]'"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < FIRST_WITHOUT_PROGRAMS:
        raise InputError(
            f"datasets {datasets.__version__} can run programs of the hub; to load {text}, pip install "
            f"'datasets>={FIRST_WITHOUT_PROGRAMS}'"
        )
    return datasets.load_dataset


def _version(dataset: Any) -> str | None:
    """The revision of the repository that the rows are from; else datasets' fingerprint of them."""
    for place in getattr(dataset.info, "download_checksums", None) or {}:
        if revision := re.search(r"@([0-9a-f]{40})/", str(place)):
            return revision[1]
    fingerprint = getattr(dataset, "_fingerprint", None)
    return None if fingerprint is None else str(fingerprint)
