"""Locks that keep two processes from writing the same output.

The lock is one of the operating system (`flock`), so it ends with the process that holds it, also
when the process is killed. Where a file system has no such lock, the file itself is the lock.
"""

import errno
import warnings
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from deebert.errors import UserError

# The errors of a file system that has no locks, such as NFS without its lock service.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


def locked(file: Path, message: str, wait: float = 0) -> BaseFileLock:
    """Lock a file for this process.

    Args:
        file: the lock. Its folder is made if it is missing.
        message: the message of the error if another process holds the lock.
        wait: the seconds to wait for another process that holds the lock.

    Returns:
        The lock, which this process holds until it is released.

    Raises:
        UserError: another process holds the lock.
        OSError: the file cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            with warnings.catch_warnings(action="ignore"):  # filelock tells of ENOSYS by one
                return _acquired(FileLock(file), wait)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return _acquired(SoftFileLock(file.with_name(f"{file.name}.soft")), wait)
    except Timeout:
        raise UserError(message) from None


def _acquired(lock: BaseFileLock, wait: float) -> BaseFileLock:
    lock.acquire(timeout=wait)
    return lock
