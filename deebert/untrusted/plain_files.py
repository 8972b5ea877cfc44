"""Read paths, texts and JSON files that somebody else may have written.

No link leads out of its folder, only regular files are read, and values are plain and bounded. This
module does not know what the values mean, and imports nothing heavy; `tensor_files` reads tensors.
An error message names the file alone; the caller adds the flag.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from deebert.errors import UserError, first_line

OPEN = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
JSON_BYTES = 2**24
TOKENIZER_BYTES = 2**26  # in a tokenizer's file; XLM-R's has 17 MB
DEPTH = 20  # levels of values inside values
VALUES = 500_000  # in one file
LAYERS = 128  # in a model; the deepest encoder has 48, and a layer takes 10 ms to build


def root(folder: Path) -> Path:
    """Return the real folder that the files of `folder` must lie in.

    The files of a hub snapshot are links to blobs in the same repository's cache.
    """
    real = folder.resolve()
    for each in (real, *real.parents):
        if each.parent.name == "snapshots" and each.parent.parent.name.startswith("models--"):
            return each.parent.parent
    return real


def inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file in a folder.

    Raises:
        FileNotFoundError: the file does not exist.
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
        raise UserError(
            f"{name} is a link that leads out of the folder; put the file itself there, or name "
            "the place where it lies"
        )
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
        FileNotFoundError: the file does not exist.
        UserError: it cannot be read, is no regular file, or is larger.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        number = os.open(file, os.O_RDONLY | OPEN)
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
    """Read a regular file of at most `limit` bytes as UTF-8.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it cannot be read, is no regular file, is larger, or is not UTF-8.
    """
    try:
        return content(file, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name} is no text in UTF-8") from error


def json_file(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping of plain values.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it cannot be read, or holds anything else.
    """
    return json_mapping(text(file, JSON_BYTES), file.name)


def json_mapping(given: str, what: str, most: int = VALUES) -> dict[str, Any]:
    """Parse JSON into a mapping of plain values.

    Args:
        given: the text.
        what: name of the text, for error messages.
        most: largest number of values in it.

    Raises:
        UserError: it is no JSON, no mapping, or `plain` refuses it.
    """
    try:
        values = json.loads(given, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is damaged ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise UserError(f"{what} holds no mapping")
    return plain(values, what, most)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def plain(value: Any, what: str, most: int = VALUES) -> Any:
    """Return a copy of a plain value, with tuples as lists.

    A plain value is a number (a whole number has at most 128 bits), a text, true, false, null, or a
    list or mapping of plain values. The keys of a mapping are texts.

    Args:
        value: the value.
        what: name of the value, for error messages.
        most: largest number of values in it.

    Raises:
        UserError: the value is not plain, or holds too many or too deeply nested values.
    """
    left = most

    def copied(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > DEPTH or left < 0:
            raise UserError(f"{what} holds too many values, or values too deep inside others")
        if value is None or isinstance(value, float):
            return value
        if isinstance(value, int):
            if not -(2**127) <= value < 2**127:  # 10**30 stands for "no limit" in a tokenizer
                raise UserError(f"{what} holds a whole number of more than 128 bits")
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
    """Say whether a text has no lone surrogates and no NUL."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
