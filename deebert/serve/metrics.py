"""What the service counts, in Prometheus' text format.

The process that talks HTTP and those that hold the model write to files that they share
(`prometheus_client`'s multiprocess mode), so that each of them may tell the sums.
Knows nothing of models or HTTP.
"""

import os
from collections.abc import Iterable
from pathlib import Path

# Read by prometheus_client when it is imported, so `share` comes before any of the others.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def share(folder: Path) -> None:
    """Count in this folder, in this process and those that it starts."""
    os.environ[FOLDER] = str(folder)


class Metrics:
    """All of them.

    Args:
        num_layers: of the model: the bounds of the exit layers' histogram.
    """

    def __init__(self, num_layers: int) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        # Not registered: what all processes counted is collected from the files.
        alone = None
        self._requests = Counter(
            "deebert_requests", "Requests by path and status", ["path", "status"], registry=alone
        )
        self._seconds = Histogram(
            "deebert_request_seconds",
            "From a request's first byte to its answer's last, in seconds",
            ["path"],
            buckets=SECONDS,
            registry=alone,
        )
        self.in_progress = Gauge(
            "deebert_requests_in_progress",
            "Requests that are taken and not yet answered",
            multiprocess_mode="livesum",
            registry=alone,
        )
        self._texts = Counter("deebert_texts", "Texts that were answered", registry=alone)
        self._layers = Histogram(
            "deebert_exit_layer",
            "Layer that a text left at",
            buckets=range(1, num_layers + 1),
            registry=alone,
        )
        self._batch_requests = Histogram(
            "deebert_batch_requests", "Requests run together", buckets=COUNTS, registry=alone
        )
        self._batch_texts = Histogram(
            "deebert_batch_texts", "Texts run together", buckets=COUNTS, registry=alone
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, num_requests: int, num_texts: int) -> None:
        """Requests came to be run together; those that are refused count, without their texts."""
        self._batch_requests.observe(num_requests)
        self._batch_texts.observe(num_texts)

    def left(self, exit_layers: Iterable[int]) -> None:
        """Texts were answered, which left at these layers."""
        for layer in exit_layers:
            self._texts.inc()
            self._layers.observe(layer)


def collected() -> tuple[bytes, str]:
    """What all processes have counted, and its content type."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
