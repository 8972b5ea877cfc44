"""How far a long run has come: a bar on a terminal, elsewhere a line now and then; on stderr.

Knows nothing of what is run.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

EVERY = 10.0  # seconds between lines


class Progress:
    """A context; what is left is judged by the pace since it was entered.

    Args:
        size: how much there is to do, in any unit; None where nobody knows.
        start: how much of it was done before.
    """

    def __init__(self, size: int | None, start: int = 0) -> None:
        self.size, self.start = size, start
        self.began = self.said = time.monotonic()
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
        """Say how far it has come, and more about it; on no terminal not every time."""
        now = time.monotonic()
        if self.size and position > self.start:
            left = (self.size - position) * (now - self.began) / (position - self.start)
            about += f", {100 * position / self.size:.0f}%, {_latency(left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=position, description=about)
        elif now - self.said >= EVERY:
            self.said = now
            print(about, file=sys.stderr, flush=True)


def _latency(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
