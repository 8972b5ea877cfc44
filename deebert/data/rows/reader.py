"""Open a file or stdin, and give its rows one after the other: CSV, TSV, JSON or Parquet.

Holds a few rows at a time, however many there are. A row that cannot be read is given with a
fault, and the rows after it keep their numbers. Knows nothing of models and of what a row is for.
"""

import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

from deebert.data.rows.lines import (
    READ_SIZE,
    Lines,
    Record,
    csv_records,
    fields_of,
    json_array,
    json_object,
    tsv_records,
)
from deebert.data.rows.source import ONE_BLOCK, PLAIN, Row, Source, Table, check_names
from deebert.errors import UserError, first_line, unknown

log = logging.getLogger(__name__)

ENDINGS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".parquet": "parquet",
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(ENDINGS.values()))
STREAMED = FORMATS[:3]  # the formats that stdin may have
STDIN = "-"
FIRST_ROWS = 1000  # rows of JSON lines whose keys are the columns


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
    """Open an input that has rows.

    Args:
        given: a path, or - for stdin.
        stated: its format, if the file's ending does not say it.

    Raises:
        UserError: the input does not exist, is empty, or has another format.
    """
    where, kind = f"input={given}", format_of(given, stated)
    with ExitStack() as stack:
        if given == STDIN:
            if sys.stdin is None:  # a shell's <&-
                raise UserError(f"{where}: stdin is closed; give a file, or pipe the rows in")
            source = _line_source(Lines(where, sys.stdin.buffer), kind, None, PLAIN)
        else:
            source = stack.enter_context(opened_file(Path(given), kind, where))
        if source.is_empty:
            raise UserError(f"{where}: it holds no rows")
        yield source


@contextmanager
def opened_file(path: Path, kind: str, where: str, table: Table = PLAIN) -> Iterator[Source]:
    """Open a file, which may have no rows.

    Args:
        path: the file.
        kind: its format.
        where: the name of the file in messages.
        table: how CSV and TSV are read.

    Raises:
        UserError: the file does not exist, is empty, or has another format.
    """
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open(path, "rb", READ_SIZE))
            size = path.stat().st_size or None  # a pipe has no size
        except OSError as error:
            raise UserError(f"{where}: it cannot be read ({error.strerror})") from error
        if kind == "parquet":
            from deebert.data.rows import parquet  # pyarrow takes half a second

            yield parquet.source(where, stream)
        else:
            yield _line_source(Lines(where, stream), kind, size, table)


def _line_source(lines: Lines, kind: str, size: int | None, table: Table) -> Source:
    """Return the source for CSV, TSV, JSON lines or JSON."""
    if kind in ("json", "jsonl"):
        return _json_source(lines, size, may_be_list=kind == "json")
    records = csv_records(lines) if kind == "csv" else tsv_records(lines)
    names, records = _header(lines.where, records, table)
    first = next(records, None)

    def rows(wanted: Collection[str]) -> Iterator[Row]:
        chosen = [(place, name) for place, name in enumerate(names) if name in wanted]
        number, left_out = -1, 0
        for record in chain([first] if first else (), records):
            line, fields, fault, record_size, _ = record
            if table.leaves_out and not fault and len(fields) != len(names):
                left_out += 1
                continue
            number += 1
            if not fault:
                fault = _table_fault(record, names, table)
            values = {} if fault else {name: fields[place] for place, name in chosen}
            yield Row(number, line, values, fault, record_size)
        if left_out:
            log.warning(
                "%s: %d rows have another number of fields than the header: left out",
                lines.where,
                left_out,
            )

    return Source(names, names, rows, lambda: lines.position, size, {}, is_empty=first is None)


def _header(
    where: str, records: Iterator[Record], table: Table
) -> tuple[tuple[str, ...], Iterator[Record]]:
    """Return the columns, and the records of the rows."""
    first = next(records, None)
    if first is None:
        raise UserError(f"{where}: it is empty")
    if table.header and not table.header_has <= {*first.fields}:
        return table.header, chain([first], records)
    if first.fault:
        raise UserError(f"{where}: its first line should name the columns, but {first.fault}")
    check_names(where, first.fields)
    return tuple(first.fields), records


def _table_fault(record: Record, names: Sequence[str], table: Table) -> str | None:
    """Return the reason why a record is no row of a table, or None."""
    if len(record.fields) != len(names):
        return f"it has {len(record.fields)} fields, the header has {len(names)}"
    if not record.lines or table.label not in names:
        return None
    column = names.index(table.label)
    inside = [place for place, text in enumerate(record.fields) if "\n" in text]
    for number, line in enumerate(record.lines):
        # In the first line the columns before the text stand outside its quotes, and in the last
        # line those after it. A label there is the label of this very row.
        outside = column < inside[0] if number == 0 else column > inside[-1]
        if outside and number in (0, len(record.lines) - 1):
            continue
        fields = fields_of(line)
        if len(fields) == len(names) and table.is_label(fields[column]):
            return (
                f"its quotes hold several lines, and line {line.number} looks like a row of its "
                'own: a " stands alone somewhere (if the text is right, use JSON lines)'
            )
    return None


def _json_source(lines: Lines, size: int | None, *, may_be_list: bool) -> Source:
    """Return the source for JSON lines, or for JSON that may also be one list of objects."""
    rows = _json_rows(lines, may_be_list=may_be_list)
    first: list[Row] = []
    has_text: dict[str, bool] = {}  # by column
    for row in rows:
        first.append(row)
        for name, value in row.values.items():
            has_text[name] = has_text.get(name, False) or isinstance(value, str)
        if len(first) == FIRST_ROWS or lines.position >= ONE_BLOCK:
            break
    texts = tuple(name for name, is_text in has_text.items() if is_text)
    return Source(
        tuple(has_text),
        texts,
        lambda _: chain(first, rows),
        lambda: lines.position,
        size,
        {},
        is_empty=not first,
        free=True,
    )


def _json_rows(lines: Lines, *, may_be_list: bool) -> Iterator[Row]:
    written = (line for line in lines if line.fault or not line.text.isspace())
    for number, line in enumerate(written):
        if may_be_list and number == 0 and line.text.lstrip().startswith("["):
            yield from _listed_rows(lines, line.text)
            return
        values, fault = ({}, line.fault) if line.fault else json_object(line.text)
        yield Row(number, line.number, values, fault, line.size)


def _listed_rows(lines: Lines, first: str) -> Iterator[Row]:
    """Yield the rows of a list of JSON, which is read as a whole."""
    texts = [first]
    for line in lines:
        if line.fault:
            raise UserError(f"{lines.where}: line {line.number}: {line.fault}")
        texts.append(line.text)
    try:
        objects = list(json_array("".join(texts)))
    except ValueError as error:
        raise UserError(f"{lines.where}: it is no JSON ({first_line(error)})") from error
    size = lines.position // max(1, len(objects))
    for number, (values, fault) in enumerate(objects):
        yield Row(number, None, values, fault, size)
