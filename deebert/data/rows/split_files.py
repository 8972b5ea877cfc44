"""Find the file or the shards of a split in a folder.

Names are compared, and no name is a pattern: a folder may be called `set[AB]` or `run*`. Knows
nothing of what the files hold.
"""

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from deebert.errors import UserError

# In the order in which they are looked for.
SUFFIXES = (".parquet", ".jsonl", ".json", ".tsv", ".csv")
# The files of the hub are called train-00000-of-00001.parquet, and once had a hash after that.
SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?", re.ASCII)
MOST_NAMED = 5  # files that a message names


class Shard(NamedTuple):
    """The name of a shard: train-00000-of-00002.csv is the first one of two.

    Attributes:
        file: the name.
        number: its number from 0.
        total: the number of shards.
        has_hash: whether a hash follows the numbers.
    """

    file: str
    number: int
    total: int
    has_hash: bool


class Files(NamedTuple):
    """The files of a split.

    Attributes:
        paths: the file, or the shards in their order.
        others: other files of the same split, which are not read.
    """

    paths: tuple[Path, ...]
    others: tuple[str, ...]


def names_of(split: str) -> tuple[str, ...]:
    """Return the names that the files of a split may have: `dev` and others for `validation`."""
    others = [split.replace("validation", other) for other in ("dev", "valid", "val")]
    return tuple(dict.fromkeys((split, *others)))


def find(places: Sequence[Path], names: Sequence[str]) -> Files | None:
    """Find the files of a split.

    Args:
        places: the folders to look in. The first one with a file of the split is taken.
        names: the names of the split.

    Returns:
        The files; None if there are none.

    Raises:
        UserError: shards are missing, or are of several exports.
    """
    for place in places:
        there = _names(place)
        chosen: list[str] = []
        others: list[str] = []
        for suffix in SUFFIXES:
            for name in names:
                shards = [shard for file in there if (shard := _shard(file, name, suffix))]
                whole = [f"{name}{suffix}"] if f"{name}{suffix}" in there else []
                if whole and shards:
                    raise UserError(
                        f"{place}: {whole[0]} and {shards[0].file} are of two exports; keep the "
                        "files of one"
                    )
                if chosen:
                    others += whole or [shard.file for shard in shards]
                elif whole or shards:
                    chosen = whole or _in_order(place, shards)
        if chosen:
            return Files(tuple(place / file for file in chosen), tuple(others))
    return None


def _names(place: Path) -> list[str]:
    """Return the names in a folder in alphabetic order; none if it does not exist."""
    try:
        return sorted(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{place}: it cannot be read ({error.strerror})") from error


def _shard(file: str, name: str, suffix: str) -> Shard | None:
    """Return what the name of a shard says; None if it is no shard of this split."""
    if not (file.startswith(name) and file.endswith(suffix)):
        return None
    match = SHARD.fullmatch(file[len(name) : len(file) - len(suffix)])
    return match and Shard(file, int(match[1]), int(match[2]), match[3] is not None)


def _in_order(place: Path, shards: Sequence[Shard]) -> list[str]:
    """Return the files of the shards of a split in the order of their numbers.

    Raises:
        UserError: one is missing, or they are of several exports.
    """
    by_number: dict[int, Shard] = {}
    for shard in shards:
        twin = by_number.setdefault(shard.number, shard)
        other = twin if twin is not shard else shards[0]
        if twin is not shard or shard[2:] != other[2:]:
            raise UserError(
                f"{place}: {other.file} and {shard.file} are of two exports; keep the files of one"
            )
    total = shards[0].total
    numbers = (f"{number:05}" for number in range(total) if number not in by_number)
    missing = list(islice(numbers, MOST_NAMED + 1))
    if missing or len(by_number) > total:
        listed = ", ".join(missing[:MOST_NAMED]) + ", ..." * (len(missing) > MOST_NAMED)
        raise UserError(
            f"{place}: {shards[0].file} is one of {total} files, numbered from 0, and "
            + (f"these are missing: {listed}" if missing else f"there are {len(by_number)}")
        )
    return [by_number[number].file for number in range(total)]
