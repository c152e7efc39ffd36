"""Finds the files of a set in a folder: shards, splits, one file or folder for each subject.

| names in the folder                                    | what they are                                           |
|--------------------------------------------------------|---------------------------------------------------------|
| `x-00000-of-00002.parquet`; `0000.parquet`, `part-0.csv` | shards of one set                                     |
| `train.jsonl`, `test-00000-of-00001.parquet`, `test/`  | splits, of which one is read                            |
| `law_test.csv`, `law_dev.csv`                          | splits of the subject law                               |
| any others: files or, where there are none, folders    | subjects, each a domain; a training set is one of them  |

The split that is read is the training set's `train`; of domains the one that they are evaluated on; of demonstrations
the one meant for them. See `SPLITS_READ`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sts_fast.data.tables import KINDS, SPLITS, Table, exists, json_file, listdir, suffix_of
from sts_fast.errors import InputError, listed

Use = Literal["train", "domain", "demos"]

SPLITS_READ: dict[Use, tuple[str, ...]] = {
    "train": ("train",),
    "domain": ("test", "validation", "dev", "train"),
    "demos": ("dev", "train", "validation"),
}
# Folders that are no name of their own, and files that describe a data set.
WRAPPERS = ("data", "default", "all")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SHARD = re.compile(r"(?P<of>.*)-(?P<number>\d+)-of-(?P<n>\d+)")
# Shards that have only numbers, as datatrove and the hub's converter name them, or Spark.
_NUMBERED = re.compile(
    r"(?:(?:part|shard|chunk|data)[-_.]?)?(?P<number>\d+)(?:[-_.](?:\d+|snappy|zstd|gzip))*|part-(?P<spark>\d{4,})-.*"
)
_SPLIT_OF_SUBJECT = re.compile(r"(?P<subject>.+)[-_](?P<split>train|test|validation|valid|val|dev)", re.IGNORECASE)

Group = list[Path] | Path  # shards of one table, or a folder


@dataclass(frozen=True)
class Origin:
    """Tables that a set is read from.

    left_out: names of splits and folders beside them that are not read
    """

    tables: list[Table] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = listed(self.tables, most=2)
        return f"{text} (not read: {listed(self.left_out)})" if self.left_out else text


def path_origin(path: Path, use: Use) -> Origin:
    """The tables of one set: of a file, or of a folder. Raises InputError where a folder contains several sets."""
    if not exists(path):
        raise InputError(f"{path} does not exist; give {KINDS}")
    if not path.is_dir():
        return Origin([Table.of_file(path)])
    groups = _groups(path)
    if not groups:
        raise InputError(f"{path} contains no example files; give {KINDS}")
    subjects = _subjects(groups)
    splits = next(iter(subjects.values())) if len(subjects) == 1 else groups
    return _split_origin(path, splits, use, _folders_beside(path))


def domain_origins(path: Path, use: Use, name: str | None = None) -> Iterator[tuple[str, Origin, bool]]:
    """Yields (name, tables, whether a category column splits it) of each domain in a file or folder.

    name: of the whole, by default that of the file or folder
    """
    name = name or _stem(path.resolve() if path.name in ("", "..") else path)
    if not path.is_dir():
        yield name, path_origin(path, use), True
        return
    subjects = _subjects(_groups(path))
    read = _evaluated(subjects) if use == "domain" else [*subjects]
    left_out = [*_folders_beside(path), *(other for other in subjects if other not in read)]
    for subject in read:
        splits = subjects[subject]
        group = splits[chosen_split(str(path), splits, use)]
        if len(read) > 1:
            yield subject or name, _split_origin(path, splits, use, left_out), False
        elif isinstance(group, Path) and not _is_saved(group):
            # A folder for each split, or a single folder, with the subjects in it.
            left_out += [other for other, of_split in splits.items() if of_split != group]
            for domain, origin, by_category in domain_origins(
                group, use, name if subject in ("", *WRAPPERS) else subject
            ):
                yield domain, Origin(origin.tables, [*left_out, *origin.left_out]), by_category
        else:
            is_shards = isinstance(group, list) and _SHARD.fullmatch(_stem(group[0])) is not None
            is_whole = not subject or is_shards
            origin = _split_origin(path, splits, use, left_out)
            yield (name if is_whole else subject), origin, is_whole or len(splits) > 1
    if not read:
        yield name, path_origin(path, use), True


def chosen_split(source: str, names: Iterable[str], use: Use) -> str:
    """The name of the split that is read for a use. Raises InputError where there are several and none is for it."""
    splits = list(names)
    if len(splits) == 1:
        return splits[0]
    for wanted in SPLITS_READ[use]:
        spelt = [split for split in splits if SPLITS.get(split.lower()) == wanted]
        if spelt:
            return wanted if wanted in spelt else spelt[0]
    raise InputError(
        f"{source} contains {listed(splits)} and none is called {' or '.join(SPLITS_READ[use])}; give one of them"
    )


def _split_origin(path: Path, splits: dict[str, Group], use: Use, left_out: list[str]) -> Origin:
    """The tables of the split that is read for a use. path: of the folder that contains them."""
    split = chosen_split(str(path), splits, use)
    left_out, group = [*left_out, *(other for other in splits if other != split)], splits[split]
    if isinstance(group, Path):
        inner = path_origin(group, use)
        return Origin(inner.tables, [*left_out, *inner.left_out])
    _check_shards(group)
    return Origin([Table.of_file(path) for path in group], left_out)


def _check_shards(shards: list[Path]) -> None:
    """Raises InputError where one is missing, or where they may be the same set twice."""
    matches = [_SHARD.fullmatch(_stem(path)) for path in shards]
    kinds = {(match and match["n"], suffix_of(path)) for match, path in zip(matches, shards, strict=True)}
    if len(kinds) > 1:
        raise InputError(
            f"{shards[0].parent} contains {shards[0].name} and {shards[-1].name}, which may be the same rows twice; "
            "name the files to be read one by one"
        )
    there = {int(match["number"]): match for match in matches if match}
    n = max((int(match["n"]) for match in there.values()), default=0)
    if missing := set(range(n)) - there.keys():
        raise InputError(
            f"{shards[0].parent} lacks shard {min(missing)} of {there[min(there)]['of']}, counted from 0; complete it, "
            "or name the files to be read one by one"
        )


def _groups(folder: Path) -> dict[str, Group]:
    """What a folder contains, by name, sorted: files and saved data sets, or, where there are none, other folders.

    The name of shards that have only numbers is empty, as is that of a saved data set without splits.
    """
    if _is_saved(folder):
        return _saved_files(folder)
    files: dict[str, list[Path]] = {}
    groups: dict[str, Group] = {}
    for path in _visible(folder):
        if path.is_dir():
            groups |= {_stem(path): path} if _is_saved(path) else {}
        elif suffix_of(path) and not path.name.startswith("cache-"):  # which datasets leaves beside its own
            match = _SHARD.fullmatch(_stem(path))
            files.setdefault(match["of"] if match else _stem(path), []).append(path)
    numbers = {name: int(match["number"] or match["spark"]) for name in files if (match := _NUMBERED.fullmatch(name))}
    if 0 in numbers.values():  # numbers that do not begin with 0 are names, such as years
        files[""] = [path for name in numbers for path in files.pop(name)]
    groups |= files
    return dict(sorted(groups.items())) or {_stem(path): path for path in _folders_with_examples(folder)}


def _visible(folder: Path) -> list[Path]:
    paths = sorted(listdir(folder))
    return [path for path in paths if not path.name.startswith(".") and path.name not in DESCRIPTIONS]


def _folders_with_examples(folder: Path, depth: int = 3) -> list[Path]:
    """Subfolders that contain examples, at most so many levels below."""

    def contains_examples(path: Path) -> bool:
        if _is_saved(path) or any(suffix_of(inner) for inner in _visible(path) if inner.is_file()):
            return True
        return depth > 1 and bool(_folders_with_examples(path, depth - 1))

    return [path for path in _visible(folder) if path.is_dir() and contains_examples(path)]


def _folders_beside(folder: Path) -> list[str]:
    """Names of the subfolders with examples that are not read, because files are beside them."""
    if _is_saved(folder) or not any(suffix_of(path) for path in _visible(folder) if path.is_file()):
        return []
    return [path.name for path in _folders_with_examples(folder) if not _is_saved(path)]


def _are_splits(names: Iterable[str]) -> bool:
    names = [*names]
    return bool(names) and all(name.lower() in SPLITS for name in names)


def _subjects(groups: dict[str, Group]) -> dict[str, dict[str, Group]]:
    """Subject -> its splits by name; the name of a subject is empty where the groups are the splits of one set."""
    if _are_splits(groups):
        return {"": groups}
    matches = [_SPLIT_OF_SUBJECT.fullmatch(name) for name in groups]
    if len(groups) < 2 or not all(matches):
        return {name: {name: group} for name, group in groups.items()}
    subjects: dict[str, dict[str, Group]] = {}
    for match, group in zip(matches, groups.values(), strict=True):
        if match is not None:
            subjects.setdefault(match["subject"], {})[match["split"]] = group
    return subjects


def _evaluated(subjects: dict[str, dict[str, Group]]) -> list[str]:
    """Subjects that are domains: not those of which only a training split is there, nor the folder of them all."""
    splits = {
        name: [*_groups(group)] if isinstance(group, Path) and not _is_saved(group) else [*of_subject]
        for name, of_subject in subjects.items()
        for group in of_subject.values()
    }
    only_train = [name for name, of in splits.items() if {SPLITS.get(split.lower()) for split in of} == {"train"}]
    tested = [name for name, of in splits.items() if name not in only_train and _are_splits(of)]
    left_out = {*(only_train if tested else ()), *(["all"] if len(tested) > 1 else ())}
    return [name for name in subjects if name not in left_out]


def _stem(path: Path) -> str:
    """The name without the suffix, which Spark gives folders too."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.name


def _is_saved(folder: Path) -> bool:
    """True for a folder that `datasets.save_to_disk` wrote."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved_files(folder: Path) -> dict[str, Group]:
    """The Arrow files of a saved data set, by split; its name is empty where there is only one without a name."""
    if (folder / "dataset_dict.json").is_file():
        splits = json_file(folder / "dataset_dict.json")
        names = splits.get("splits") if isinstance(splits, dict) else None
        if not isinstance(names, list) or not names:
            raise InputError(f"{folder / 'dataset_dict.json'} names no splits; write the dataset again")
        return {str(name): folder / str(name) for name in names}
    state = json_file(folder / "state.json")
    shards = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(shards, list) or not shards or not all(isinstance(f, dict) and "filename" in f for f in shards):
        raise InputError(f"{folder / 'state.json'} names no data files; write the dataset again")
    if state.get("_indices_data_files"):
        raise InputError(f"{folder} keeps a selection of its rows apart; write it again after flatten_indices()")
    return {"": [folder / str(shard["filename"]) for shard in shards]}
