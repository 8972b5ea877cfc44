"""What every format gives: rows, and the input that they come from. Knows no format."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deebert.errors import UserError

ONE_BLOCK = 32_000_000  # bytes from which on a block of rows is full


class Row(NamedTuple):
    """A row of the input.

    Attributes:
        number: from 0; a header and blank lines do not count, a row with a fault does.
        line: where it begins, from 1; None in Parquet.
        values: by column; {} where it has a fault.
        fault: why it cannot be read, or None.
        size: in bytes, about.
    """

    number: int
    line: int | None
    values: dict[str, Any]
    fault: str | None
    size: int


@dataclass(frozen=True)
class Source:
    """An input that is open.

    Attributes:
        names: its columns; of JSON lines those of the first rows.
        texts: those of them that hold texts.
        rows: gives its rows, once, with the columns asked for (and more, where that is cheaper).
        position: how much has been read, in bytes (Parquet: in rows),
        size: of so much; None where nobody knows.
        types: pyarrow's types of the columns, where the file says them.
        free: may every row have columns of its own?
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    rows: Callable[[Collection[str]], Iterator[Row]]
    position: Callable[[], int]
    size: int | None
    types: dict[str, Any]
    free: bool = False


def check_names(where: str, names: Sequence[str]) -> None:
    """Raises:
    UserError: two columns have the same name.
    """
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{where}: it has {times} columns {name!r}; rename them")
