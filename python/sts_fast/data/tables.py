"""Reads the rows of one table: of a file here, see hub and memory for the others.

| file             | rows                                                                                             |
|------------------|--------------------------------------------------------------------------------------------------|
| .jsonl           | one object per line, blank lines are skipped; a list of rows, as in .json, is read too            |
| .json            | a list of rows, id -> row, rows under `data`, `train`, `rows`, ..., or lines as in .jsonl        |
| .csv, .tsv       | a header line, then rows, all values text; a .csv may be separated by `,`, `;`, tabs or `|`.      |
|                  | Multiple choice without a header (question, options, letter) is read as MMLU's authors write it  |
| .parquet, .arrow | its rows                                                                                         |

The text formats may be compressed (`.jsonl.gz`, .zst, .bz2, .xz); they are UTF-8, or UTF-16 with its mark. Nothing is
ever unpickled.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import IO, Any

from sts_fast import files
from sts_fast.errors import InputError, UnusableRow, listed

Row = dict[str, Any]
# Row number from 1; the row's key, where the rows have keys; the row, or the error where it is damaged.
NumberedRow = tuple[int, str | None, Any]

ROW_LIST_KEYS = ("train", "data", "rows", "examples", "instances", "items", "questions")
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (
    *TEXT_SUFFIXES,
    *(text + compression for text in TEXT_SUFFIXES for compression in COMPRESSIONS),
    *(".parquet", ".arrow"),
)
KINDS = (
    "a .jsonl, .json, .csv or .tsv file (each also .gz, .zst, .bz2 or .xz), a .parquet or .arrow file, a folder of "
    "such files or written by datasets.save_to_disk, or a data set of the hub as owner/name:config:split"
)
# Names of splits as they are spelt -> name of the split.
SPLITS = {
    **dict.fromkeys(("train", "training", "auxiliary_train"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val"), "validation"),
    "dev": "dev",
}
DELIMITERS = (",", ";", "\t", "|")
SAMPLED_LINES = 200  # of a .csv, from which its delimiter is found
_SEPARATOR_LINE = re.compile(r"sep=(.)[\r\n]*\Z")  # of a spreadsheet program, above the header


@dataclass(frozen=True)
class Table:
    """Rows of one place: a file, a data set of the hub, or rows in memory.

    name: as messages call it
    read: reads the rows anew
    path: of a file
    """

    name: str
    read: Callable[[], Iterator[NumberedRow]]
    path: Path | None = None

    @classmethod
    def of_file(cls, path: Path) -> Table:
        return cls(str(path), lambda: file_rows(path), path)

    def __str__(self) -> str:
        return self.name

    @property
    def is_text(self) -> bool:
        """True of a file below a header line, all of whose values are text."""
        return self.path is not None and (suffix_of(self.path) or "").startswith((".csv", ".tsv"))

    @property
    def header_remedy(self) -> str:
        """The end of a message about unknown column names: how they come about in a file that has a header line."""
        return "; where its first line is a row, add a header line above it" if self.is_text else ""

    @cached_property
    def sha256(self) -> str:
        """Of the file's bytes; of other rows as lines of JSON with sorted keys."""
        if self.path is not None:
            return files.sha256(self.path)
        digest = hashlib.sha256()
        for _, _, row in self.read():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def record(self, role: str) -> files.InputFile:
        return {"role": role, "path": self.name, "sha256": self.sha256}


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or that contains a NUL
        return False


def suffix_of(path: Path) -> str | None:
    """The suffix that determines a file's format, that of a compression included; None for no file of examples."""
    fitting = [suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)]
    return max(fitting, key=len, default=None)


