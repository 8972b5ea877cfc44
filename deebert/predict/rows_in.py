"""The rows of a file or of stdin, one after the other: CSV, TSV, JSON lines or Parquet.

Holds a few rows at a time, however many there are. A row that cannot be read is given with a
fault, and the rows after it keep their numbers. Knows nothing of models and of what a row is for.
"""

import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deebert.errors import UserError, first_line, unknown
from deebert.predict.rows import (
    READ_SIZE,
    Lines,
    Record,
    Row,
    Source,
    check_names,
    csv_records,
    json_object,
    tsv_records,
)

ENDINGS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(ENDINGS.values()))
STREAMED = FORMATS[:3]  # the formats that stdin may have
STDIN = "-"
FIRST_ROWS = 1000  # rows of JSON lines whose keys are the columns
ONE_BLOCK = 32_000_000  # bytes at which a block of rows is full
MOST_AT_ONCE = 1024  # rows of Parquet that are decoded together


def format_of(given: str, stated: str | None) -> str:
    """Return the format of an input: the stated one, or the one that the file's ending says.

    Args:
        given: a path, or - for stdin.
        stated: the format that the user states, or None.

    Raises:
        UserError: the format is unknown.
    """
    if stated is not None and stated not in FORMATS:
        raise unknown("format", stated, FORMATS, "format")
    if given == STDIN and stated not in STREAMED:
        raise UserError(
            f"input=- needs a format of stdin, one of: {', '.join(STREAMED)}; it is {stated} "
            "(format=...)"
        )
    kind = stated or ENDINGS.get(Path(given).suffix.lower())
    if kind is None:
        raise UserError(
            f"input={given}: its ending is none of {', '.join(ENDINGS)}; say what it holds, one "
            f"of: {', '.join(FORMATS)} (format=...)"
        )
    return kind


@contextmanager
def opened(given: str, stated: str | None = None) -> Iterator[Source]:
    """Open an input for reading.

    Args:
        given: a path, or - for stdin.
        stated: its format, if the file's ending does not say it.

    Raises:
        UserError: the input does not exist, is empty, or has another format.
    """
    where, kind = f"input={given}", format_of(given, stated)
    if given == STDIN:
        if sys.stdin is None:  # a shell's <&-
            raise UserError(f"{where}: stdin is closed; give a file, or pipe the rows in")
        yield _line_source(Lines(where, sys.stdin.buffer), kind, None)
        return
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open(given, "rb", READ_SIZE))
        except OSError as error:
            raise UserError(f"{where}: it cannot be read ({error.strerror})") from error
        if kind == "parquet":
            yield _parquet_source(where, stream)
        else:
            # A pipe has no size.
            size = Path(given).stat().st_size or None
            yield _line_source(Lines(where, stream), kind, size)


def blocks(rows: Iterable[Row], most_rows: int) -> Iterator[list[Row]]:
    """Yield the rows in blocks. The same rows give the same blocks every time.

    Args:
        rows: the rows.
        most_rows: the number of rows of a block; it has fewer if they are large.
    """
    block: list[Row] = []
    size = 0
    for row in rows:
        block.append(row)
        size += row.size
        if len(block) == most_rows or size >= ONE_BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _line_source(lines: Lines, kind: str, size: int | None) -> Source:
    """Return the source for CSV, TSV or JSON lines."""
    if kind == "jsonl":
        names, texts, rows = _json_lines(lines)
    else:
        records = csv_records(lines) if kind == "csv" else tsv_records(lines)
        names, rows = _table(lines.where, records)
        texts = names
    return Source(
        names, texts, lambda _: rows, lambda: lines.position, size, {}, free=kind == "jsonl"
    )


