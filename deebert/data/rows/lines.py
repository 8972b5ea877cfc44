"""Read records from lines of text: CSV, TSV and JSON.

A line or a record that is too long is never held in memory. A line that cannot be read gives a
record with a fault, and reading goes on after it, so a broken line costs only itself. Knows
nothing of files, of Parquet and of what the columns mean.
"""

import csv
import json
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from deebert.errors import UserError

LONGEST = 10_000_000  # bytes of a line, and of a CSV record of several lines
MOST_LINES = 100_000  # lines of a CSV record
READ_SIZE = 2**20  # bytes that are read at a time
DEEPEST = 100  # levels of lists and objects of JSON inside each other
TOO_DEEP = f"it is nested deeper than {DEEPEST}"
LONE_RETURN = "it holds a carriage return that ends no line (save it with the line ends of Unix)"


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
        lines: its lines if it has several, else none.
    """

    line: int
    fields: list[str]
    fault: str | None
    size: int
    lines: tuple[Line, ...] = ()


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
            # The message of the library is about the arguments of Python's open().
            is_return = "new-line character" in str(error)
            fault = LONE_RETURN if is_return else f"it is no CSV ({error})"
            feed.put_back()
        fault = next((line.fault for line in feed.taken if line.fault), fault)
        if fault:
            yield Record(feed.taken[0].number, [], fault, feed.size)
        elif fields:
            several = tuple(feed.taken) if len(feed.taken) > 1 else ()
            yield Record(feed.taken[0].number, fields, None, feed.size, several)


def fields_of(line: Line) -> list[str]:
    """Return the fields of a line of CSV by itself. A quote that is not closed is left out."""
    try:
        return next(csv.reader([line.text], strict=True), [])
    except csv.Error:
        return next(csv.reader([line.text.replace('"', "")]), [])


def tsv_records(lines: Iterator[Line]) -> Iterator[Record]:
    """Yield the records of TSV. There is no quoting, as in training: a " is part of a text."""
    for line in lines:
        text = line.text.removesuffix("\n").removesuffix("\r")
        fault = line.fault or (LONE_RETURN if "\r" in text else None)
        if text or fault:
            yield Record(line.number, [] if fault else text.split("\t"), fault, line.size)


def json_object(text: str) -> tuple[dict[str, Any], str | None]:
    """Read a line of JSON lines.

    Returns:
        The object and None, or {} and the reason why the line is not a usable JSON object.
    """
    try:
        value = DECODER.decode(text)
    except RecursionError:
        return {}, TOO_DEEP
    except ValueError as error:
        return {}, f"it is no JSON ({error})"
    fault = _fault(
        value,
        many=text.count("[") + text.count("{") > DEEPEST,
        escapes="\\u" in text,  # only an escape can give half of a surrogate pair
    )
    return ({}, fault) if fault else (value, None)


def json_array(text: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Read a list of JSON objects: the pairs that `json_object` returns, one after the other.

    Raises:
        ValueError: the text is no list of JSON.
    """
    try:
        values = DECODER.decode(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    for value in values:
        fault = _fault(value, many=True, escapes="\\u" in text)
        yield ({}, fault) if fault else (value, None)


def _fault(value: Any, *, many: bool, escapes: bool) -> str | None:
    """Return the reason why a value of JSON is no usable object, or None.

    Args:
        value: the value.
        many: whether its text has more brackets than a value may have levels.
        escapes: whether its text has escapes of characters.
    """
    if not isinstance(value, dict):
        return "it is no JSON object"
    if many and _is_too_deep(value):
        return TOO_DEEP
    if escapes:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "it holds half of a surrogate pair, which is no character"
    return None


DECODER = json.JSONDecoder()


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        nested = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in nested for child in each if isinstance(child, dict | list)]
    return bool(level)
