"""Write files that are whole or missing, however the process or the machine stops.

A file is written under another name in the same folder, synced and then renamed. A file that was
there before stays until the new one is whole. Every file gets the permissions that the user's umask
allows, also where a library would make it private. This module imports nothing heavy.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deebert.errors import UserError, first_line

# The errors of a disk that takes no more, as against a mistake in a name.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def replaced(file: Path, part: Path | None = None) -> Iterator[Path]:
    """Give a path to write to, whose file takes the place of `file` after the `with` block.

    Args:
        file: the file. Its folder is made if it is missing.
        part: the name of the file until it is whole, in the same folder. None stands for a hidden
            name. Only one process at a time may write the same file.

    Raises:
        OSError: the file cannot be written. It names the folder. The old file stays as it was.
    """
    part = part or file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # a link is not followed
        part.touch(exist_ok=False)
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        if stat.S_IMODE(part.stat().st_mode) != mode:  # safetensors makes private files
            part.chmod(mode)
        sync(part)
        os.replace(part, file)
        sync(file.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        known = isinstance(error, UserError) or not isinstance(error, Exception)
        if not known and (number := _number(error)) is not None:
            raise OSError(number, os.strerror(number), str(file.parent)) from error
        raise


def replace(file: Path, content: bytes | str, part: Path | None = None) -> None:
    """Write a file so that it is whole or missing.

    Args:
        file: the file.
        content: all of its bytes, or its text.
        part: as in `replaced`.

    Raises:
        OSError: the file cannot be written. It names the folder.
    """
    with replaced(file, part) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def copy(file: Path, to: Path) -> None:
    """Copy a file so that the copy is whole or missing.

    Raises:
        OSError: the copy cannot be written.
    """
    with replaced(to) as new:
        shutil.copyfile(file, new)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if path.is_dir():
        # Windows cannot open a folder, and some file systems cannot sync one.
        with contextlib.suppress(OSError):
            _sync(path)
    else:
        _sync(path)


@contextmanager
def write_errors(where: Path | str, hint: str = "") -> Iterator[None]:
    """Turn an error of the disk into one line for the user.

    Args:
        where: the file or folder that is written inside the block, or the flag that names it.
        hint: the end of the message.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{where}: it cannot be written ({reason}){hint}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync
            raise
    finally:
        os.close(handle)


def _number(error: BaseException | None) -> int | None:
    """Return the number of the disk's error behind an exception, or None if there is none.

    torch raises a RuntimeError while it handles the OSError. safetensors has it in its message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            return int(number[1])
        error = error.__cause__ or error.__context__
    return None
