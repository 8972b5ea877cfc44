"""The tools of a long job: files that appear whole, a lock on its output, a progress display.

The messages say how the job goes on. Knows nothing of what the files hold and of what the job
computes.
"""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import BaseFileLock
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from deebert.disk import locks, whole_files
from deebert.errors import UserError

GOES_ON = "the same command goes on (without overwrite=true)"
EVERY = 10.0  # seconds between the lines of progress where there is no terminal


def replace(file: Path, content: bytes, part: Path) -> None:
    """Write a file so that it is whole or missing (`whole_files.replace`).

    Raises:
        UserError: the file cannot be written.
    """
    with write_errors(file.parent):
        whole_files.replace(file, content, part)


def content(values: Mapping[str, Any]) -> bytes:
    """Return the bytes of a JSON file that holds these values."""
    return json.dumps(values, indent=1).encode()


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as they are after they were written as JSON and read again."""
    restored: dict[str, Any] = json.loads(content(values))
    return restored


def read(file: Path) -> dict[str, Any]:
    """Read the values of a file that holds the bytes of `content`.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        values: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return values
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}); remove the folder"
        ) from error


def locked(file: Path, output: Path) -> BaseFileLock:
    """Lock a file for this process.

    Args:
        file: the lock. Its folder is made if there is none.
        output: the output that the lock protects; for the message.

    Returns:
        The lock, which this process holds.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    with write_errors(file.parent):
        return locks.locked(
            file, f"output={output}: another process is writing it; wait for its end"
        )


def exists_error(output: Path) -> UserError:
    """Return the error for an output that exists and may not be replaced."""
    return UserError(f"output={output} is there already; replace it with overwrite=true")


def no_folder_error(output: Path) -> UserError:
    """Return the error for an output whose folder does not exist."""
    return UserError(f"output={output}: there is no folder {output.parent}; make it first")


def write_errors(where: Path) -> AbstractContextManager[None]:
    """Turn an error of the disk into one line for the user (`whole_files.write_errors`).

    Args:
        where: the file or folder that is written inside the `with` block; for the message.

    Raises:
        UserError: the block raised an OSError.
    """
    return whole_files.write_errors(where, f"; what is done stays, and {GOES_ON}")


class Progress:
    """A display of how far a job has come, on stderr; a context manager.

    It is a bar on a terminal, and a line now and then elsewhere. The time left is estimated from
    the pace since the context was entered.

    Args:
        size: the size of the whole job in any unit; None if it is not known.
        start: the part of the job that was done before, in the same unit.
    """

    def __init__(self, size: int | None, start: int = 0) -> None:
        self.size, self.start = size, start
        self.began = self.last_shown = time.monotonic()
        self.bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(), TextColumn("{task.description}", markup=False))
            self.bar = Bar(
                *columns, TimeElapsedColumn(), console=Console(stderr=True), refresh_per_second=2
            )
            self.task = self.bar.add_task("", total=size, completed=start)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, position: int, about: str) -> None:
        """Show how far the job has come. Without a terminal, most calls print nothing.

        Args:
            position: the part of the job that is done, in the unit of the size.
            about: a line about the job, to which the share and the time left are added.
        """
        now = time.monotonic()
        if self.size and position > self.start:
            left = (self.size - position) * (now - self.began) / (position - self.start)
            about += f", {100 * position / self.size:.0f}%, {_duration(left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=position, description=about)
        elif now - self.last_shown >= EVERY:
            self.last_shown = now
            print(about, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
