"""Data sets of the Hugging Face hub, by name: owner/name, owner/name:config or owner/name:config:split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sts_fast.data.folders import Origin, Use, chosen_split, path_origin
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

    `datasets` reads it, from its cache where it is there; with HF_HUB_OFFLINE=1 from nowhere else. Where it cannot, the
    files are read that huggingface_hub has downloaded. No program of a repository is run.

    Raises InputError where the data set is not available, or has several configurations and none is named.
    """
    match = _NAME.fullmatch(text)
    assert match is not None
    try:
        loaded = _load(match)
    except InputError:
        folder = None if match["split"] else _downloaded(match)
        if folder is None:
            raise
        return path_origin(folder, use)
    left_out: list[str] = []
    if isinstance(loaded, Mapping):
        chosen = chosen_split(text, loaded, use)
        left_out = [split for split in loaded if split != chosen]
        loaded = loaded[chosen]
    config = match["config"] or getattr(loaded.info, "config_name", None) or "default"
    name = f"{match['repository']}:{config}:{loaded.split or match['split']}"
    version = _version(loaded)
    return Origin([memory_table(f"{name}@{version}" if version else name, loaded)], left_out)


def _load(name: re.Match[str]) -> Any:
    """What `datasets` loads: a data set, or data sets by split where no split is named."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name[0]} is no file or folder; to load it from the hub, datasets is needed: "
            "pip install 'sts-fast[datasets]'"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < FIRST_WITHOUT_PROGRAMS:
        raise InputError(
            f"datasets {datasets.__version__} can run programs of the hub; to load {name[0]}, pip install "
            f"'datasets>={FIRST_WITHOUT_PROGRAMS}'"
        )
    try:
        return datasets.load_dataset(name["repository"], name["config"], split=name["split"])
    except Exception as error:  # the network, the hub, the cache or a damaged file can raise anything
        raise InputError(
            f"{name[0]} is no file or folder, and no such data set can be loaded from the hub ({one_line(error)}); "
            "correct the path, or name it as owner/name:config:split"
        ) from error


def _downloaded(name: re.Match[str]) -> Path | None:
    """The folder of a configuration, or of all files where none is named, in the cache of huggingface_hub."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name["repository"], repo_type="dataset", local_files_only=True))
    except Exception:  # it is not in the cache
        return None
    folder = folder / (name["config"] or "")
    return folder if folder.is_dir() and ".." not in folder.parts else None


def _version(dataset: Any) -> str | None:
    """The revision of the repository that the rows are from; else the fingerprint that `datasets` gives them."""
    places = [str(file["filename"]) for file in getattr(dataset, "cache_files", None) or []]
    places += [str(url) for url in getattr(dataset.info, "download_checksums", None) or {}]
    for place in places:
        if revision := re.search(r"[@/]([0-9a-f]{40})/", place):
            return revision[1]
    fingerprint = getattr(dataset, "_fingerprint", None)
    return None if fingerprint is None else str(fingerprint)
