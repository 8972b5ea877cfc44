"""The time that several systems take for the same requests, measured in turns.

The systems take turns, so other work on the machine slows them all alike. A ratio compares two
systems within one turn, and the result is the median over the turns. This module knows nothing of
models.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)

LONG_TURN = 5.0  # seconds of a turn, above which the log states how long it takes


@dataclass(frozen=True)
class Timing:
    """The seconds of one system.

    A request is what the system runs in one call. A turn runs all requests, one after the other.

    Attributes:
        seconds_RQ: the seconds of each of Q requests in each of R turns.
    """

    seconds_RQ: np.ndarray

    @property
    def seconds(self) -> float:
        """The seconds of a turn, as the median over the turns."""
        return float(np.median(self.seconds_RQ.sum(1)))

    @property
    def latency_ms(self) -> dict[str, float]:
        """Percentiles over all requests of all turns, in milliseconds."""
        percentiles = np.percentile(self.seconds_RQ * 1e3, [50, 95, 99])
        return dict(zip(("p50", "p95", "p99"), percentiles.tolist(), strict=True))

    def saving(self, other: "Timing") -> float:
        """Return 1 - our time / the other system's time, as the median over the turns."""
        shares_R = self.seconds_RQ.sum(1) / other.seconds_RQ.sum(1)
        return 1 - median(shares_R.tolist())


@contextmanager
def undisturbed(threads: int | None) -> Iterator[None]:
    """Set torch's threads, and switch its deterministic mode off, while the context lasts.

    A Trainer switches the deterministic mode on. torch then also fills each new tensor.

    Args:
        threads: the number of threads; None leaves it as it is.
    """
    threads_before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads or threads_before)
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def compare(
    systems: Mapping[str, Callable[[Any], Any]],
    requests: Sequence[Any],
    repeats: int,
) -> dict[str, Timing]:
    """Time several systems on the same requests, in turns.

    Each system first runs all requests once, untimed. The order of the systems is reversed in every
    second turn, so that no system always runs after the same other one.

    Args:
        systems: functions that run a request and wait for its answer, by the system's name.
        requests: the requests of each turn.
        repeats: the number of turns.
    """
    start = time.perf_counter()
    for run in systems.values():
        for request in requests:
            run(request)
    if (warm := time.perf_counter() - start) > LONG_TURN:
        log.info("%d turns of about %.0f s", repeats, warm)
    turns: dict[str, list[list[float]]] = {name: [] for name in systems}
    for turn in range(repeats):
        for name in list(systems)[:: -1 if turn % 2 else 1]:
            run, seconds = systems[name], []
            for request in requests:
                start = time.perf_counter()
                run(request)
                seconds.append(time.perf_counter() - start)
            turns[name].append(seconds)
    return {name: Timing(np.array(seconds)) for name, seconds in turns.items()}
