"""Describe a row and an open input, whatever its format is."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deebert.errors import UserError

ONE_BLOCK = 32_000_000  # bytes at which a block of rows is full
# What is stored once and stands in many rows fills the memory, however small the file is.
SMALL = 2**28  # bytes that any file may hold
TIMES_ITS_SIZE = 100  # a larger file may hold so many times its size


def largest_decoded(size: int) -> int:
    """Return how many bytes a file, or a part of it, of a size may hold."""
    return max(SMALL, TIMES_ITS_SIZE * size)


class Row(NamedTuple):
    """A row of the input.

    Attributes:
        number: its number from 0. A header and blank lines do not count; a row with a fault does.
        line: the line that it begins on, from 1; None in Parquet and in a list of JSON.
        values: its values by column; {} if it has a fault.
        fault: the reason why it cannot be read, or None.
        size: its size in bytes, approximately.
    """

    number: int
    line: int | None
    values: dict[str, Any]
    fault: str | None
    size: int

    @property
    def place(self) -> str:
        """The place of the row in its file, for messages."""
        return f"row {self.number}" if self.line is None else f"line {self.line}"


def separator_hint(names: Sequence[str]) -> str:
    """Return a hint for a message if the only column looks like several ones."""
    mark = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    return f" ({mark!r} looks like its separator, which must be a comma)" if mark else ""


@dataclass(frozen=True)
class Source:
    """An open input.

    Attributes:
        names: its columns; for JSON the columns of the first rows.
        texts: the columns that hold texts.
        rows: gives the rows, once, with the wanted columns (and others, where that is cheaper).
        position: gives how much has been read, in bytes (Parquet: in rows).
        size: the size of the whole input in the same unit; None if it is not known.
        types: the pyarrow types of the columns, if the file states them.
        is_empty: whether it has no rows.
        free: whether every row may have columns of its own.
        classes: for a column of ids, the names of the ids, if the file states them.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    rows: Callable[[Collection[str]], Iterator[Row]]
    position: Callable[[], int]
    size: int | None
    types: Mapping[str, Any]
    is_empty: bool = False
    free: bool = False
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """How a file of CSV or TSV is read.

    Attributes:
        header: the columns of a file whose first line may be a row; None if it names the columns.
        header_has: the names that the first line of such a file has if it names the columns.
        label: the column of labels, if there is one.
        is_label: says whether a value is a label. A CSV record of several lines is refused if one
            of them is a row by itself, with a label: the quotes around them are wrong.
        leaves_out: whether a row with another number of fields is left out, with one warning.
    """

    header: tuple[str, ...] | None = None
    header_has: frozenset[str] = frozenset()
    label: str | None = None
    is_label: Callable[[str], bool] = lambda _: False
    leaves_out: bool = False


PLAIN = Table()


def check_names(where: str, names: Sequence[str]) -> None:
    """Check that no two columns have the same name.

    Raises:
        UserError: two columns have the same name.
    """
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{where}: it has {times} columns {name!r}; rename them")


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
