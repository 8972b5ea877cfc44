"""The rows of an input, and how they are read from lines of text: CSV, TSV and JSON lines.

A line or a record that is too long is never held in memory. A line that cannot be read gives a
record with a fault, and reading goes on after it, so a broken line costs only itself. Knows
nothing of files, of Parquet and of what the columns mean.
"""

import csv
import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, NoReturn

from deebert.errors import UserError

LONGEST = 10_000_000  # bytes of a line, and of a CSV record of several lines
MOST_LINES = 100_000  # lines of a CSV record
READ_SIZE = 2**20  # bytes that are read at a time
DEEPEST = 100  # levels of lists and objects of JSON inside each other


class Row(NamedTuple):
    """A row of the input.

    Attributes:
        number: its number from 0. A header and blank lines do not count; a row with a fault does.
        line: the line that it begins on, from 1; None in Parquet.
        values: its values by column; {} if it has a fault.
        fault: the reason why it cannot be read, or None.
        size: its size in bytes, approximately.
    """

    number: int
    line: int | None
    values: dict[str, Any]
    fault: str | None
    size: int


@dataclass(frozen=True)
class Source:
    """An open input.

    Attributes:
        names: its columns; for JSON lines the columns of the first rows.
        texts: the columns that hold texts.
        rows: gives the rows, once, with the wanted columns (and others, where that is cheaper).
        position: gives how much has been read, in bytes (Parquet: in rows).
        size: the size of the whole input in the same unit; None if it is not known.
        types: the pyarrow types of the columns, if the file states them.
        free: whether every row may have columns of its own.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    rows: Callable[[Collection[str]], Iterator[Row]]
    position: Callable[[], int]
    size: int | None
    types: dict[str, Any]
    free: bool = False


def check_names(where: str, names: Sequence[str]) -> None:
    """Check that no two columns have the same name.

    Raises:
        UserError: two columns have the same name.
    """
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{where}: it has {times} columns {name!r}; rename them")


class Line(NamedTuple):
    """A line of text.

    Attributes:
        number: its number from 1.
        text: its text with the line end; not reliable if there is a fault.
        fault: the reason why it cannot be read, or None.
        size: its size in bytes; 0 if it is too long.
    """

    number: int
    text: str
    fault: str | None
    size: int


class Lines:
    """The lines of a stream of bytes.

    A line that is too long is never in memory. Its text is replaced by a word, or by a single quote
    if the line has an odd number of quotes, so that the CSV record around it ends where it should.

    Attributes:
        position: the number of bytes that have been read.
    """

    def __init__(self, where: str, stream: BinaryIO) -> None:
        self.where, self.stream = where, stream
        self.number = self.position = 0

    def __iter__(self) -> Iterator[Line]:
        return self

    def __next__(self) -> Line:
        raw = self.stream.readline(LONGEST + 1)
        if not raw:
            raise StopIteration
        self.position += len(raw)
        self.number += 1
        if self.number == 1:
            raw = self._without_byte_order_mark(raw)
        if len(raw) > LONGEST:
            too_long = f"it is longer than {LONGEST:,} bytes"
            return Line(self.number, self._skip_line(raw), too_long, 0)
        fault = "it holds a NUL byte" if b"\0" in raw else None
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            text = raw.decode(errors="replace")
            fault = fault or f"it is not UTF-8 (byte 0x{raw[error.start]:02x})"
        return Line(self.number, text.replace("\0", "\ufffd") if fault else text, fault, len(raw))

    def _without_byte_order_mark(self, raw: bytes) -> bytes:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{self.where}: it is UTF-16; save it as UTF-8")
        return raw.removeprefix(b"\xef\xbb\xbf")

    def _skip_line(self, raw: bytes) -> str:
        """Read on to the end of a line that is too long; return the text that replaces it."""
        quotes = 0
        while True:
            quotes += raw.count(b'"')
            if not raw or raw.endswith(b"\n"):
                return '"\n' if quotes % 2 else "x\n"
            raw = self.stream.readline(READ_SIZE)
            self.position += len(raw)


class Record(NamedTuple):
    """The fields of a row of CSV or TSV.

    Attributes:
        line: the line that it begins on, from 1.
        fields: its fields; none if there is a fault.
        fault: the reason why it cannot be read, or None.
        size: its size in bytes.
    """

    line: int
    fields: list[str]
    fault: str | None
    size: int


class _Feed:
    """The lines as csv.reader takes them. Lines that it has taken can be put back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self.lines = lines
        self.back: deque[Line] = deque()
        self.begin()

    def begin(self) -> None:
        """Begin a new record."""
        self.taken: list[Line] = []
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.size > LONGEST or len(self.taken) >= MOST_LINES:
            raise csv.Error("a quote is opened and not closed soon")
        line = self.back.popleft() if self.back else next(self.lines)
        self.taken.append(line)
        self.size += line.size
        return line.text

    def put_back(self) -> None:
        """Put back all lines of the record but the first."""
        self.back.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def csv_records(lines: Iterator[Line]) -> Iterator[Record]:
    """Yield the records of CSV. Blank lines between them are skipped.

    If a quote is wrong, only the line that the record begins on is lost, and the next line is read
    again: a quote that is never closed would otherwise take the rest of the file with it.
    """
    # The limit holds for all readers of the process. The records here are kept shorter.
    csv.field_size_limit(max(csv.field_size_limit(), 2 * LONGEST + 1))
    feed = _Feed(lines)
    reader = csv.reader(feed, strict=True)
    while True:
        feed.begin()
        fields, fault = [], None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = f"it is no CSV ({error})"
            feed.put_back()
        fault = next((line.fault for line in feed.taken if line.fault), fault)
        if fault:
            yield Record(feed.taken[0].number, [], fault, feed.size)
        elif fields:
            yield Record(feed.taken[0].number, fields, None, feed.size)


def tsv_records(lines: Iterator[Line]) -> Iterator[Record]:
    """Yield the records of TSV. There is no quoting, as in training: a " is part of a text."""
    for line in lines:
        text = line.text.removesuffix("\n").removesuffix("\r")
        if text or line.fault:
            fields = [] if line.fault else text.split("\t")
            yield Record(line.number, fields, line.fault, line.size)


def json_object(text: str) -> tuple[dict[str, Any], str | None]:
    """Read a line of JSON lines.

    Returns:
        The object and None, or {} and the reason why the line is not a usable JSON object.
    """
    too_deep: tuple[dict[str, Any], str] = {}, f"it is nested deeper than {DEEPEST}"
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            return {}, "it is no JSON object"
        if text.count("[") + text.count("{") > DEEPEST and _is_too_deep(value):
            return too_deep
        if "\\u" in text:  # only an escape can give half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        return too_deep
    except UnicodeEncodeError:
        return {}, "it holds half of a surrogate pair, which is no character"
    except ValueError as error:
        return {}, f"it is no JSON ({error})"
    return value, None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        nested = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in nested for child in each if isinstance(child, dict | list)]
    return bool(level)
