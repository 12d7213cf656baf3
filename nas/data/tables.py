"""Parquet files, row by row, in memory that does not grow with how well they are packed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hypernas.data.files import Allowance, unreadable
from hypernas.errors import DataError

BATCH_ROWS, BATCH_BYTES = 1024, 64 << 20  # read at once: fewer rows where they are long
ROW = 256  # bytes that a row counts for at least: a billion empty ones take as long as text
BUFFER = 1 << 20  # bytes of a column that are read ahead


def parquet_rows(file: Path, *columns: tuple[str, ...]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Each row's number, from 1, and its values, one a column; a column is given as the names it may have.

    Raises DataError, naming the row, for a damaged file or a column that is not there, and as `Allowance`.
    """
    # Slow to import, and most users bring plain text.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file, buffer_size=BUFFER) as table:
            names = _find_columns(file, table, columns)
            allowance = Allowance(file, file.stat().st_size)
            for group, rows in enumerate(_batch_sizes(file, table, names, allowance)):
                for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=names):
                    for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                        number += 1
                        allowance.spend(max(ROW, sum(map(_size, values))))
                        yield number, values
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        raise unreadable(file, error, f"after row {number}") from error


def _find_columns(file: Path, table: Any, columns: Sequence[tuple[str, ...]]) -> list[str]:
    """The names that the columns have. Raises DataError for one that is missing, there twice, or of lists, one of which
    may be endless."""
    from pyarrow import types

    there = table.schema_arrow.names
    names = [next((name for name in column if name in there), None) for column in columns]
    if twice := [name for name in names if name is not None and there.count(name) > 1]:
        raise DataError(f"{file}: {there.count(twice[0])} columns named `{twice[0]}`; keep one, rename the others")
    if None in names:
        missing = " or ".join(f"`{name}`" for name in columns[names.index(None)])
        raise DataError(f"{file}: no {missing} column, but {', '.join(there) or 'none'}; rename that one")
    found = [name for name in names if name is not None]
    for name in found:
        inner = [table.schema_arrow.field(name).type]
        while inner:
            kind = inner.pop()
            if types.is_struct(kind):
                inner += [part.type for part in kind]
            elif types.is_nested(kind):
                raise DataError(f"{file}: the column `{name}` is of type {kind}; wanted a string, a number or an image")
    return found


def _batch_sizes(file: Path, table: Any, names: list[str], allowance: Allowance) -> list[int]:
    """How many rows to read at once of each row group, so that they take about BATCH_BYTES.

    Where a value repeats, a file may hold it once and refer to it from every row: of such a dictionary the longest
    value counts for all. Raises DataError where a row group unpacks to more than the file may.
    """
    from pyarrow.parquet import ParquetFile

    leaves = [table.schema.column(i) for i in range(len(table.schema))]
    wanted = [i for i, leaf in enumerate(leaves) if leaf.path.partition(".")[0] in names]
    texts = [leaves[i].path for i in wanted if leaves[i].physical_type == "BYTE_ARRAY"]
    sizes = []
    with ParquetFile(file, read_dictionary=texts, buffer_size=BUFFER) as peeked:
        for group in range(table.num_row_groups):
            about = table.metadata.row_group(group)
            bytes = sum(about.column(i).total_uncompressed_size for i in wanted)
            allowance.check(bytes)
            first = next(peeked.iter_batches(batch_size=1, row_groups=[group], columns=names), None)
            longest = 0 if first is None else max(map(_longest, first.columns), default=0)
            a_row = max(longest, bytes // max(1, about.num_rows), 1)
            sizes.append(max(1, min(BATCH_ROWS, BATCH_BYTES // a_row)))
    return sizes


def _longest(column: Any) -> int:
    """Bytes of the longest value in the dictionaries of a column and what is nested in it."""
    from pyarrow import compute, types

    if types.is_struct(column.type):
        return max(map(_longest, column.flatten()), default=0)
    if not types.is_dictionary(column.type):
        return 0
    return compute.max(compute.binary_length(column.dictionary)).as_py() or 0


def _size(value: Any) -> int:
    """Bytes of a value of a row."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return len(value) if isinstance(value, str | bytes) else 0
