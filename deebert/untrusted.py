"""Read files that somebody else may have written: paths, texts and JSON.

No link leads out of its folder, what is not a regular file is refused, and values are plain and
bounded. Knows nothing of what they mean; `tensor_files` reads what holds tensors. Imports nothing
heavy. Messages name the file alone; whoever asked for it adds the flag.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from deebert.errors import UserError, first_line

JSON_BYTES = 2**24
TOKENIZER_BYTES = 2**26  # of a tokenizer's file; that of XLM-R has 17 MB
DEPTH = 20  # of values inside values
VALUES = 500_000  # in one file
LAYERS = 128  # of a model; the deepest encoder has 48, and a layer takes 10 ms to build
TEXT = 10_000  # characters of a name or any other text of a configuration


def root(folder: Path) -> Path:
    """Return the real folder that the files of `folder` must lie in.

    The files of a hub snapshot are links to blobs in the same repository's cache.
    """
    real = folder.resolve()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real.parent.parent
    return real


def inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file in a folder.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is no regular file, or a link that leads out of the folder.
    """
    file = folder / name
    try:
        real = file.resolve(strict=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(2, "missing", name) from error
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise UserError(f"{name} cannot be opened ({type(error).__name__})") from error
    if not real.is_relative_to(root(folder)):
        raise UserError(f"{name} is a link that leads out of the folder; put the file itself there")
    if not real.is_file():
        raise UserError(f"{name} is no regular file")
    return file


def is_inside(folder: Path, name: str) -> bool:
    """Say whether `inside` would return a path."""
    try:
        inside(folder, name)
    except (FileNotFoundError, UserError):
        return False
    return True


def content(file: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it cannot be read, is no regular file, or is larger.
    """
    try:
        # A pipe would be waited for without O_NONBLOCK.
        number = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{file.name} cannot be read ({first_line(error)})") from error
    with open(number, "rb") as stream:
        facts = os.fstat(number)
        if not stat.S_ISREG(facts.st_mode):
            raise UserError(f"{file.name} is no regular file")
        if facts.st_size > limit:
            raise UserError(
                f"{file.name} has {facts.st_size} bytes, more than the {limit} that it may have"
            )
        return stream.read(limit)


def text(file: Path, limit: int) -> str:
    """Read a file as `content` does, as UTF-8.

    Raises:
        FileNotFoundError, UserError: as `content`; or it is not UTF-8.
    """
    try:
        return content(file, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name} is no text in UTF-8") from error


def json_file(file: Path) -> dict[str, Any]:
    """Read a mapping of plain values.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it cannot be read, or holds anything else.
    """
    return json_mapping(text(file, JSON_BYTES), file.name)


def json_mapping(given: str, what: str) -> dict[str, Any]:
    """Parse JSON into a mapping of plain, finite values.

    Raises:
        UserError: it is no JSON, no mapping, or `plain` refuses it.
    """
    try:
        found = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is damaged ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise UserError(f"{what} holds no mapping")
    return plain(found, what)


def plain(value: Any, what: str) -> Any:
    """Return a copy of values that are plain all through, tuples as lists.

    Plain are finite numbers, texts, true, false, null, and lists of these and mappings by text.

    Raises:
        UserError: one is not, or there are too many of them or too deep.
    """
    left = VALUES

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > DEPTH or left < 0:
            raise UserError(f"{what} holds too many values, or values too deep inside others")
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise UserError(f"{what} holds {value}, which is no finite number")
            return value
        if isinstance(value, str):
            if not _is_text(value):
                raise UserError(f"{what} holds a text with half a character or a NUL in it")
            return value
        if isinstance(value, list | tuple):
            return [copied(each, depth + 1) for each in value]
        if isinstance(value, dict) and all(isinstance(key, str) and _is_text(key) for key in value):
            return {key: copied(each, depth + 1) for key, each in value.items()}
        raise UserError(f"{what} holds a {type(value).__name__}, which is no plain value")

    return copied(value, 0)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
