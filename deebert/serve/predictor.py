"""A process of the service that holds the model: it takes requests from a socket and answers them.

One thread receives and encodes requests while the other runs the model. `pool` starts the process
and is at the other end of the socket. Knows nothing of HTTP.
"""

import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from deebert.errors import UserError
from deebert.exits.drift_monitor import MOST_TESTS
from deebert.options import engine_of, import_modules, target_of
from deebert.reporting.blocks import plain
from deebert.serve.replies import Prepared, Reply, prepared, replies
from deebert.serve.requests import Work

if TYPE_CHECKING:
    from deebert.classifier import EarlyExitClassifier
    from deebert.exits.calibration import CalibratedPoint

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_BATCH_SECONDS = 10  # the time in which a process without work has to end
LOG_FORMAT = "%(asctime)s %(name)s: %(message)s"
PACKAGES = ("deebert", "fastapi", "torch", "transformers", "uvicorn")
LENGTH_BYTES = 4  # of the length before each message


@dataclass(frozen=True)
class About:
    """A description of the model, for the process that does not hold it.

    Attributes:
        task: the name of the task.
        columns: the columns of the task's texts.
        labels: the names of the classes; None for a regression.
        layers: the number of layers.
        exit: the name of the exit rule.
        target: the target of requests that have none.
        expected: the expectation for that target; None for given thresholds.
        costs: the cost of leaving at each layer on this machine; None if requests may not set a
            speed-up, or if there is no record that tells the lengths of texts.
        runtime: the library that computes the layers.
        versions: the versions of the packages.
    """

    task: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    layers: int
    exit: str
    target: dict[str, Any]
    expected: dict[str, Any] | None
    costs: tuple[float, ...] | None
    runtime: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Unusable:
    """The reason why the model cannot be served."""

    reason: str


@dataclass(frozen=True)
class Expected:
    """The exits of the calibration rows for a target; None if there are none."""

    target: str
    calibration_N: Any


@dataclass(frozen=True)
class Batch:
    """The numbers of requests and texts that are run together."""

    requests: int
    texts: int


def packed(message: Any) -> bytes:
    """Return a message for the other end of the socket: its length, then its pickle."""
    content = pickle.dumps(message)
    return len(content).to_bytes(LENGTH_BYTES) + content


def loaded(options: Any, costs: tuple[float, ...] | None = None) -> "EarlyExitClassifier":
    """Load the model.

    Args:
        options: a checked `command.ServeOptions`.
        costs: the costs of the layers, if another process has measured them.

    Raises:
        UserError: the model cannot be loaded.
    """
    import torch

    from deebert.classifier import EarlyExitClassifier

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    import_modules(options.modules)
    classifier = EarlyExitClassifier.from_pretrained(
        options.model, task=options.task, **engine_of(options)
    )
    if costs is not None:
        classifier.costs = costs
    return classifier


def described(classifier: "EarlyExitClassifier", options: Any) -> About:
    """Check that the model meets the target of the service, and measure the costs of its layers.

    Raises:
        UserError: the model cannot meet the target.
    """
    point = classifier.calibrate(**target_of(options))
    if options.speedups:
        try:
            classifier.costs  # noqa: B018 (the property keeps its value)
        except UserError as error:
            log.info("no request can ask for target_speedup=: %s", error)
    return About(
        classifier.task.name,
        classifier.task.columns,
        classifier.labels,
        classifier.num_layers,
        point.rule.name,
        dict(point.target),
        None if point.expected is None else plain(point.expected),
        vars(classifier).get("costs"),
        classifier.engine.runtime,
        {package: version(package) for package in PACKAGES},
    )


def main(channel: socket.socket, options: Any, costs: tuple[float, ...] | None) -> None:
    """Run the process, until the other end of the socket is closed.

    Args:
        channel: the socket.
        options: a checked `command.ServeOptions`.
        costs: as `loaded` takes them.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    # A signal to all processes of the service reaches this one, too. It goes on until the process
    # that speaks HTTP has all its answers.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    with suppress(BrokenPipeError, ConnectionResetError):
        Predictor(channel, options).run(costs)


class Predictor:
    """The two threads of the process."""

    def __init__(self, channel: socket.socket, options: Any) -> None:
        self.channel, self.options = channel, options
        self._sending = threading.Lock()
        # Requests with the times at which they came, in seconds; None after the last one.
        self._waiting: SimpleQueue[tuple[Prepared, float] | None] = SimpleQueue()

    def run(self, costs: tuple[float, ...] | None) -> None:
        """Load the model, say so, and answer requests."""
        threading.Thread(target=self._receive, daemon=True).start()
        try:
            self.classifier = loaded(self.options, costs)
            about = described(self.classifier, self.options)
        except UserError as error:
            return self._send(Unusable(str(error)))
        self._send(about)
        known: set[str] = set()
        self._introduce(Work([], about.target), self.classifier.calibrate(**about.target), known)
        while together := self._together():
            for one in together:
                self._introduce(one.work, one.point, known)
            self._send(Batch(len(together), sum(len(each.tokens) for each in together)))
            for number_and_reply in replies(self.classifier, together):
                self._send(number_and_reply)

    def _introduce(self, work: Work, point: "CalibratedPoint", known: set[str]) -> None:
        """Send the exits of the calibration rows for a target that has not been seen before."""
        if work.nominal is None and work.name not in known and len(known) < MOST_TESTS:
            known.add(work.name)
            self._send(Expected(work.name, self.classifier.calibration_exits(point)))

    def _together(self) -> Sequence[Prepared]:
        """Wait for requests, and return those that are to run together; none at the end.

        The window starts when the first one came: if it had to wait for an earlier batch, the
        requests that are there are taken at once.
        """
        taken: list[Prepared] = []
        end = 0.0
        while len(taken) < self.options.max_batch:
            try:
                waits = max(0.0, end - time.monotonic()) if taken else None
                request = self._waiting.get(timeout=waits)
            except Empty:
                break
            if request is None:
                return ()
            if not taken:
                end = request[1] + self.options.batch_window_ms / 1000
            taken.append(request[0])
        return taken

    def _receive(self) -> None:
        """Receive and encode requests, until the other end of the socket is closed.

        The process ends then, even if it is loading the model or runs a long batch.
        """
        try:
            with self.channel.makefile("rb") as stream:
                while length := stream.read(LENGTH_BYTES):
                    number, work = pickle.loads(stream.read(int.from_bytes(length)))
                    came = time.monotonic()
                    request = prepared(self.classifier, number, work)
                    if isinstance(request, Reply):
                        self._send((number, request))
                    else:
                        self._waiting.put((request, came))
        except (OSError, EOFError, pickle.UnpicklingError):
            pass  # the other process was killed
        except Exception:
            log.exception("this process can receive no more requests")
        self._waiting.put(None)
        time.sleep(LAST_BATCH_SECONDS)
        os._exit(1)

    def _send(self, message: Any) -> None:
        with self._sending:
            self.channel.sendall(packed(message))
