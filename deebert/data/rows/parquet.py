"""The rows of a Parquet file, a few at a time.

A small file can hold large rows: a value that is stored once may stand in many rows. What is in
memory at once stays bounded all the same. Knows nothing of what a row is for.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from deebert.data.rows.lines import READ_SIZE
from deebert.data.rows.source import (
    ONE_BLOCK,
    TIMES_ITS_SIZE,
    Row,
    Source,
    check_names,
    largest_decoded,
)
from deebert.errors import UserError, first_line

MOST_AT_ONCE = 1024  # rows that are decoded together
DECODED = ONE_BLOCK // 4  # bytes that are decoded together, approximately


class Unreadable(NamedTuple):
    """A placeholder for a value that Python cannot read."""

    reason: str


def source(where: str, stream: BinaryIO) -> Source:
    """Return the source for a Parquet file.

    Raises:
        UserError: the file is no Parquet, or has two columns of the same name.
    """
    try:
        # By default it reads ahead a whole row group, which may be the whole file.
        file = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=READ_SIZE)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(where, error) from error
    names, num_rows = schema.names, file.metadata.num_rows
    check_names(where, names)
    types = {field.name: _value_type(field.type) for field in schema}
    position = 0

    def rows(wanted: Collection[str]) -> Iterator[Row]:
        nonlocal position
        try:
            # The order is the same in every process: rows are compared when work goes on.
            for values in _rows(where, file, stream, [name for name in names if name in wanted]):
                yield _row(position, values)
                position += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(f"{where}, from row {position:,} on", error) from error

    texts = tuple(name for name, kind in types.items() if _is_text(kind))
    return Source(
        tuple(names),
        texts,
        rows,
        lambda: position,
        num_rows,
        types,
        is_empty=not num_rows,
        classes=_classes(schema.metadata),
    )


def _rows(where: str, file: Any, stream: BinaryIO, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of each row by column."""
    for group in range(file.metadata.num_row_groups):
        at_once = _rows_at_once(where, file, stream, group, columns)
        for batch in file.iter_batches(at_once, row_groups=[group], columns=columns):
            names = batch.schema.names
            for row in zip(*map(_python_values, batch.columns), strict=True):
                yield dict(zip(names, row, strict=True))


def _rows_at_once(where: str, file: Any, stream: BinaryIO, group: int, columns: list[str]) -> int:
    """Return how many rows of a group are decoded together.

    Raises:
        UserError: the values of a column take far more memory than they take in the file.
    """
    about = file.metadata.row_group(group)
    if not about.num_rows:
        return 1
    largest = about.total_byte_size // about.num_rows + 1  # bytes of a row
    wanted = {*columns}
    for index in range(about.num_columns):
        chunk = about.column(index)
        path = chunk.path_in_schema  # the name of the column; for nested values longer
        if path not in wanted and path.split(".")[0] not in wanted:
            continue
        size = chunk.total_uncompressed_size
        if size > largest_decoded(chunk.total_compressed_size):
            raise UserError(
                f"{where}: its column {path!r} holds {size:,} bytes in "
                f"{chunk.total_compressed_size:,} of the file, more than {TIMES_ITS_SIZE} times as "
                "many; write it in smaller groups of rows"
            )
        if chunk.has_dictionary_page and size * MOST_AT_ONCE > DECODED:
            value = _largest_value(stream, file, group, path) or size
            largest = max(largest, value * -(-chunk.num_values // about.num_rows))
    return min(MOST_AT_ONCE, max(1, DECODED // largest))


def _largest_value(stream: BinaryIO, file: Any, group: int, path: str) -> int | None:
    """Return the size in bytes of the largest of the different values of a column.

    Returns:
        The size; None if the column is no text, or is nested in a way in which it is not known.
    """
    once = parquet.ParquetFile(
        stream,
        metadata=file.metadata,
        read_dictionary=[path],
        pre_buffer=False,
        buffer_size=READ_SIZE,
    )
    try:
        [column] = next(once.iter_batches(1, row_groups=[group], columns=[path])).columns
        while not pa.types.is_dictionary(column.type):
            column = column.field(0) if pa.types.is_struct(column.type) else column.values
        return pc.max(pc.binary_length(column.dictionary)).as_py()
    except (AttributeError, ValueError, NotImplementedError, pa.ArrowException):
        return None


def _classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the names of the ids of each column for which the library `datasets` wrote them."""
    try:
        about = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = about["info"]["features"].items()
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features
            if feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):  # written by another program
        return {}


def _value_type(kind: Any) -> Any:
    """Return the type of the values: the storage of an extension type, the names of categories."""
    if isinstance(kind, pa.BaseExtensionType):
        return _value_type(kind.storage_type)
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _row(number: int, values: dict[str, Any]) -> Row:
    size = 0
    for value in values.values():
        kind = type(value)
        if kind is str or kind is bytes:
            size += len(value)
        elif kind is Unreadable:
            [name, *_] = (name for name in values if values[name] is value)
            return Row(number, None, {}, f"its {name!r} {value.reason}", size)
    return Row(number, None, values, None, size)


def _python_values(column: Any) -> list[Any]:
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_python_value(cell) for cell in column]


def _python_value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return Unreadable("is not UTF-8")
    except (ValueError, OverflowError) as error:  # a date outside Python's range
        return Unreadable(f"cannot be read ({error})")


def _damaged(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: it cannot be read as Parquet ({first_line(error)})")
