"""Rows of a file or of stdin, one after the other: CSV, TSV, JSON lines or Parquet.

Holds a few rows at a time, however many there are. A row that cannot be read comes as one with a
fault, and those after it keep their numbers. Knows nothing of models, or what a row is for.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from deebert.errors import UserError, unknown
from deebert.predict.lines import REPORT, Lines, Record, csv_records, tsv_records
from deebert.predict.rows import ONE_BLOCK, Row, Source, check_names

ENDINGS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(ENDINGS.values()))
STREAMED = FORMATS[:3]  # what stdin may hold
STDIN = "-"
DEEPEST = 100  # lists and objects of JSON within each other
FIRST_ROWS = 1000  # of JSON lines: their keys are its columns


def format_of(given: str, said: str | None) -> str:
    """What an input holds: as it is said, or by its ending.

    Raises:
        UserError: it is unknown.
    """
    if said is not None and said not in FORMATS:
        raise unknown("format", said, FORMATS, "format")
    if given == STDIN and said not in STREAMED:
        raise UserError(
            f"input=- needs a format of stdin, one of: {', '.join(STREAMED)}; it is {said} "
            "(format=...)"
        )
    found = said or ENDINGS.get(Path(given).suffix.lower())
    if found is None:
        raise UserError(
            f"input={given}: its ending is none of {', '.join(ENDINGS)}; say what it holds, one "
            f"of: {', '.join(FORMATS)} (format=...)"
        )
    return found


@contextmanager
def opened(given: str, said: str | None = None) -> Iterator[Source]:
    """An input, ready to be read.

    Args:
        given: a path, or - for stdin.
        said: its format, where the ending does not tell.

    Raises:
        UserError: it is not there, empty, or something else than it is said to be.
    """
    where, kind = f"input={given}", format_of(given, said)
    if given == STDIN:
        yield _of_lines(Lines(where, sys.stdin.buffer), kind, None)
        return
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open(given, "rb", REPORT))
        except OSError as error:
            raise UserError(f"{where}: it cannot be read ({error.strerror})") from error
        if kind == "parquet":
            from deebert.predict import parquet_in  # pyarrow takes half a second

            yield parquet_in.source(where, stream)
        else:
            # A pipe has no size.
            size = Path(given).stat().st_size or None
            yield _of_lines(Lines(where, stream), kind, size)


def blocks(rows: Iterable[Row], most_rows: int) -> Iterator[list[Row]]:
    """Rows in blocks of so many, or fewer where they are large; the same ones every time."""
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


def _of_lines(lines: Lines, kind: str, size: int | None) -> Source:
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
    """A header, and rows of as many fields."""
    header = next(records, None)
    if header is None:
        raise UserError(f"{where}: it is empty")
    if header.fault:
        raise UserError(f"{where}: its first line should name the columns, but {header.fault}")
    names = tuple(header.fields)
    check_names(where, names)

    def every() -> Iterator[Row]:
        for number, (line, fields, fault, size) in enumerate(records):
            if not fault and len(fields) != len(names):
                fault = f"it has {len(fields)} fields, the header has {len(names)}"
            values = {} if fault else dict(zip(names, fields, strict=True))
            yield Row(number, line, values, fault, size)

    return names, _not_empty(where, every())


def _json_lines(lines: Lines) -> tuple[tuple[str, ...], tuple[str, ...], Iterator[Row]]:
    def every() -> Iterator[Row]:
        said = (line for line in lines if line.fault or not line.text.isspace())
        for number, line in enumerate(said):
            values, fault = ({}, line.fault) if line.fault else _object(line.text)
            yield Row(number, line.number, values, fault, line.size)

    rows = _not_empty(lines.where, every())
    first: list[Row] = []
    found: dict[str, bool] = {}  # by key: does a row have a text there?
    for row in rows:
        first.append(row)
        for name, value in row.values.items():
            found[name] = found.get(name, False) or isinstance(value, str)
        if len(first) == FIRST_ROWS or lines.position >= ONE_BLOCK:
            break
    texts = tuple(name for name, is_text in found.items() if is_text)
    return tuple(found), texts, chain(first, rows)


def _object(text: str) -> tuple[dict[str, Any], str | None]:
    """A line of JSON lines, or why it is none."""
    too_deep: tuple[dict[str, Any], str] = {}, f"it is nested deeper than {DEEPEST}"
    try:
        found = json.loads(text, parse_constant=_no_number)
        if not isinstance(found, dict):
            return {}, "it is no JSON object"
        if text.count("[") + text.count("{") > DEEPEST and _is_deeper(found):
            return too_deep
        if "\\u" in text:  # half of a surrogate pair can be written only so
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        return too_deep
    except UnicodeEncodeError:
        return {}, "it holds half of a surrogate pair, which is no character"
    except ValueError as error:
        return {}, f"it is no JSON ({error})"
    return found, None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _is_deeper(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        nested = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in nested for child in each if isinstance(child, dict | list)]
    return bool(level)


def _not_empty(where: str, rows: Iterator[Row]) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{where}: it holds no rows")
    return chain([first], rows)