def listdir(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error


# From files to rows ---------------------------------------------------------------------------------------------------


def file_rows(path: Path) -> Iterator[NumberedRow]:
    """Yields the rows of one file.

    Raises InputError where the file is damaged or has an unknown suffix.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(f"{path} has an unknown suffix; give {KINDS}")
    read = READERS[next(start for start in READERS if suffix.startswith(start))]
    try:
        yield from read(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(path, error) from error


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """Opens a text file to read it as UTF-8, whatever it is compressed with; UTF-16 is known by its mark."""
    stream = _decompressed(path)
    mark: bytes = stream.peek(2)[:2]  # type: ignore[union-attr]
    if mark not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return stream
    with stream:
        try:
            return io.BytesIO(stream.read().decode("utf-16").encode())
        except UnicodeError as error:
            raise unreadable(path, error) from error


def _decompressed(path: Path) -> IO[bytes] | gzip.GzipFile:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _json_line_rows(path: Path) -> Iterator[NumberedRow]:
    with _open(path) as stream:
        is_list = next((line for line in stream if line.strip()), b"").lstrip().startswith(b"[")
    if is_list:
        yield from _document_rows(path)
        return
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            text = _decoded(line, path, number)
            if text.strip():
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    remedy = f"correct it ({_json_trouble(error)})"
                    row = UnusableRow(f"{path}: line {number}", "text that is not JSON", remedy)
                yield number, None, row


def _json_rows(path: Path) -> Iterator[NumberedRow]:
    with _open(path) as stream:
        text = _decoded(stream.read(), path, None)
    if not text.strip():
        return
    yield from _json_line_rows(path) if _is_json_lines(text) else _document_rows(path)


def _document_rows(path: Path) -> Iterator[NumberedRow]:
    with _open(path) as stream:
        document = _parsed(_decoded(stream.read(), path, None), path)
    if isinstance(document, dict):
        splits = [key for key, rows in document.items() if key.lower() in SPLITS and isinstance(rows, list)]
        if len(splits) > 1:
            raise InputError(
                f"{path} contains the splits {listed(splits)}; write the one to be read as a file of its own"
            )
        lists = [key for key in ROW_LIST_KEYS if isinstance(document.get(key), list)] or splits
        if lists:
            document = document[_row_list(path, lists)]
        elif document and all(isinstance(row, dict) for row in document.values()):
            yield from ((number, key, row) for number, (key, row) in enumerate(document.items(), start=1))
            return
    if not isinstance(document, list):
        raise InputError(
            f"{path} contains neither a list of rows nor an object of id to row; write one row per line as .jsonl"
        )
    yield from ((number, None, row) for number, row in enumerate(document, start=1))


def _row_list(path: Path, keys: list[str]) -> str:
    if len(keys) > 1 and "train" not in keys:
        raise InputError(f"{path} contains {listed(keys)} and none is called train; write one of them as .jsonl")
    return keys[0] if len(keys) == 1 else "train"


def _is_json_lines(text: str) -> bool:
    """True if the first line is a complete JSON object and more lines follow."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _csv_rows(path: Path) -> Iterator[NumberedRow]:
    return _delimited_rows(path, None)


def _tsv_rows(path: Path) -> Iterator[NumberedRow]:
    return _delimited_rows(path, "\t")


def _delimited_rows(path: Path, delimiter: str | None) -> Iterator[NumberedRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # chains of thought overrun the default of 128 KiB
    with _open(path) as stream:
        lines = (_decoded(line, path, number) for number, line in enumerate(stream, start=1))
        sample = list(itertools.islice(lines, SAMPLED_LINES))
        if sample and (named := _SEPARATOR_LINE.match(sample[0])):
            delimiter, sample = named[1], sample[1:]
        if delimiter is None:
            delimiter = _delimiter(sample, path)
        without_header = _is_multiple_choice(_sampled_records(sample, delimiter))
        reader = csv.reader(itertools.chain(sample, lines), delimiter=delimiter, strict=True)
        try:
            header = None if without_header else next((record for record in reader if record), [])
            if header and (twice := [name for name in header if name.strip() and header.count(name) > 1]):
                raise InputError(f"{path} has two columns called {twice[0]!r}; rename one")
            n_columns = 0 if header is None else len(header)
            for number, values in enumerate(reader, start=1):
                if not values:
                    continue
                n_columns = n_columns or len(values)
                where = f"{path}: row {number}"
                if len(values) != n_columns:
                    reason = f"{len(values)} values for {n_columns} columns"
                    remedy = f"quote the values that contain {_delimiter_name(delimiter)}"
                    yield number, None, UnusableRow(where, reason, remedy)
                elif header is None and not _is_multiple_choice([values]):
                    reason = f"the answer {values[-1]!r}, which is no letter of its options"
                    yield number, None, UnusableRow(where, reason, "correct it, or add a header line above the first")
                elif header is None:
                    question, *choices, answer = values
                    yield number, None, {"question": question, "choices": choices, "answer": answer.strip()}
                else:
                    yield number, None, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num} is not CSV ({error}); quote the values") from error


def _delimiter(sample: list[str], path: Path) -> str:
    """The delimiter of a .csv: the one that splits its header, and of several the one that splits all lines evenly."""
    widths = {delimiter: [len(record) for record in _sampled_records(sample, delimiter)] for delimiter in DELIMITERS}
    splitting = [delimiter for delimiter, of_records in widths.items() if of_records and of_records[0] > 1]
    if len(splitting) < 2:
        return splitting[0] if splitting else ","
    even = [delimiter for delimiter in splitting if len({*widths[delimiter]}) == 1]
    if len(even) > 1:
        raise InputError(
            f"{path} may be separated by {' or by '.join(map(_delimiter_name, even))}; write it as .tsv or .jsonl, or "
            "quote the values"
        )
    return (even or splitting)[0]


def _delimiter_name(delimiter: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs"}.get(delimiter, f"{delimiter!r}")


def _sampled_records(sample: list[str], delimiter: str) -> list[list[str]]:
    """Records of the first lines, less the last one where it may go on below them."""
    try:
        records = [record for record in csv.reader(sample, delimiter=delimiter) if record]
    except csv.Error:
        return []
    return records[:-1] if len(sample) == SAMPLED_LINES and len(records) > 1 else records


def _is_multiple_choice(records: list[list[str]]) -> bool:
    """True if there is no header, and all records are a question, two to ten options, and the letter of the answer."""
    widths = {len(record) for record in records}
    if len(widths) != 1 or not 4 <= (width := widths.pop()) <= 12:
        return False
    letters = ascii_uppercase[: width - 2]
    if "".join(records[0][-2:]) in ascii_uppercase:
        return False  # a header that names options A, B, C, D
    return all(len(record[-1].strip()) == 1 and record[-1].strip() in letters for record in records)


def _parquet_rows(path: Path) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from arrow_rows(file.iter_batches(batch_size=1024))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise unreadable(path, error) from error


def _arrow_file_rows(path: Path) -> Iterator[NumberedRow]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":  # a file of random access; datasets writes streams
                file = pa.ipc.open_file(source)
                yield from arrow_rows(file.get_batch(i) for i in range(file.num_record_batches))
            else:
                source.seek(0)
                yield from arrow_rows(pa.ipc.open_stream(source))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise unreadable(path, error) from error


def arrow_rows(batches: Iterable[Any]) -> Iterator[NumberedRow]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file would be followed anywhere
        for row in batch.to_pylist():
            number += 1
            yield number, None, row


def json_file(path: Path) -> Any:
    try:
        return _parsed(_decoded(path.read_bytes(), path, None), path)
    except OSError as error:
        raise unreadable(path, error) from error


def _decoded(data: bytes, path: Path, number: int | None) -> str:
    try:
        return data.decode("utf-8-sig" if number in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        at = number if number is not None else data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {at} is not UTF-8; convert the file to UTF-8") from error


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}:{line} is not JSON ({_json_trouble(error)}); correct it") from error


def _json_trouble(error: Exception) -> str:
    """Names the fault of a text: of its marks, or a number of thousands of digits, or brackets without end."""
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
    return InputError(f"{path} cannot be read ({reason}); is it complete, and of the kind that its name says?")


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": _json_line_rows,
    ".ndjson": _json_line_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_file_rows,
}
