"""The lock on a run folder: one run writes into it at a time, and no other one ever after.

The lock is taken before Hydra writes its first file, and ends with the process. This module imports
nothing heavy.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from deebert.disk import locks, whole_files
from deebert.errors import UserError
from deebert.options import refuse
from deebert.runs import signals

LOCK = ".lock"
CHOOSE = "choose another hydra.run.dir, or leave it out"

_locks: dict[Path, BaseFileLock] = {}  # of the folders that this process has claimed


class ClaimFolder(Callback):
    """The callback `hydra.callbacks.folder`, which claims the run folder of a single run.

    Without it, Hydra would write its files into the folder of another run before that is refused.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            claim(Path(config.hydra.run.dir))
        except UserError as error:
            refuse(error)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Claim a run folder, and give its lock back after the `with` block (`claim`)."""
    try:
        claim(folder)
        yield
    finally:
        lock = _locks.pop(_absolute(folder), None)
        if lock:
            lock.release()


def claim(folder: Path) -> None:
    """Lock a run folder for this process, unless it has the lock already.

    The other processes of a distributed run write into the folder of the first one.

    Args:
        folder: the run folder, which is made if it is missing.

    Raises:
        UserError: another run is writing or has written here. In a reused folder, the results would
            no longer belong to the weights.
    """
    folder = _absolute(folder)
    if folder in _locks or not signals.is_first_process():
        return
    flag = f"hydra.run.dir={folder}"
    with whole_files.write_errors(flag):
        lock = locks.locked(folder / LOCK, f"{flag}: another run is writing into it; {CHOOSE}")
    for name in ("results.json", "checkpoints", "csv"):
        if (folder / name).exists():
            lock.release()
            raise UserError(
                f"{flag} holds the {name} of another run, and a run folder is never reused: "
                f"{CHOOSE}"
            )
    _locks[folder] = lock


def _absolute(folder: Path) -> Path:
    return Path(os.path.abspath(folder))  # as Hydra makes it absolute
