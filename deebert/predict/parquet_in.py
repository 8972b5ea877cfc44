"""Rows of a Parquet file, as `rows_in` gives them. Knows nothing of the other formats."""

from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import parquet, types

from deebert.errors import UserError, first_line
from deebert.predict.lines import REPORT
from deebert.predict.rows import ONE_BLOCK, Row, Source, check_names

MOST_AT_ONCE = 1024  # rows that are decoded together


class Unreadable(NamedTuple):
    """In the place of a value."""

    reason: str


def source(where: str, stream: BinaryIO) -> Source:
    """The file behind this stream.

    Raises:
        UserError: it is no Parquet, has no rows, or has two columns of one name.
    """
    try:
        # Without these it reads ahead: a whole row group, which may be the whole file.
        file = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=REPORT)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(where, error) from error
    names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    check_names(where, names)
    if not num_rows:
        raise UserError(f"{where}: it holds no rows")
    kinds = {field.name: stored(field.type) for field in file.schema_arrow}
    position = 0

    def rows(wanted: Collection[str]) -> Iterator[Row]:
        nonlocal position
        try:
            # In an order that is the same in every process: rows are compared when work goes on.
            columns = [name for name in names if name in wanted]
            for batch in file.iter_batches(_at_once(file.metadata), columns=columns):
                cells = zip(*(_python(column) for column in batch.columns), strict=True)
                for row in cells:
                    yield _row(position, dict(zip(batch.schema.names, row, strict=True)))
                    position += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(f"{where}, from row {position:,} on", error) from error

    texts = tuple(name for name, kind in kinds.items() if _is_text(kind))
    return Source(tuple(names), texts, rows, lambda: position, num_rows, kinds)


def stored(kind: Any) -> Any:
    """A type without what is said on top of it: categories become what they name."""
    if isinstance(kind, pa.BaseExtensionType):
        return stored(kind.storage_type)
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _at_once(metadata: Any) -> int:
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    of_a_row = sum(group.total_byte_size for group in groups) // metadata.num_rows + 1
    return min(MOST_AT_ONCE, max(1, ONE_BLOCK // 4 // of_a_row))


def _row(number: int, values: dict[str, Any]) -> Row:
    size = sum(len(value) for value in values.values() if isinstance(value, str | bytes))
    for name, value in values.items():
        if isinstance(value, Unreadable):
            return Row(number, None, {}, f"its {name!r} {value.reason}", size)
    return Row(number, None, values, None, size)


def _python(column: Any) -> list[Any]:
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return Unreadable("is not UTF-8")
    except (ValueError, OverflowError) as error:  # a date that Python has not
        return Unreadable(f"cannot be read ({error})")


def _damaged(where: str, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(f"{where}: it cannot be read as Parquet ({reason})")
