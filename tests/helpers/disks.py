"""A disk that takes no more, for tests that run as any user; and the modes of files."""

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let no file of this process and its children grow beyond this number of bytes.

    A write then fails with "File too large", as it fails with "No space left on device" on a disk
    that is full.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def of_other_modes(folder: Path) -> dict[str, str]:
    """Return the modes of the files and folders in a folder that are not those of the umask."""
    umask = os.umask(0)
    os.umask(umask)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*")}
    return {
        str(path.relative_to(folder)): oct(mode)
        for path, mode in modes.items()
        if not path.is_symlink() and mode != (0o777 if path.is_dir() else 0o666) & ~umask
    }
