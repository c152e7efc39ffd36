"""Reads the rows of files of questions and answers.

| source   | rows                                                                                         |
|----------|----------------------------------------------------------------------------------------------|
| .jsonl   | one object per line; blank lines are skipped                                                 |
| .json    | a list of rows, id -> row, rows under `data`, `train`, `rows`, ..., or lines as in .jsonl    |
| .csv     | a header line, then rows; every value is text                                                |
| .parquet | its rows                                                                                     |
| a folder | of `datasets.save_to_disk`, or with files as above: the split `train`, or the only one       |

The text formats may be gzipped (`.jsonl.gz`). Nothing is ever unpickled.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sts_fast.errors import InputError, listed

Row = dict[str, Any]

ROW_LIST_KEYS = ("train", "data", "rows", "examples", "instances", "items", "questions")
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
KINDS = "a .jsonl, .json or .csv file (each also .gz), a .parquet file, or a folder written by datasets.save_to_disk"
_SHARD = re.compile(r"-\d+-of-\d+$")


# Files of a source ----------------------------------------------------------------------------------------------------


def train_files(path: Path) -> list[Path]:
    """The files of a training set: the file itself, or the split `train` (or the only split) of a folder."""
    if not exists(path):
        raise InputError(f"{path} does not exist; give {KINDS}")
    if not path.is_dir():
        return [path]
    if _is_saved_dataset(path):
        return _saved_files(path)
    groups = _file_groups(path) or (_file_groups(path / "data") if (path / "data").is_dir() else {})
    if not groups:
        raise InputError(f"{path} contains no example files; give {KINDS}")
    return groups[_split_name(path, groups)]


def domain_files(source: str) -> Iterator[tuple[str, list[Path], bool]]:
    """Yields (name, files, whether a category column splits it) of each domain of a source."""
    path = Path(source)
    if not exists(path) and "=" in source:
        name, _, rest = source.partition("=")
        if not name.strip() or not rest.strip():
            raise InputError(f"domain {source!r} lacks its name or its path; write NAME=PATH")
        yield name.strip(), train_files(Path(rest)), False
        return
    groups = _file_groups(path) if path.is_dir() and not _is_saved_dataset(path) else {}
    if len(groups) == 1 and all(_SHARD.search(_stem(file)) for files in groups.values() for file in files):
        groups = {}
    for name, files in groups.items():
        yield name, files, False
    if not groups:
        yield _stem(path.resolve() if path.name in ("", "..") else path), train_files(path), True


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or that contains a NUL
        return False


def _stem(path: Path) -> str:
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix and not path.is_dir() else path.name


def suffix_of(path: Path) -> str | None:
    """The suffix that determines a file's format, `.gz` included; None where it is not an example file."""
    fitting = [suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)]
    return max(fitting, key=len, default=None)


