"""How long things take: warm-up, repeats, interleaved, percentiles.

Whatever else the machine does hits all systems alike, since they take turns; a ratio is taken
between neighbours in time and then the median of all turns. Knows nothing of models.
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

WORTH_SAYING = 5.0  # seconds of a turn


@dataclass(frozen=True)
class Timing:
    """Seconds of one system: (R, Q), for each of R turns and Q requests.

    A request is whatever is run as one; a turn runs all of them, one after the other.
    """

    seconds_RQ: np.ndarray

    @property
    def seconds(self) -> float:
        """Of a turn, the median."""
        return float(np.median(self.seconds_RQ.sum(1)))

    @property
    def latency_ms(self) -> dict[str, float]:
        """Percentiles over all requests of all turns, in milliseconds."""
        found = np.percentile(self.seconds_RQ * 1e3, [50, 95, 99])
        return dict(zip(("p50", "p95", "p99"), found.tolist(), strict=True))

    def saving(self, other: "Timing") -> float:
        """1 - our time / the other's, the median over the turns."""
        shares_R = self.seconds_RQ.sum(1) / other.seconds_RQ.sum(1)
        return 1 - median(shares_R.tolist())


@contextmanager
def undisturbed(threads: int | None) -> Iterator[None]:
    """For a while so many threads (None: as torch has them), and none of torch's checks.

    A Trainer asks for deterministic kernels; torch then also fills each new tensor.
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

    Each system first runs all requests once, not timed. The order of the systems is reversed from
    turn to turn, so that none always runs on a machine that another has just warmed.

    Args:
        systems: what runs a request and waits until the answer is there.
        requests: what each turn consists of.
        repeats: turns.
    """
    start = time.perf_counter()
    for run in systems.values():
        for request in requests:
            run(request)
    if (warm := time.perf_counter() - start) > WORTH_SAYING:
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
