"""Files that come whole or not at all, written by one process at a time.

What `parts` and `folder_out` share. Knows nothing of what is in the files.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deebert.errors import UserError

GOES_ON = "the same command goes on (without overwrite=true)"


def replace(file: Path, content: bytes, part: Path) -> None:
    """Put a file in its place, however the process or the machine stops.

    Args:
        part: what it is called, in the same folder, until it is whole.

    Raises:
        UserError: it cannot be written.
    """
    with told(file.parent):
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
        sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk, or a folder's names are."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def content(values: Mapping[str, Any]) -> bytes:
    """Of a JSON file."""
    return json.dumps(values, indent=1).encode()


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they are when they have been written and read again."""
    found: dict[str, Any] = json.loads(content(values))
    return found


def read(file: Path) -> dict[str, Any]:
    """What `content` was written.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}); remove the folder"
        ) from error


def locked(file: Path, output: Path) -> FileLock:
    """A lock that this process holds now.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    lock = FileLock(file)
    with told(file.parent):
        file.parent.mkdir(exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"output={output}: another process is writing it; wait for its end"
            ) from None
    return lock


def is_there(output: Path) -> UserError:
    """For an output that nobody agreed to replace."""
    return UserError(f"output={output} is there already; replace it with overwrite=true")


def no_folder(output: Path) -> UserError:
    """For an output in a folder that there is not."""
    return UserError(f"output={output}: there is no folder {output.parent}; make it first")


@contextmanager
def told(where: Path) -> Iterator[None]:
    """Say in a line what the disk refuses.

    Raises:
        UserError: for an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}: it cannot be written ({error.strerror or error}); what is done stays, and "
            f"{GOES_ON}"
        ) from error
