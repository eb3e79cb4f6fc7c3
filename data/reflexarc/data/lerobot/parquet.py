"""Columns of parquet files as arrays, each read once a process, with errors that name the cell."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reflexarc.contract.errors import DatasetError
from reflexarc.data.presence import is_forbidden, not_allowed

_KEPT_COLUMNS = 32
_PARQUET_ERRORS = (pa.ArrowException, OSError, EOFError)
Column = npt.NDArray[Any]


def count_rows(path: Path) -> int:
    """Rows of a file, from its footer; a file that is cut short has none."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except _PARQUET_ERRORS as error:
        raise _broken(path, error) from error


def read_table(path: Path, wanted: Callable[[str], bool] | None = None) -> Any:
    """A whole file as a ``pyarrow.Table``, or the columns whose names ``wanted`` accepts."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            return file.read([n for n in names if wanted(n)] if wanted is not None else names)
    except _PARQUET_ERRORS as error:
        raise _broken(path, error) from error


def column_names(path: Path) -> list[str]:
    """Names of a file's columns."""
    try:
        return list(pq.read_schema(path).names)
    except _PARQUET_ERRORS as error:
        raise _broken(path, error) from error


class ColumnCache:
    """The columns that were read last, so that a file of many episodes is not read for each.

    Low-dimensional columns only: images in parquet are read an episode at a time.
    """

    def __init__(self, kept: int = _KEPT_COLUMNS) -> None:
        self._kept = kept
        self._columns: OrderedDict[tuple[str, int, str], Column] = OrderedDict()
        self._lock = Lock()

    def get(self, path: Path, name: str) -> Column:
        """``(rows, ...)`` of a whole file; read-only."""
        try:
            changed = path.stat().st_mtime_ns
        except OSError as error:
            raise _broken(path, error) from error
        key = (str(path), changed, name)
        with self._lock:
            if key in self._columns:
                self._columns.move_to_end(key)
                return self._columns[key]
        column = _read_column(path, name)
        with self._lock:
            self._columns[key] = column
            while len(self._columns) > self._kept:
                self._columns.popitem(last=False)
        return column


COLUMNS = ColumnCache()
"""Of this process; a forked worker starts with a copy."""


def read_cells(path: Path, name: str, first: int, count: int) -> list[Any]:
    """``count`` cells from row ``first`` as Python values, for images kept in parquet."""
    try:
        with pq.ParquetFile(path) as file:
            groups, start, skipped = [], 0, 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start + rows > first and start < first + count:
                    groups.append(group)
                elif start + rows <= first:
                    skipped += rows
                start += rows
            table = file.read_row_groups(groups, columns=[name])
        return list(table.column(name).slice(first - skipped, count).to_pylist())
    except (*_PARQUET_ERRORS, KeyError) as error:
        raise _broken(path, error) from error


def _read_column(path: Path, name: str) -> Column:
    table = read_table(path, lambda found: found == name)
    if name not in table.column_names:
        raise DatasetError(
            f"{path} has no column {name!r}, which info.json declares; it has: "
            f"{', '.join(column_names(path))}",
            field=name,
        )
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty column
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([])
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DatasetError(f"{path}: {name} has no value at row {row}", field=name)
    values = _to_numpy(column, path, name)
    values.flags.writeable = False
    return values


def _to_numpy(column: Any, path: Path, name: str) -> Column:
    """Nested lists of one length become further axes."""
    lengths: list[int] = []
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        sizes = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(sizes) != 1:
            raise DatasetError(
                f"{path}: the rows of {name} differ in length: {sorted(map(str, sizes))[:5]}; "
                "every row needs as many values: record this episode again, or leave it out",
                field=name,
            )
        lengths.append(int(sizes[0]))
        column = column.flatten()
    values = np.array(column.to_numpy(zero_copy_only=False))
    return values.reshape(-1, *lengths) if lengths else values


def _broken(path: Path, error: BaseException) -> DatasetError:
    if is_forbidden(error):
        return not_allowed(path, error)
    return DatasetError(
        f"{path} cannot be read as parquet ({error}); it is truncated, still being written or of "
        "another format: copy it again"
    )
