"""Bytes -> lines, and lines -> the records of CSV and TSV; none of them larger than a limit.

What cannot be read comes with a fault and what follows is read on, so a broken line costs itself
and nothing else. Knows nothing of columns.
"""

import csv
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from deebert.errors import UserError

LONGEST = 10_000_000  # bytes of a line, and of a CSV record of several lines
MOST_LINES = 100_000  # of a CSV record
REPORT = 2**20


class Line(NamedTuple):
    """A line, with its end; `text` says little where there is a fault."""

    number: int  # from 1
    text: str
    fault: str | None
    size: int


class Lines:
    """The lines of a stream of bytes.

    One that is too long is never in memory. In its place stands a word, or a lone quote where its
    quotes are odd, so that the CSV record around it ends where it should.

    Attributes:
        position: how many bytes have been read.
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
            raw = self._without_mark(raw)
        if len(raw) > LONGEST:
            return Line(self.number, self._passed(raw), f"it is longer than {LONGEST:,} bytes", 0)
        fault = "it holds a NUL byte" if b"\0" in raw else None
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            text = raw.decode(errors="replace")
            fault = fault or f"it is not UTF-8 (byte 0x{raw[error.start]:02x})"
        return Line(self.number, text.replace("\0", "\ufffd") if fault else text, fault, len(raw))

    def _without_mark(self, raw: bytes) -> bytes:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{self.where}: it is UTF-16; save it as UTF-8")
        return raw.removeprefix(b"\xef\xbb\xbf")

    def _passed(self, raw: bytes) -> str:
        quotes = 0
        while True:
            quotes += raw.count(b'"')
            if not raw or raw.endswith(b"\n"):
                return '"\n' if quotes % 2 else "x\n"
            raw = self.stream.readline(REPORT)
            self.position += len(raw)


class Record(NamedTuple):
    """The fields of a row; none where there is a fault."""

    line: int  # where it begins, from 1
    fields: list[str]
    fault: str | None
    size: int


class _Feed:
    """Lines as csv.reader takes them, which can be put back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self.lines = lines
        self.back: deque[Line] = deque()
        self.begin()

    def begin(self) -> None:
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
        """All but the first."""
        self.back.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def csv_records(lines: Iterator[Line]) -> Iterator[Record]:
    """Records of CSV; blank lines between them are passed over.

    Where a quote goes wrong, only the line that the record begins in is lost and the next one is
    read anew: a quote that is never closed would otherwise take the rest of the file with it.
    """
    # Of all readers, alas; what ours are given is kept shorter.
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
    """Records of TSV. Nothing is quoted, as in training: a lone " is part of a text."""
    for line in lines:
        text = line.text.removesuffix("\n").removesuffix("\r")
        if text or line.fault:
            fields = [] if line.fault else text.split("\t")
            yield Record(line.number, fields, line.fault, line.size)