def _table(where: str, records: Iterator[Record]) -> tuple[tuple[str, ...], Iterator[Row]]:
    """Return the columns of the header, and the rows that have as many fields."""
    header = next(records, None)
    if header is None:
        raise UserError(f"{where}: it is empty")
    if header.fault:
        raise UserError(f"{where}: its first line should name the columns, but {header.fault}")
    names = tuple(header.fields)
    check_names(where, names)

    def all_rows() -> Iterator[Row]:
        for number, (line, fields, fault, size) in enumerate(records):
            if not fault and len(fields) != len(names):
                fault = f"it has {len(fields)} fields, the header has {len(names)}"
            values = {} if fault else dict(zip(names, fields, strict=True))
            yield Row(number, line, values, fault, size)

    return names, _not_empty(where, all_rows())


def _json_lines(lines: Lines) -> tuple[tuple[str, ...], tuple[str, ...], Iterator[Row]]:
    """Return the columns of the first rows, the columns with texts among them, and the rows."""

    def all_rows() -> Iterator[Row]:
        written = (line for line in lines if line.fault or not line.text.isspace())
        for number, line in enumerate(written):
            values, fault = ({}, line.fault) if line.fault else json_object(line.text)
            yield Row(number, line.number, values, fault, line.size)

    rows = _not_empty(lines.where, all_rows())
    first: list[Row] = []
    has_text: dict[str, bool] = {}  # by column
    for row in rows:
        first.append(row)
        for name, value in row.values.items():
            has_text[name] = has_text.get(name, False) or isinstance(value, str)
        if len(first) == FIRST_ROWS or lines.position >= ONE_BLOCK:
            break
    texts = tuple(name for name, is_text in has_text.items() if is_text)
    return tuple(has_text), texts, chain(first, rows)


def _not_empty(where: str, rows: Iterator[Row]) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{where}: it holds no rows")
    return chain([first], rows)


class Unreadable(NamedTuple):
    """A placeholder for a value of Parquet that Python cannot read."""

    reason: str


def _parquet_source(where: str, stream: BinaryIO) -> Source:
    """Return the source for a Parquet file.

    Raises:
        UserError: the file is no Parquet, has no rows, or has two columns of the same name.
    """
    import pyarrow as pa  # takes half a second, and the other formats do not need it
    from pyarrow import parquet

    try:
        # By default it reads ahead a whole row group, which may be the whole file.
        file = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=READ_SIZE)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(where, error) from error
    names, num_rows = file.schema_arrow.names, file.metadata.num_rows
    check_names(where, names)
    if not num_rows:
        raise UserError(f"{where}: it holds no rows")
    types = {field.name: _value_type(field.type) for field in file.schema_arrow}
    position = 0

    def rows(wanted: Collection[str]) -> Iterator[Row]:
        nonlocal position
        try:
            # The order is the same in every process: rows are compared when work goes on.
            columns = [name for name in names if name in wanted]
            for batch in file.iter_batches(_rows_at_once(file.metadata), columns=columns):
                cells = zip(*(_python_values(column) for column in batch.columns), strict=True)
                for row in cells:
                    yield _parquet_row(position, dict(zip(batch.schema.names, row, strict=True)))
                    position += 1
        except (pa.ArrowException, OSError) as error:
            raise _damaged(f"{where}, from row {position:,} on", error) from error

    texts = tuple(name for name, kind in types.items() if _is_text(kind))
    return Source(tuple(names), texts, rows, lambda: position, num_rows, types)


def _value_type(kind: Any) -> Any:
    """Return the type of the values: the storage of an extension type, the names of categories."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _value_type(kind.storage_type)
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _rows_at_once(metadata: Any) -> int:
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    row_size = sum(group.total_byte_size for group in groups) // metadata.num_rows + 1
    return min(MOST_AT_ONCE, max(1, ONE_BLOCK // 4 // row_size))


def _parquet_row(number: int, values: dict[str, Any]) -> Row:
    size = sum(len(value) for value in values.values() if isinstance(value, str | bytes))
    for name, value in values.items():
        if isinstance(value, Unreadable):
            return Row(number, None, {}, f"its {name!r} {value.reason}", size)
    return Row(number, None, values, None, size)


def _python_values(column: Any) -> list[Any]:
    import pyarrow as pa

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
    reason = first_line(error)
    return UserError(f"{where}: it cannot be read as Parquet ({reason})")
