"""Locks that keep two processes from writing the same output.

The lock is one of the operating system (`flock`), so it ends with the process that holds it, also
when the process is killed. Where a file system has no such lock, the file itself is the lock.
"""

from pathlib import Path

from filelock import FileLock, Timeout

from deebert.errors import UserError


def locked(file: Path, message: str) -> FileLock:
    """Lock a file for this process.

    Args:
        file: the lock. Its folder is made if it is missing.
        message: the message of the error if another process holds the lock.

    Returns:
        The lock, which this process holds until it is released.

    Raises:
        UserError: another process holds the lock.
        OSError: the file cannot be written.
    """
    lock = FileLock(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(message) from None
    return lock