def _file_groups(folder: Path) -> dict[str, list[Path]]:
    """Stem -> files of a folder, sorted by name; shards such as `x-00000-of-00002` are one group, as is a dataset."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(listdir(folder)):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if _is_saved_dataset(path):
                groups.setdefault(path.name, []).extend(_saved_files(path))
        elif suffix_of(path):
            groups.setdefault(_SHARD.sub("", _stem(path)), []).append(path)
    return groups


def listdir(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files that `datasets.save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json_file(folder / "dataset_dict.json")
        names = splits.get("splits") if isinstance(splits, dict) else None
        if not isinstance(names, list) or not names:
            raise InputError(f"{folder / 'dataset_dict.json'} names no splits; write the dataset again")
        folder = folder / _split_name(folder, names)
    state = _json_file(folder / "state.json")
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list) or not files or not all(isinstance(f, dict) and "filename" in f for f in files):
        raise InputError(f"{folder / 'state.json'} names no data files; write the dataset again")
    return [folder / str(file["filename"]) for file in files]


def _split_name(folder: Path, names: Iterable[str]) -> str:
    splits = list(names)
    if len(splits) == 1:
        return splits[0]
    if "train" not in splits:
        raise InputError(f"{folder} contains {listed(splits)} and none is called train; give the path of one of them")
    return "train"


# From files to rows ---------------------------------------------------------------------------------------------------


def file_rows(path: Path) -> Iterator[tuple[int, str | None, Any]]:
    """Yields (row number from 1, key where the rows have keys, row) of one file.

    Raises InputError where the file is damaged or has an unknown suffix.
    """
    suffix = suffix_of(path)
    if path.suffix == ".arrow":
        read = _arrow_rows
    elif suffix == ".parquet":
        read = _parquet_rows
    elif suffix in (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"):
        read = _json_line_rows
    elif suffix in (".json", ".json.gz"):
        read = _json_rows
    elif suffix in (".csv", ".csv.gz"):
        read = _csv_rows
    else:
        raise InputError(f"{path} has an unknown suffix; give {KINDS}")
    try:
        yield from read(path)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _json_line_rows(path: Path) -> Iterator[tuple[int, str | None, Any]]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            text = _decoded(line, path, number)
            if text.strip():
                yield number, None, _parsed(text, path, number)


def _json_rows(path: Path) -> Iterator[tuple[int, str | None, Any]]:
    with _open(path) as stream:
        text = _decoded(stream.read(), path, None)
    if not text.strip():
        return
    if _is_json_lines(text):
        yield from _json_line_rows(path)
        return
    document = _parsed(text, path, None)
    if isinstance(document, dict):
        lists = [key for key in ROW_LIST_KEYS if isinstance(document.get(key), list)]
        if lists:
            document = document[_split_name(path, lists)]
        elif document and all(isinstance(row, dict) for row in document.values()):
            yield from ((number, key, row) for number, (key, row) in enumerate(document.items(), start=1))
            return
    if not isinstance(document, list):
        raise InputError(
            f"{path} contains neither a list of rows nor an object of id to row; write one row per line as .jsonl"
        )
    yield from ((number, None, row) for number, row in enumerate(document, start=1))


def _is_json_lines(text: str) -> bool:
    """True if the first line is a complete JSON object and more lines follow."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _csv_rows(path: Path) -> Iterator[tuple[int, str | None, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # chains of thought overrun the default of 128 KiB
    with _open(path) as stream:
        lines = (_decoded(line, path, number) for number, line in enumerate(stream, start=1))
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, None)
            for number, values in enumerate(reader, start=1):
                if header is None or not values:
                    continue
                if len(values) != len(header):
                    raise InputError(
                        f"{path}: row {number} has {len(values)} values for {len(header)} columns; quote its commas"
                    )
                yield number, None, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num} is not CSV ({error}); quote the values") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, str | None, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batch_rows(file.iter_batches(batch_size=1024))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from error


def _arrow_rows(path: Path) -> Iterator[tuple[int, str | None, Any]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            yield from _batch_rows(stream)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from error


def _batch_rows(batches: Iterable[Any]) -> Iterator[tuple[int, str | None, Any]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file would be followed anywhere
        for row in batch.to_pylist():
            number += 1
            yield number, None, row


def _json_file(path: Path) -> Any:
    try:
        return _parsed(_decoded(path.read_bytes(), path, None), path, None)
    except OSError as error:
        raise _unreadable(path, error) from error


def _decoded(data: bytes, path: Path, number: int | None) -> str:
    try:
        return data.decode("utf-8-sig" if number in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        at = number if number is not None else data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {at} is not UTF-8; convert the file to UTF-8") from error


def _parsed(text: str, path: Path, number: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = error.lineno if number is None else number
        raise InputError(f"{path}: line {at} is not JSON ({error.msg} at column {error.colno}); correct it") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested without end
        at_line = "" if number is None else f" line {number}"
        raise InputError(f"{path}:{at_line} contains JSON that cannot be read ({error}); correct it") from error


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
    return InputError(f"{path} cannot be read ({reason}); is it complete, and of the kind that its name says?")
