"""The counts of the service, in Prometheus' text format.

All are counted in the process that speaks HTTP. Knows nothing of models and HTTP.
"""

from collections.abc import Iterable

from deebert.exits.drift_monitor import STATES
from deebert.serve.watch import Watch

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """All counts of the service.

    Args:
        num_layers: the number of layers of the model; the last bound of the histogram of exit
            layers.
    """

    def __init__(self, num_layers: int) -> None:
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            disable_created_metrics,
        )

        disable_created_metrics()
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "deebert_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "deebert_request_seconds",
            "From the end of a request's headers to its answer's last byte, in seconds",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.in_progress = Gauge(
            "deebert_requests_in_progress",
            "Requests that are taken and not yet answered",
            registry=registry,
        )
        self._texts = Counter("deebert_texts", "Texts that were answered", registry=registry)
        Gauge("deebert_layers", "Layers of the model", registry=registry).set(num_layers)
        self._layers = Histogram(
            "deebert_exit_layer",
            "Layer that a text left at",
            buckets=range(1, num_layers + 1),
            registry=registry,
        )
        self._batch_requests = Histogram(
            "deebert_batch_requests", "Requests run together", buckets=COUNTS, registry=registry
        )
        self._batch_texts = Histogram(
            "deebert_batch_texts", "Texts run together", buckets=COUNTS, registry=registry
        )

        self._drift = Gauge(
            "deebert_drift_state",
            "0: not calibrated, 1: calibrated, 2: drifting, 3: guarantee no longer holds",
            registry=registry,
        )
        self._drift_ramp = Gauge(
            "deebert_drift_ramp",
            "Ramp at which exits differ the most from those of the calibration rows; 0: unknown",
            registry=registry,
        )
        self._drift_size = Gauge(
            "deebert_drift_size", "That difference, as a share of the texts", registry=registry
        )
        self._followed = Gauge(
            "deebert_recalibrated_saving",
            "Saving that thresholds are chosen for, so that a target_saving is kept after a drift",
            ["target_saving"],
            registry=registry,
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered.

        Args:
            path: the path of the request.
            status: the HTTP status of the answer.
            seconds: the time from the end of the headers of the request to the last byte of the
                answer.
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

    def collected(self, watch: Watch | None) -> tuple[bytes, str]:
        """Return all counts and the state of drift as text, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        if watch is not None:
            drift = watch.drift
            self._drift.set(STATES.index(drift.state))
            self._drift_ramp.set(drift.ramp or 0)
            self._drift_size.set(drift.size)
            for target, nominal in watch.followed.items():
                self._followed.labels(str(target)).set(nominal)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
