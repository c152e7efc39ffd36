"""Tables of rows in memory: lists of dicts, data sets of `datasets`, data frames.

They are read as files are: nested values become lists and dicts, missing values None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sts_fast.data.tables import NumberedRow, Table, arrow_rows
from sts_fast.errors import InputError, one_line


@runtime_checkable
class HubDataset(Protocol):
    """`datasets.Dataset` and `datasets.IterableDataset`, of which the latter is read to its end."""

    def with_format(self, type: str | None = None) -> Any: ...

    def iter(self, batch_size: int, drop_last_batch: bool = False) -> Iterator[Any]: ...


@runtime_checkable
class Frame(Protocol):
    """Data frames of pandas and polars, and other tables that Arrow reads."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object: ...


Rows = Sequence[Mapping[str, Any]] | HubDataset | Frame


def is_rows(source: object) -> bool:
    """True for rows in memory; for a list, where its first element is a row."""
    if isinstance(source, (list, tuple)):
        return bool(source) and isinstance(source[0], Mapping) and not is_splits(source[0])
    return isinstance(source, HubDataset) or _is_frame(source)


def is_splits(source: object) -> bool:
    """True for a `datasets.DatasetDict`: data sets by split, and no rows itself."""
    return isinstance(source, Mapping) and isinstance(source, _Splits)


def memory_table(name: str, rows: Rows) -> Table:
    """The table of some rows. name: as messages call it."""
    streamed: list[NumberedRow] = []

    def read() -> Iterator[NumberedRow]:
        try:
            if isinstance(rows, HubDataset) and not isinstance(rows, Sized):
                # A stream may have to be downloaded again, or give other rows, the second time.
                if not streamed:
                    streamed.extend(list(arrow_rows(rows.with_format("arrow").iter(batch_size=1024))))
                yield from streamed
            elif isinstance(rows, HubDataset):
                yield from arrow_rows(rows.with_format("arrow").iter(batch_size=1024))
            elif isinstance(rows, Sequence):
                yield from ((number, None, _plain(row)) for number, row in enumerate(rows, start=1))
            else:
                yield from arrow_rows(_frame_batches(rows))
        except InputError:
            raise
        except Exception as error:  # a stream, a column of several types: the library of the rows can raise anything
            raise InputError(f"{name} cannot be read ({one_line(error)}); give its rows as a list of dicts") from error

    return Table(name, read)


@runtime_checkable
class _Splits(Protocol):
    """Of `datasets.DatasetDict`, what other dicts do not have."""

    def with_format(self, type: str | None = None) -> Any: ...

    def cast_column(self, column: str, feature: Any) -> Any: ...


def _is_frame(source: object) -> bool:
    # pandas before 2.2 has no __arrow_c_stream__, but Arrow knows its data frames.
    return isinstance(source, Frame) or _is_of_pandas(source)


def _is_of_pandas(source: object) -> bool:
    return type(source).__module__.partition(".")[0] == "pandas"


def _frame_batches(frame: object) -> list[Any]:
    import pyarrow as pa

    table = pa.table(frame)
    for i, column in enumerate(table.columns if _is_of_pandas(frame) else ()):
        if pa.types.is_floating(column.type) and column.null_count:
            # pandas makes fractions of whole numbers where one is missing: the answer 1 would be 1.0.
            with suppress(pa.ArrowInvalid):
                table = table.set_column(i, table.column_names[i], column.cast(pa.int64()))
    numbers_of_rows = [name for name in table.column_names if name.startswith("__index_level_")]
    return table.drop_columns(numbers_of_rows).to_batches(max_chunksize=1024)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """A value without the types of numpy, and with lists and dicts for other sequences and mappings."""
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    return value
