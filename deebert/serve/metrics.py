"""The counts of the service, in Prometheus' text format.

The process that speaks HTTP and the processes that hold the model write to shared files (the
multiprocess mode of `prometheus_client`), so each of them can report the sums. Knows nothing of
models and HTTP.
"""

import os
from collections.abc import Iterable
from pathlib import Path

# prometheus_client reads it when it is imported, so `share` has to be called first.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def share(folder: Path) -> None:
    """Set the folder of the counts for this process and the processes that it starts."""
    os.environ[FOLDER] = str(folder)


class Metrics:
    """All counts of the service.

    Args:
        num_layers: the number of layers of the model; the last bound of the histogram of exit
            layers.
    """

    def __init__(self, num_layers: int) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        # The metrics are in no registry: `collected` reads the sums of all processes from files.
        self._requests = Counter(
            "deebert_requests", "Requests by path and status", ["path", "status"], registry=None
        )
        self._seconds = Histogram(
            "deebert_request_seconds",
            "From a request's first byte to its answer's last, in seconds",
            ["path"],
            buckets=SECONDS,
            registry=None,
        )
        self.in_progress = Gauge(
            "deebert_requests_in_progress",
            "Requests that are taken and not yet answered",
            multiprocess_mode="livesum",
            registry=None,
        )
        self._texts = Counter("deebert_texts", "Texts that were answered", registry=None)
        self._layers = Histogram(
            "deebert_exit_layer",
            "Layer that a text left at",
            buckets=range(1, num_layers + 1),
            registry=None,
        )
        self._batch_requests = Histogram(
            "deebert_batch_requests", "Requests run together", buckets=COUNTS, registry=None
        )
        self._batch_texts = Histogram(
            "deebert_batch_texts", "Texts run together", buckets=COUNTS, registry=None
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered.

        Args:
            path: the path of the request.
            status: the HTTP status of the answer.
            seconds: the time from the first byte of the request to the last of the answer.
        """
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, num_requests: int, num_texts: int) -> None:
        """Count requests that are run together. Refused ones count, but without their texts."""
        self._batch_requests.observe(num_requests)
        self._batch_texts.observe(num_texts)

    def left(self, exit_layers: Iterable[int]) -> None:
        """Count texts that were answered, by the layers that they left at."""
        for layer in exit_layers:
            self._texts.inc()
            self._layers.observe(layer)


def collected() -> tuple[bytes, str]:
    """Return the sums of all processes as text, and its content type."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST
